"""Prompts and answers: what is trained of a row, in decoders and in models with an encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
import whence
from finetuned import Checkpoint, measured, opened, own, procedure_of, started
from whence.errors import ConfigError, DataError
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.prompted import Pair, encode_pair, row_groups
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.recipes.start import make_tokenizer
from whence.tasks import CausalLM, Seq2SeqLM
from whence.tasks.likelihoods import IGNORE

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
NAMES = ["alpaca", "flan", "strategy", "commonsense"]
ARCHITECTURES = ["gpt2", "llama", "gpt_neo", "t5"]
SEED = TrainingSettings().seed


class Config:
    """As much of a model's configuration as a row needs."""

    def __init__(self, *, encoder: bool) -> None:
        self.is_encoder_decoder, self.decoder_start_token_id = encoder, 7


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("gpt2", iter(["is it so? yes no because of that The answer is yes."]), "tiny")


def parts(tokenizer: Any, row: Any) -> tuple[str, str]:
    trained = [label for label in row["labels"] if label != IGNORE]
    read = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE]
    return tokenizer.decode(read), tokenizer.decode(trained)


def test_a_decoder_reads_the_prompt_and_is_trained_on_the_answer(tokenizer: Any) -> None:
    row = encode_pair(tokenizer, Config(encoder=False), Pair(prompt="is it so?\n", answer="yes", more={"question": "q1"}), 100)
    assert parts(tokenizer, row) == ("is it so?\n", "yes<|endoftext|>")
    assert (row["text"], row["question"]) == ("is it so?\nyes", "q1")
    trained = [label != IGNORE for label in row["labels"]]
    assert trained == sorted(trained), "the answer is behind the prompt"
    pair = Pair(prompt="is it so?\n", stem="because", answer=" yes")
    assert parts(tokenizer, encode_pair(tokenizer, Config(encoder=False), pair, 100, ends=False)) == ("is it so?\nbecause", " yes")


@pytest.mark.parametrize("length", [4, 7, 12, 20, 40])
def test_a_long_row_keeps_the_end_of_its_prompt_and_half_for_its_answer(tokenizer: Any, length: int) -> None:
    prompt, answer = "is it so? " * 4, "because of that " * 3
    asked, said = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    row = encode_pair(tokenizer, Config(encoder=False), Pair(prompt=prompt, answer=answer), length)
    trained = [label for label in row["labels"] if label != IGNORE]
    read = row["input_ids"][: len(row["input_ids"]) - len(trained)]
    assert len(row["input_ids"]) == len(row["labels"]) == min(length, len(asked) + len(said) + 1)
    assert trained == [*said, tokenizer.eos_token_id][: len(trained)]
    assert read == asked[len(asked) - len(read) :]
    assert len(trained) == min(len(said) + 1, max(length - len(asked), length // 2))


def test_models_that_begin_with_a_token_of_their_own_get_it(tokenizer: Any) -> None:
    from tokenizers import processors

    begins = make_tokenizer("gpt2", iter(["is it so? yes"]), "tiny")
    begins.bos_token = "<|endoftext|>"
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begins.eos_token_id)]
    )
    row = encode_pair(begins, Config(encoder=False), Pair(prompt="is it", answer=" so"), 5)
    assert parts(begins, row) == ("<|endoftext|>is it", " so<|endoftext|>")
    short = encode_pair(begins, Config(encoder=False), Pair(prompt="is it so is it so", answer=" so"), 4)
    assert short["input_ids"][0] == begins.eos_token_id
    assert len(short["input_ids"]) <= 4


def test_an_encoder_reads_the_prompt_and_the_decoder_says_the_rest(tokenizer: Any) -> None:
    config, end = Config(encoder=True), "<|endoftext|>"
    row = encode_pair(tokenizer, config, Pair(prompt="is it so?", answer="yes"), 100)
    assert tokenizer.decode(row["input_ids"]) == f"is it so?{end}"
    assert tokenizer.decode(row["labels"]) == f"yes{end}"
    assert "decoder_input_ids" not in row
    row = encode_pair(tokenizer, config, Pair(prompt="is it so?", stem="because", answer=" yes"), 100, ends=False)
    stem, answer = tokenizer("because")["input_ids"], tokenizer(" yes")["input_ids"]
    assert row["labels"] == [IGNORE] * len(stem) + answer
    assert row["decoder_input_ids"] == [7, *stem, *answer[:-1]]
    cut = encode_pair(tokenizer, config, Pair(prompt="is it so? " * 9, answer="yes " * 9), 6)
    assert (len(cut["input_ids"]), len(cut["labels"]), cut["input_ids"][-1]) == (6, 6, tokenizer.eos_token_id)


@pytest.mark.parametrize("recipe", ["instruct", "cot"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_trained_and_opens_again(data: Path, tmp_path: Path, recipe: str, architecture: str) -> None:
    name = {"instruct": "alpaca", "cot": "strategy"}[recipe]
    made = finetuned.trained(name, data, tmp_path / "model", architecture=architecture)
    found = opened(name, tmp_path / "model")
    assert found.model.config.model_type == architecture
    assert isinstance(found.task, Seq2SeqLM if architecture == "t5" else CausalLM)
    values = measured(found)
    assert torch.equal(values, measured(made))
    assert torch.isfinite(values).all()
    assert (values > 0).all()
    procedure = procedure_of(found)
    assert torch.equal(procedure(range(len(found.train)), SEED), values), "the same start, to the last bit"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_takes_adapters(data: Path, tmp_path: Path, architecture: str) -> None:
    pytest.importorskip("peft")
    recipe = finetuned.trained("alpaca", data, tmp_path / "model", architecture=architecture, lora_rank=2, num_train_epochs=0.3)
    names = [name for name, parameter in recipe.model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    options: dict[str, Any] = {"collate": recipe.collate, "progress": False, "device": "cpu"}
    attributor = whence.Attributor(recipe.model, recipe.task, **options)
    scores = attributor.scores(recipe.queries[:2], recipe.train[:3], strategy="identity").values
    assert len(attributor.coverage.tracked) == len(names)
    parameters = [parameter for parameter in recipe.model.parameters() if parameter.requires_grad]

    def gradient(row: Any) -> torch.Tensor:
        assert recipe.collate is not None
        loss = recipe.task.loss(recipe.model, recipe.collate([row])).sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    wanted = torch.stack([gradient(row) for row in recipe.queries[:2]]) @ torch.stack([gradient(row) for row in recipe.train[:3]]).T
    torch.testing.assert_close(scores.float(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_the_prompt_is_not_trained(data: Path, architecture: str) -> None:
    """The loss of a row is the sum over its answer, whatever batch it is in."""
    family, settled = FAMILIES["instruct"], FAMILIES["instruct"].settled(DataSettings(data=str(data), max_length=48))
    from whence.recipes.splits import collate_of, read_splits, read_train, task_of
    from whence.recipes.start import make_start

    training = TrainingSettings(preset="tiny", architecture=architecture)
    model, tokenizer = make_start(family, read_train(family, settled), settled, training)
    model.eval()
    train, _ = read_splits(family, settled, tokenizer, model.config, 1)
    rows, collate, task = train.encoded[:4], collate_of(family, model, tokenizer), task_of(family, settled, model.config)
    together = task.loss(model, collate(rows))
    for row, value in zip(rows, together, strict=True):
        inputs = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        count = sum(label != IGNORE for label in row["labels"])
        torch.testing.assert_close(model(**inputs).loss * count, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_opens_again_and_asks(checkpoint: Checkpoint, name: str) -> None:
    recipe = opened(name, checkpoint(name))
    assert recipe.name == f"{finetuned.SETTINGS[name][0]}-{name}"
    assert recipe.raw is not None
    assert len(recipe.raw) == len(recipe.train) == finetuned.TRAIN
    assert recipe.encode is not None
    asked = recipe.encode(recipe.raw[1])
    assert (asked["input_ids"], asked["labels"]) == (recipe.train[1]["input_ids"], recipe.train[1]["labels"])
    assert recipe.ask is not None
    assert "labels" not in recipe.ask("The film is good, is it?")
    assert recipe.generate is not None
    assert recipe.generate("The film")["labels"][0] == IGNORE
    with pytest.raises(DataError, match=r"^the row has"):
        recipe.encode({"word": "a"})


def test_a_model_with_an_encoder_is_asked_about_rows_alone(data: Path, tmp_path: Path) -> None:
    recipe = finetuned.trained("alpaca", data, tmp_path / "model", architecture="t5", num_train_epochs=0.3)
    assert recipe.generate is None
    assert recipe.tokens is None, "tokens of the prompt are not those of the answer"
    assert recipe.ask is not None
    with pytest.raises(DataError, match=r"the row has the columns text; expected instruction and output"):
        recipe.ask("good")


# ------------------------------------------------------------------------------------------- groups


def test_the_group_of_every_row(checkpoint: Checkpoint) -> None:
    alpaca, flan = opened("alpaca", checkpoint("alpaca")), opened("flan", checkpoint("flan"))
    assert alpaca.groups == [row["skill"] for row in finetuned.rows_of("alpaca", "train")]
    assert flan.query_groups == [row["_task_name"] for row in finetuned.rows_of("flan_cot", "validation")]
    strategy = opened("strategy", checkpoint("strategy"))
    assert strategy.groups is None
    other = opened("strategy", checkpoint("strategy"), group="answer")
    assert set(other.groups or ()) == {"True", "False"}
    assert opened("flan", checkpoint("flan"), group="_task_source").groups == ["CoT"] * finetuned.TRAIN
    glue = opened("sst2", checkpoint("sst2"), group="idx")
    assert glue.groups is not None
    assert glue.groups[3] == "3"


def test_a_group_that_is_not_there() -> None:
    full = [{"kind": "a"}]
    with pytest.raises(DataError, match=r"training row 1 has no 'kind', which says the group; it has text\. Name one with --group\."):
        row_groups([*full, {"text": "b", "kind": None}], full, "kind")
    with pytest.raises(DataError, match=r"query row 0 has no 'kind'"):
        row_groups(full, [{"text": "b"}], "kind")
    assert row_groups(full, full, "kind") == (["a"], ["a"])
    assert row_groups([{"text": "b"}], [{"text": "b"}], None) is None


def test_a_usual_column_counts_where_all_rows_have_it() -> None:
    whole, gap = [{"source": "a", "task": "b"}], [{"source": None, "task": "c"}]
    assert row_groups(whole, whole, None) == (["b"], ["b"])
    task = [{"task": "x", "category": "y"}, {"task": None, "category": "z"}]
    assert row_groups(task, [{"category": "q"}], None) == (["y", "z"], ["q"])
    assert row_groups(whole, gap, None) == (["b"], ["c"])
    assert row_groups([{"source": "a"}], gap[:1], None) is None


def test_rows_of_which_some_have_no_group_are_trained_on(tmp_path: Path) -> None:
    rows = [{"instruction": "Do.", "output": "Done.", "category": None if place == 3 else "a"} for place in range(6)]
    folder = Path(finetuned.own(tmp_path / "data", rows, rows[:2]))
    settings, small = DataSettings(data=str(folder)), TrainingSettings(preset="tiny", num_train_epochs=1)
    recipe = train_recipe(FAMILIES["instruct"], tmp_path / "model", data=settings, training=small, snapshots=0)
    assert recipe.groups is None
    assert recipe.query_groups is None
    with pytest.raises(DataError, match=r"training row 3 has no 'category'"):
        train_recipe(FAMILIES["instruct"], tmp_path / "other", data=replace(settings, group="category"), training=small)
    assert not (tmp_path / "other").exists(), "found before anything is trained"


# --------------------------------------------------------------------------------- forms of a row


FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "alpaca": (
        {"instruction": "Do.", "input": "it", "output": "Done."},
        "### Instruction:\nDo.\n\n### Input:\nit\n\n### Response:\n",
        "Done.",
    ),
    "no input": ({"instruction": "Do.", "input": "", "output": "Done."}, "### Instruction:\nDo.\n\n### Response:\n", "Done."),
    "flan": ({"inputs": "Why?", "targets": "So."}, "Why?\n", "So."),
    "flan with a line end": ({"inputs": "Why?\n", "targets": "So."}, "Why?\n", "So."),
    "flan with a colon": ({"inputs": "A: ", "targets": "So."}, "A: ", "So."),
    "completion": ({"prompt": "Why?", "completion": "So."}, "Why?\n", "So."),
    "chat": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "So"}]},
        "<|user|>\nHi\n<|assistant|>\n",
        "Ho",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_tell_the_form(form: str) -> None:
    row, prompt, answer = FORMS[form]
    pair = FAMILIES["instruct"].pair(row, 0, DataSettings())  # type: ignore[attr-defined]
    assert (pair.prompt, pair.answer) == (prompt, answer)


def test_two_columns_of_ones_own(tmp_path: Path) -> None:
    rows = [{"ask": "Why?", "say": "So.", "instruction": "not this"}] * 3
    _, tokenizer, train, _, _ = started("instruct", data=own(tmp_path, rows, rows), columns=("ask", "say"))
    assert parts(tokenizer, train.encoded[0]) == ("Why?\n", "So.<|endoftext|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"word": "a"},
            r"row 3 has the columns word; expected instruction and output, inputs and targets, prompt and completion, or messages",
        ),
        ({"instruction": "a"}, r"row 3 has no text in 'output'; it has the columns instruction\."),
        ({"instruction": "a", "output": 5}, r"row 3 has no text in 'output'; it has 5 there\."),
        ({"inputs": None, "targets": "a"}, r"row 3 has no text in 'inputs'; it has None there\."),
        ({"messages": "hi"}, r"row 3: its messages have no answer of the role 'assistant'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, r"row 3: its messages have no answer of the role 'assistant' to anything\."),
        ({"messages": [{"role": "user"}]}, r"row 3: its messages are no list of objects with role and content, both text\."),
    ],
)
def test_rows_that_are_no_instruction(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FAMILIES["instruct"].pair(row, 3, DataSettings())  # type: ignore[attr-defined]


@pytest.mark.parametrize("recipe", ["instruct", "cot"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("text",)}, r"columns"),
        ({"flip": 0.1}, r"flip replaces labels, and an answer is none\. Leave --flip out\."),
        ({"label": "x"}, r"label='x' names a column of labels, and an answer is none"),
        ({"measurement": "margin"}, r"measurement='margin' is for classifiers; choose loss or log_odds\."),
    ],
)
def test_what_is_refused(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES[recipe].settled(DataSettings(**options))


@pytest.mark.parametrize(
    ("name", "architecture", "choose"), [("sst2", "gpt2", "bert"), ("alpaca", "bloom", "gpt2 or llama or gpt_neo or t5")]
)
def test_an_architecture_that_is_none(data: Path, tmp_path: Path, name: str, architecture: str, choose: str) -> None:
    with pytest.raises(ConfigError, match=rf"architecture='{architecture}' is no small model of the recipe \w+; choose {choose}\."):
        finetuned.trained(name, data, tmp_path / "model", architecture=architecture)
    with pytest.raises(ConfigError, match=r"architecture='t5' is of a small random model, and none is asked for\. Give preset too\."):
        TrainingSettings(model="x", architecture="t5")


def test_another_task_is_a_folder_or_a_name(data: Path) -> None:
    for recipe in ("instruct", "cot"):
        source = FAMILIES[recipe].source(FAMILIES[recipe].settled(DataSettings(task="mine")))
        assert (source.folder, source.hub) == ("mine", "mine")
