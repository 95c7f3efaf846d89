"""Questions with a chain of thought: rows, options, and whether answers are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finetuned
from finetuned import Checkpoint, opened, own, procedure_of, started
from whence.errors import ConfigError, DataError
from whence.recipes.answers import option_losses, parse_answer, right_by_losses, right_by_saying, right_options, said_answers, says
from whence.recipes.base import Options
from whence.recipes.cot import ChainOfThought
from whence.recipes.quality import quality
from whence.recipes.rows import read_split
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.refit.predict import chosen
from whence.tasks.likelihoods import IGNORE

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
COT = ChainOfThought()
STRATEGY = {"qid": "q1", "question": "Is it?", "answer": False, "rationale": "Because. "}
COMMON = {"id": "c1", "question": "Which?", "choices": {"label": ["A", "B"], "text": ["sea", "sun"]}, "answerKey": "B", "rationale": "Hot."}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (STRATEGY, "Is it?\n", "Because.\nThe answer is no."),
        (COMMON, "Which?\nOptions:\n- sea\n- sun\n", "Hot.\nThe answer is sun."),
        ({**COMMON, "choices": ["sea", "sun"], "answerKey": "sun"}, "Which?\nOptions:\n- sea\n- sun\n", "Hot.\nThe answer is sun."),
        ({**COMMON, "choices": ["sea", "sun"], "answerKey": 0}, "Which?\nOptions:\n- sea\n- sun\n", "Hot.\nThe answer is sea."),
        ({"question": "How many?", "answer": 3, "facts": ["One.", "Two."]}, "How many?\n", "One. Two.\nThe answer is 3."),
    ],
)
def test_prompt_and_answer(row: Any, prompt: str, answer: str) -> None:
    pair = COT.pair(row, 0, DataSettings())
    assert (pair.prompt, pair.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"word": "a"}, r"row 2 has no answer; it has the columns word\. Expected question, rationale"),
        ({**STRATEGY, "question": None}, r"row 2 has no text in 'question'"),
        ({**STRATEGY, "rationale": None}, r"row 2 has no rationale, so that there is no chain of thought to be trained\."),
        ({**COMMON, "answerKey": "F"}, r"row 2 has the answer 'F', which is none of its choices \(A, B\)\."),
        ({**COMMON, "choices": "sea"}, r"row 2: its choices are 'sea'; give a list of texts"),
        ({**COMMON, "choices": {"label": ["A"], "text": ["a", "b"]}}, r"row 2: its choices are \{'label'"),
    ],
)
def test_rows_that_are_no_question(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        COT.pair(row, 2, DataSettings())


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["1", "2", "3"], {"answer": "2"}, "2"),  # a text
        (["1", "2", "3"], {"answer": 2}, "3"),  # a place
        (["sea", "sun"], {"answer": "1"}, "sun"),
        (["sea", "True"], {"answer": True}, "True"),
        ([1, 2, 3], {"answer": "2"}, "2"),
        ({"label": ["1", "2"], "text": ["2", "5"]}, {"answerKey": "2"}, "5"),  # a label, as the column says
        ({"label": ["1", "2"], "text": ["2", "5"]}, {"answer": "5"}, "5"),
        ([1, 2, 3], {"answer": 2}, None),
        ({"label": ["1", "2"], "text": ["2", "5"]}, {"answer": "2"}, None),
        (["sea", "sun"], {"answer": True}, None),
        (["sea", "sun"], {"answer": 2}, None),
    ],
)
def test_a_choice_by_its_text_label_or_place(choices: Any, answer: dict[str, Any], expected: str | None) -> None:
    row = {"question": "Which?", "choices": choices, "rationale": "So.", **answer}
    if expected is None:
        with pytest.raises(DataError, match=r"row 0 has the answer .*, which is (none of its choices|a choice's text and another's)"):
            COT.pair(row, 0, DataSettings())
    else:
        assert (COT.pair(row, 0, DataSettings()).more or {})["answer"] == expected


def test_every_rationale_is_a_training_row(tmp_path: Path) -> None:
    rows = [{**STRATEGY, "rationale": ["One.", "Two.", "Three."]}, {**STRATEGY, "qid": "q2"}]
    _, _, train, queries, _ = started("cot", data=own(tmp_path, rows, rows))
    assert [row["question"] for row in train.encoded] == ["q1", "q1", "q1", "q2"]
    assert [row["text"].split("\n")[1] for row in train.encoded] == ["One.", "Two.", "Three.", "Because."]
    assert len(train.raw) == 4, "raw rows stand beside training rows"
    assert [row["question"] for row in queries.encoded] == ["q1", "q2"], "a query is a question"
    assert queries.encoded[0]["answer"] == "no"
    nameless = [{key: value for key, value in row.items() if key != "qid"} for row in rows]
    _, _, train, _, _ = started("cot", data=own(tmp_path, nameless, nameless))
    assert [row["question"] for row in train.encoded] == ["0", "0", "0", "1"]


def test_queries_are_not_of_the_test_split(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert opened("strategy", checkpoint("strategy")).query_split == "validation"
    source = COT.source(COT.settled(DataSettings()))
    assert (source.train, source.validation) == ("train[:90%]", "train[90%:]")
    finetuned.write_lines(tmp_path / "train.jsonl", [STRATEGY])
    finetuned.write_lines(tmp_path / "test.jsonl", [STRATEGY])
    with pytest.raises(ConfigError, match=r"has no 'validation' file"):
        read_split(source, str(tmp_path), "validation")


@pytest.mark.parametrize("name", ["strategy", "commonsense"])
def test_options_are_the_prompt_with_each_answer(checkpoint: Checkpoint, name: str) -> None:
    recipe = opened(name, checkpoint(name))
    options = recipe.options
    assert isinstance(options, Options)
    each = 2 if name == "strategy" else 3
    count = len(recipe.queries)
    assert options.query.tolist() == [query for query in range(count) for _ in range(each)]
    assert options.query.dtype == torch.int64
    assert options.gold.dtype == torch.bool
    assert options.gold.view(count, each).sum(1).tolist() == [1] * count
    for row, number, gold in zip(options.rows, options.query.tolist(), options.gold.tolist(), strict=True):
        query = recipe.queries[number]
        prompt, _, answer = row["text"].rpartition("The answer is ")
        assert query["text"].startswith(prompt)
        assert (answer == query["answer"]) == gold
        trained = [label for label in row["labels"] if label != IGNORE]
        assert 0 < len(trained) == len(row["labels"]) - len([label for label in row["labels"] if label == IGNORE])
        assert row["input_ids"][-len(trained) :] == trained
    assert opened("alpaca", checkpoint("alpaca")).options is None


def test_free_answers_have_no_options(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "3", "rationale": "One, two."}]
    model, tokenizer, _, queries, settled = started("cot", data=own(tmp_path, rows, rows))
    assert COT.options(tokenizer, model.config, queries.raw, settled) is None


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_option_losses_are_those_of_one_row_at_a_time(data: Path, tmp_path: Path, architecture: str) -> None:
    """Against the model's own loss, a mean over trained tokens; what the decoder reads is written out by hand."""
    recipe = finetuned.trained("commonsense", data, tmp_path / "model", architecture=architecture)
    assert recipe.options is not None
    assert recipe.collate is not None
    found = option_losses(recipe.model, recipe.options, recipe.collate)
    for row, value in zip(recipe.options.rows, found, strict=True):
        names = ("input_ids", "labels", "decoder_input_ids")
        with torch.no_grad():
            own = recipe.model(**{name: torch.tensor([row[name]]) for name in names if name in row}).loss
        assert float(value) == pytest.approx(float(own), rel=1e-4)
    right = right_options(recipe)
    for number in range(len(recipe.queries)):
        mine = recipe.options.query == number
        assert bool(right[number]) == bool(recipe.options.gold[mine][found[mine].argmin()])
    assert quality(recipe)["option_accuracy"] == pytest.approx(float(right.double().mean()))


def test_retraining_measures_options_too(data: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    pytest.importorskip("peft")
    recipe = finetuned.trained("strategy", data, tmp_path / "model", lora_rank=2)
    assert recipe.options is not None
    assert recipe.collate is not None
    plain, both = procedure_of(recipe), replace(procedure_of(recipe), with_options=True)
    assert plain.key != both.key
    every = range(len(recipe.train))
    found = both(every, TrainingSettings().seed)
    wanted = torch.cat([finetuned.measured(recipe), option_losses(recipe.model, recipe.options, recipe.collate)])
    assert torch.equal(found, wanted)
    assert torch.equal(plain(every, TrainingSettings().seed), found[: len(recipe.queries)])
    with pytest.raises(ConfigError, match=r"choose from no options; leave it out\."):
        replace(procedure_of(opened("alpaca", checkpoint("alpaca"))), with_options=True)([0, 1], 1)


def test_the_least_loss_is_preferred_and_a_tie_has_its_share() -> None:
    """As `Predictions` have it, so that estimates and real models are compared by one measure."""
    query, gold = torch.tensor([0, 0, 1, 1, 1, 2, 2]), torch.tensor([True, False, False, True, False, True, False])
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    found = right_by_losses(losses, Options(rows=[{}] * 7, query=query, gold=gold))
    assert found.tolist() == [1.0, 0.0, 0.5]
    assert torch.equal(found, chosen(losses.double(), query, gold, "accuracy"))


def test_recipes_without_options(checkpoint: Checkpoint) -> None:
    recipe = opened("alpaca", checkpoint("alpaca"))
    with pytest.raises(ConfigError, match=r"choose from no options; take a recipe that has some, such as cot\."):
        right_options(recipe)
    with pytest.raises(ConfigError, match=r"have no answer to compare with; take a recipe that has, such as cot\."):
        right_by_saying(recipe, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Because.\nThe answer is no.", "no"),
        ("the ANSWER is: Yes", "yes"),
        ("The answer is no. The end\nThe answer is  the  Sea.", "the sea"),
        ("The answer is (B).\nand more", "(b)"),
        ("The answer is .", None),
        ("The answer is no, or perhaps the answer is yes.", "yes"),
        ("The answer is no. That is why.", "no"),
        ("The answer is 3.5. Or so", "3.5"),
        ("The answer is yes!", "yes"),
        ("The answer isn't known.", None),
        ("no", None),
    ],
)
def test_what_a_text_says_its_answer_is(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("The answer is no. That is why.", "no", True),
        ("The answer is not known.", "no", False),
        ("The answer is St. Ives. It is.", "St. Ives", True),
        ("The answer is St. Ives.", "St. Paul", False),
        ("The answer is 3.5.", "3", False),
        ("The answer is yes. The answer is no", "yes", False),
        ("no", "no", False),
    ],
)
def test_whether_a_text_gives_the_answer(text: str, answer: str, expected: bool) -> None:
    assert says(text, answer) == expected


def test_questions_without_a_rationale(tmp_path: Path) -> None:
    """They cannot be trained, which is said, but they can be asked."""
    rows = [{**STRATEGY, "rationale": ["One."]}, {**STRATEGY, "qid": "q2", "rationale": []}]
    with pytest.warns(UserWarning, match=r"1 of 2 questions has no rationale, and is left out of training"):
        _, _, train, queries, _ = started("cot", data=own(tmp_path, rows, rows))
    assert [row["question"] for row in train.encoded] == ["q1"]
    assert [row["question"] for row in queries.encoded] == ["q1", "q2"]
    assert queries.encoded[1]["text"] == "Is it?\nThe answer is no."


def answering(recipe: Any, said: list[int]) -> Any:
    """A model that goes on with these tokens, whatever it reads."""

    def generate(*, input_ids: Tensor, max_new_tokens: int, **others: Any) -> Tensor:
        new = torch.tensor([said[:max_new_tokens]])
        start = input_ids if not recipe.model.config.is_encoder_decoder else torch.zeros(1, 1, dtype=torch.int64)
        return torch.cat([start, new], 1)

    return generate


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_accuracy_by_what_the_model_says(data: Path, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    recipe = finetuned.trained("strategy", data, tmp_path / "model", architecture=architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    real = said_answers(recipe, tokenizer, new_tokens=4, rows=recipe.queries[:2])
    assert len(real) == 2
    assert right_by_saying(recipe, tokenizer, new_tokens=4).dtype == torch.bool
    said = tokenizer("So it is.\nThe answer is yes.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    monkeypatch.setattr(recipe.model, "generate", answering(recipe, said))
    expected = [row["answer"] == "yes" for row in recipe.queries]
    assert any(expected)
    assert not all(expected)
    # The prompt of a row may leave less room than the answer takes.
    rows = [row for row in recipe.queries if architecture == "t5" or 48 - len(row["input_ids"]) >= 0]
    found = right_by_saying(recipe, tokenizer, rows=rows)
    assert found.tolist() == expected


def test_generation_is_greedy_and_stops(data: Path, tmp_path: Path) -> None:
    """Against a loop that takes the likeliest token of the whole text so far."""
    transformers = pytest.importorskip("transformers")
    recipe = finetuned.trained("strategy", data, tmp_path / "model", num_train_epochs=6, learning_rate=5e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    from whence.recipes.answers import prompt_of

    row = recipe.queries[0]
    ids = prompt_of(row)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(recipe.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    wanted = tokenizer.decode(ids[len(prompt_of(row)) :], skip_special_tokens=True)
    assert said_answers(recipe, tokenizer, rows=[row], new_tokens=12) == [wanted]
