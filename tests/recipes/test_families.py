"""What glue, swag and wikitext make of rows under the hub's names and of one's own, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from whence.errors import ConfigError, DataError
from whence.recipes.base import Recipe, load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.glue import TASKS, Glue
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.recipes.splits import Split, collate_of, read_splits, read_train, task_of
from whence.recipes.start import make_start
from whence.recipes.swag import Swag
from whence.recipes.training import measure
from whence.recipes.wikitext import WikiText

pytest.importorskip("transformers")
TINY = TrainingSettings(preset="tiny")


def started(recipe: str, **data: Any) -> tuple[Any, Any, Split, Split, DataSettings]:
    """Return an untrained model, its tokenizer, training rows, queries and the settings."""
    family = FAMILIES[recipe]
    settled = family.settled(DataSettings(**data))
    model, tokenizer = make_start(family, read_train(family, settled), settled, TINY)
    train, queries = read_splits(family, settled, tokenizer, model.config, seed=1)
    return model.eval(), tokenizer, train, queries, settled


def measured(recipe: str, model: Any, tokenizer: Any, rows: list[Any], settled: DataSettings) -> torch.Tensor:
    family = FAMILIES[recipe]
    return measure(model, task_of(family, settled), rows, collate_of(family, model, tokenizer), 4)


def own(folder: Path, train: list[Any], validation: list[Any]) -> str:
    finetuned.write_lines(folder / "train.jsonl", train)
    finetuned.write_lines(folder / "validation.jsonl", validation)
    return str(folder)


# --------------------------------------------------------------------------------------------- glue


def test_the_tasks_are_those_of_the_data() -> None:
    assert set(TASKS) == set(finetuned.GLUE)
    assert {name: task.columns for name, task in TASKS.items()} == {name: columns for name, (columns, _) in finetuned.GLUE.items()}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_of_glue_under_the_names_of_the_hub(data: Path, task: str) -> None:
    columns, classes = finetuned.GLUE[task]
    model, tokenizer, train, queries, settled = started("glue", task=task, data=str(data), max_length=24)
    raw = finetuned.rows_of(f"glue_{task}", "train")
    assert train.raw == raw
    assert train.flipped is None
    assert [row["labels"] for row in train.encoded] == [row["label"] for row in raw]
    assert len(queries.encoded) == finetuned.VALIDATION
    first = train.encoded[0]
    assert tokenizer.decode(first["input_ids"], skip_special_tokens=True) == "".join(raw[0][name] for name in columns)
    assert first["text"].splitlines()[:-1] == [f"{name}: {raw[0][name]}" for name in columns]
    if classes:
        assert model.config.num_labels == classes == len(TASKS[task].classes)
        assert model.config.id2label[0] == TASKS[task].classes[0]
        assert first["text"].endswith(f"label: {raw[0]['label']} ({TASKS[task].classes[raw[0]['label']]})")
        assert settled.measurement == "margin"
    else:
        assert model.config.num_labels == 1
        assert model.config.problem_type == "regression"
        assert {row["labels"] for row in train.encoded} == {1.0, 3.5}
        assert first["text"].splitlines()[-1] in {"label: 1", "label: 3.5"}
        assert settled.measurement == "loss"
    values = measured("glue", model, tokenizer, train.encoded[:5], settled)
    assert values.shape == (5,)
    assert torch.isfinite(values).all()


def test_queries_of_mnli_are_the_matched_ones() -> None:
    source = Glue().source(DataSettings(task="mnli"))
    assert (source.hub, source.config, source.validation, source.folder) == ("nyu-mll/glue", "mnli", "validation_matched", "glue_mnli")
    assert Glue().source(DataSettings(task="rte")).validation == "validation"


def test_a_regression_is_trained_and_measured_by_half_squares(checkpoint: Callable[[str], Path]) -> None:
    recipe = load_recipe("glue", checkpoint_dir=checkpoint("stsb"))
    assert recipe.classes is None
    rows = recipe.queries[:3]
    batch = recipe.collate(rows)  # type: ignore[misc]
    assert batch["labels"].is_floating_point()
    with torch.no_grad():
        logits = recipe.model(**{name: value for name, value in batch.items() if name != "labels"}).logits.squeeze(1)
    expected = 0.5 * (logits - torch.tensor([row["labels"] for row in rows])) ** 2
    torch.testing.assert_close(recipe.task.measurement(recipe.model, batch), expected)


def test_own_columns_with_labels_in_words(tmp_path: Path) -> None:
    train = [{"words": finetuned.sentence(finetuned.random.Random(n), n % 3 == 0), "kind": ["ash", "oak", "elm"][n % 3]} for n in range(12)]
    folder = own(tmp_path, train, train[:4])
    model, _, rows, queries, settled = started("glue", data=folder, columns=("words",), label="kind", max_length=16)
    assert settled.columns == ("words",)
    assert model.config.id2label == {0: "ash", 1: "elm", 2: "oak"}
    assert [row["labels"] for row in rows.encoded[:3]] == [0, 2, 1]
    assert queries.encoded[1]["text"] == f"words: {train[1]['words']}\nkind: 2 (oak)"


def test_own_columns_with_numbers_as_labels(tmp_path: Path) -> None:
    train = [{"a": "one two", "b": f"three {n}", "label": n % 3} for n in range(9)]
    model, _, rows, _, settled = started("glue", data=own(tmp_path, train, train), columns=("a", "b"))
    assert settled.label == "label"
    assert model.config.num_labels == 3
    assert [row["labels"] for row in rows.encoded] == [0, 1, 2] * 3
    assert "token_type_ids" not in rows.encoded[0] or max(rows.encoded[0]["token_type_ids"]) == 1


def test_own_data_may_have_the_column_of_a_task(tmp_path: Path) -> None:
    """`--columns sentence` is data of one's own, though sst2 has a column of that name."""
    train = [{"sentence": f"word {n}", "label": ["ash", "oak", "elm"][n % 3]} for n in range(9)]
    model, *_ = started("glue", data=own(tmp_path, train, train), columns=("sentence",))
    assert set(model.config.label2id) == {"ash", "oak", "elm"}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-1, r"row 1 has the label -1; labels are whole numbers from 0, or all of them text, or true and false\."),
        (0.5, r"row 1 has the label 0\.5; labels are whole numbers from 0, or all of them text, or true and false\."),
        (True, r"row 1 has the label True; labels are whole numbers from 0, or all of them text, or true and false\."),
        (None, r"training data: row 1 has no 'kind'; it has a null there"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, label: Any, message: str) -> None:
    train = [{"words": "a b", "kind": value} for value in (0, label, 1)]
    # JSON lines would refuse a column of two types; these rows are not read from a file.
    with pytest.raises(DataError, match=message):
        Glue().head(train, Glue().settled(DataSettings(columns=("words",), label="kind", data=str(tmp_path))))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_labels_that_are_true_or_false(tmp_path: Path, form: str) -> None:
    train = [{"words": f"word {n}", "good": n % 3 == 0} for n in range(8)]
    for split in ("train", "validation"):
        finetuned.write_lines(tmp_path / f"{split}.jsonl", train)
        if form == "csv":
            (tmp_path / f"{split}.jsonl").unlink()
            lines = [f"{row['words']},{row['good']}\n" for row in train]
            (tmp_path / f"{split}.csv").write_text("".join(["words,good\n", *lines]), encoding="utf-8")
    options: dict[str, Any] = {"data": str(tmp_path), "columns": ("words",), "label": "good", "max_length": 16}
    model, tokenizer, rows, queries, settled = started("glue", **options)
    assert model.config.id2label == {0: "False", 1: "True"}
    assert [row["labels"] for row in rows.encoded] == [1, 0, 0, 1, 0, 0, 1, 0]
    assert {type(row["labels"]) for row in rows.encoded} == {int}
    assert queries.encoded[0]["text"] == "words: word 0\ngood: 1 (True)"
    assert measured("glue", model, tokenizer, rows.encoded, settled).shape == (8,)
    flipped = read_splits(FAMILIES["glue"], replace(settled, flip=0.5), tokenizer, model.config, seed=1)[0]
    assert [row["labels"] != first["labels"] for row, first in zip(flipped.encoded, rows.encoded, strict=True)] == flipped.flipped.tolist()  # type: ignore[union-attr]


def test_true_is_no_class_of_three(tmp_path: Path) -> None:
    train = [{"words": "a b", "label": n} for n in range(3)]
    folder = own(tmp_path, train, [{"words": "a b", "label": True}])
    with pytest.raises(DataError, match=r"row 0 has the label True; the model's 3 classes are 0 to 2 \(0, 1, 2\)\."):
        started("glue", data=folder, columns=("words",))


def test_a_query_of_a_class_that_the_model_does_not_have(tmp_path: Path) -> None:
    train = [{"words": "a b", "label": ["yes", "no"][n % 2]} for n in range(4)]
    folder = own(tmp_path, train, [{"words": "a b", "label": "perhaps"}])
    with pytest.raises(DataError, match=r"row 0 has the label 'perhaps'; the model's 2 classes are 0 to 1 \(no, yes\)\."):
        started("glue", data=folder, columns=("words",))


def test_a_missing_column_is_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 has no 'words'; it has the columns sentence, label, idx\. Name the columns with --columns"):
        started("glue", data=str(data), columns=("words",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sts2"}, r"--task sts2 is none of GLUE's; choose cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli, or give data"),
        ({"task": "stsb", "flip": 0.1}, r"flip replaces classes, and stsb predicts a number\. Choose another task\."),
        ({"task": "stsb", "measurement": "margin"}, r"measurement='margin' is not for stsb; choose loss\."),
        ({"measurement": "log_odds"}, r"measurement='log_odds' is not for sst2; choose loss or margin\."),
    ],
)
def test_what_glue_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Glue().settled(DataSettings(**options))


@pytest.mark.parametrize("task", TASKS)
def test_settings_that_were_filled_in_stay_as_they_are(task: str) -> None:
    once = Glue().settled(DataSettings(task=task))
    assert Glue().settled(once) == once
    if task == "stsb":
        for change in ({"flip": 0.1}, {"measurement": "margin"}):
            with pytest.raises(ConfigError, match="stsb"):
                Glue().settled(replace(once, **change))


def test_columns_may_be_a_list() -> None:
    settings = DataSettings(columns=["a", "b"])  # type: ignore[arg-type]
    assert settings == DataSettings(columns=("a", "b"))
    assert hash(settings) == hash(DataSettings(columns=("a", "b")))


# --------------------------------------------------------------------------------------------- swag


def test_swag_under_the_names_of_the_hub(data: Path) -> None:
    model, tokenizer, train, _, settled = started("swag", data=str(data), max_length=32)
    raw = finetuned.rows_of("swag", "train")
    assert [row["labels"] for row in train.encoded] == [row["label"] for row in raw]
    for row, first in zip(train.encoded, raw, strict=True):
        assert len(row["input_ids"]) == 4
        assert len({len(ids) for ids in row["input_ids"]}) == 1, "a rectangle"
        for place, (ids, mask) in enumerate(zip(row["input_ids"], row["attention_mask"], strict=True)):
            real = [token for token, kept in zip(ids, mask, strict=True) if kept]
            assert tokenizer.decode(real, skip_special_tokens=True) == f"{first['sent1']}{first['sent2']} {first[f'ending{place}']}"
            assert {token for token, kept in zip(ids, mask, strict=True) if not kept} <= {tokenizer.pad_token_id}
    text = train.encoded[0]["text"].splitlines()
    assert text[0] == raw[0]["sent1"]
    assert text[1 + raw[0]["label"]] == f"* {raw[0]['label']}: It {raw[0]['ending' + str(raw[0]['label'])]}"
    assert sum(line.startswith("*") for line in text) == 1
    assert measured("swag", model, tokenizer, train.encoded[:5], settled).shape == (5,)


def test_hellaswag_under_the_names_of_the_hub(data: Path) -> None:
    model, tokenizer, train, queries, settled = started("swag", task="hellaswag", data=str(data), max_length=32)
    raw = finetuned.rows_of("hellaswag", "train")
    assert [row["labels"] for row in train.encoded] == [int(row["label"]) for row in raw]
    for number in (0, 1):  # without and with the start of a sentence
        first = tokenizer.decode(train.encoded[number]["input_ids"][0], skip_special_tokens=True)
        assert first == f"{raw[number]['ctx_a']}{raw[number]['ctx_b']}{' ' if number else ''}{raw[number]['endings'][0]}"
    assert FAMILIES["swag"].source(settled).hub == "Rowan/hellaswag"
    assert measured("swag", model, tokenizer, queries.encoded[:2], settled).shape == (2,)


def test_hellaswag_with_the_columns_of_swag(tmp_path: Path) -> None:
    rows = finetuned.rows_of("swag", "train")[:6]
    _, _, train, _, _ = started("swag", task="hellaswag", data=own(tmp_path, rows, rows))
    _, _, same, _, _ = started("swag", task="swag", data=own(tmp_path, rows, rows))
    assert train.encoded == same.encoded


def test_the_margin_of_a_choice_is_not_changed_by_padding(data: Path) -> None:
    """Rows of one batch are padded to the longest ending of all."""
    model, tokenizer, train, _, settled = started("swag", data=str(data), max_length=32)
    together = measured("swag", model, tokenizer, train.encoded[:4], settled)
    alone = torch.cat([measured("swag", model, tokenizer, [row], settled) for row in train.encoded[:4]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 4}, r"row 0 has the label 4; give the number of the right ending, 0 to 3\."),
        ({"label": "b"}, r"row 0 has the label 'b'; give the number of the right ending, 0 to 3\."),
        ({"label": True}, r"row 0 has the label True;"),
        ({"label": None}, r"row 0 has no 'label'"),
        ({"sent1": None}, r"a row has the columns .*sent1.*; expected sent1, sent2, ending0, ending1, \.\.\. and label\."),
    ],
)
def test_rows_of_swag_that_are_none(data: Path, change: dict[str, Any], message: str) -> None:
    model, tokenizer, _, _, settled = started("swag", data=str(data))
    row = finetuned.rows_of("swag", "train")[0] | change
    with pytest.raises(DataError, match=message):
        Swag().encode(tokenizer, model.config, [row], settled)


def test_a_choice_needs_two_endings() -> None:
    with pytest.raises(DataError, match=r"a row has 1 endings; give ending0, ending1, \.\.\. or a list in the column endings\."):
        list(Swag().texts([{"sent1": "a", "sent2": "b", "endings": ["c"], "label": 0}], DataSettings()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "swog"}, r"--task swog is not known to swag; choose swag or hellaswag\."),
        ({"columns": ("text",)}, r"leave --columns out\."),
        ({"measurement": "log_odds"}, r"measurement='log_odds' is for language models; choose loss or margin\."),
    ],
)
def test_what_swag_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Swag().settled(DataSettings(**options))


# ----------------------------------------------------------------------------------------- wikitext


def test_text_is_joined_and_cut_and_the_rest_dropped(data: Path) -> None:
    model, tokenizer, train, queries, settled = started("wikitext", data=str(data), max_length=17)
    lines = finetuned.lines_of("train")
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    joined = [token for row in train.encoded for token in row["input_ids"]]
    assert all(len(row["input_ids"]) == 17 for row in train.encoded)
    assert len(train.encoded) == len(tokens) // 17
    assert joined == tokens[: len(joined)]
    assert "".join(row["text"] for row in train.encoded) == "".join(lines)[: len(tokenizer.decode(joined))]
    assert train.raw == [{"text": row["text"]} for row in train.encoded]
    assert len(tokens) % 17, "a case with a rest"
    values = measured("wikitext", model, tokenizer, queries.encoded[:2], settled)
    assert values.shape == (2,)


def test_limits_are_of_blocks(data: Path) -> None:
    options: dict[str, Any] = {"data": str(data), "max_length": 16}
    _, _, every, asked, _ = started("wikitext", **options)
    _, _, train, queries, _ = started("wikitext", **options, max_train_rows=5, max_query_rows=2)
    assert train.encoded == every.encoded[:5]
    assert len(train.raw) == 5
    assert queries.encoded == asked.encoded[:2]


def test_a_block_longer_than_the_model(checkpoint: Callable[[str], Path], data: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_length=17: the model reads 16 tokens at most\. Give --max-length 16 or less\."):
        load_recipe("wikitext", checkpoint_dir=checkpoint("wikitext"), max_length=17)
    shorter = load_recipe("wikitext", checkpoint_dir=checkpoint("wikitext"), max_length=8)
    assert {len(row["input_ids"]) for row in shorter.train} == {8}


def test_too_little_text(tmp_path: Path) -> None:
    folder = own(tmp_path, [{"text": "a b"}], [{"text": "a"}])
    with pytest.raises(DataError, match=r"the text has \d+ tokens, too few for a block of 64\. Give more, or a smaller --max-length\."):
        started("wikitext", data=folder, max_length=64)


def test_text_in_a_column_of_ones_own(tmp_path: Path) -> None:
    rows = [{"story": line, "id": number} for number, line in enumerate(finetuned.lines_of("train"))]
    _, _, train, _, settled = started("wikitext", data=own(tmp_path, rows, rows), columns=("story",), max_length=8)
    assert settled.columns == ("story",)
    assert train.encoded[0]["text"].startswith(rows[0]["story"][:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 0.1}, r"flip replaces labels, and text has none\. Leave --flip out\."),
        ({"measurement": "margin"}, r"measurement='margin' is for classifiers; choose loss or log_odds\."),
        ({"columns": ("a", "b")}, r"a language model's text is in one column\."),
        ({"label": "kind"}, r"label='kind' names a column of labels, and text has none\. Leave --label out\."),
        ({"max_length": 1}, r"max_length=1 leaves nothing to predict; give blocks of 2 tokens or more\."),
    ],
)
def test_what_wikitext_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WikiText().settled(DataSettings(**options))


# ---------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", ["sst2", "swag", "wikitext"])
def test_the_shown_text_has_no_padding(checkpoint: Callable[[str], Path], name: str) -> None:
    recipe: Recipe = load_recipe(finetuned.SETTINGS[name][0], checkpoint_dir=checkpoint(name))
    assert recipe.describe is not None
    for row in [*recipe.train, *recipe.queries]:
        text = recipe.describe(row)
        assert text.strip()
        for token in ("[PAD]", "<pad>", "<|endoftext|>", "[CLS]", "<s>"):
            assert token not in text


@pytest.mark.parametrize("name", ["sst2", "swag", "wikitext"])
def test_fewer_queries_are_the_first_ones(checkpoint: Callable[[str], Path], name: str) -> None:
    recipe, folder = finetuned.SETTINGS[name][0], checkpoint(name)
    every, some = load_recipe(recipe, checkpoint_dir=folder), load_recipe(recipe, checkpoint_dir=folder, max_query_rows=3)
    assert some.queries == every.queries[:3]
    assert some.train == every.train


@pytest.mark.parametrize(("recipe", "task", "longest"), [("glue", "sst2", 16), ("swag", "swag", 16)])
def test_rows_longer_than_the_model_are_refused(data: Path, tmp_path: Path, recipe: str, task: str, longest: int) -> None:
    """Instead of an index error from within the model."""
    name = {"sst2": "sst2", "swag": "swag"}[task]
    finetuned.trained(name, data, tmp_path / "model", settings={"max_length": longest, "flip": None})
    with pytest.raises(
        ConfigError, match=rf"max_length=17: the model reads {longest} tokens at most\. Give --max-length {longest} or less\."
    ):
        load_recipe(recipe, checkpoint_dir=tmp_path / "model", max_length=17)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_setting_is_filled_in(recipe: str) -> None:
    family = FAMILIES[recipe]
    data = family.settled(DataSettings())
    assert None not in (data.task, data.columns if recipe != "swag" else (), data.max_length, data.measurement)
    for preset in (None, "tiny", "small"):
        training = TrainingSettings(preset=preset).over(family.defaults(data, preset))  # type: ignore[arg-type]
        assert (training.model is None) == (preset is not None)
        needed = ("learning_rate", "weight_decay", "num_train_epochs", "train_batch_size", "eval_batch_size")
        assert all(getattr(training, name) is not None for name in needed)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DataSettings, {"max_length": 0}, r"max_length=0 cannot be used; give a whole number of 1 or more\."),
        (DataSettings, {"max_train_rows": True}, r"max_train_rows=True cannot be used"),
        (DataSettings, {"max_query_rows": 2.5}, r"max_query_rows=2\.5 cannot be used"),
        (DataSettings, {"flip": 1.0}, r"flip=1\.0 is no share of the labels; give a number from 0 to below 1\."),
        (DataSettings, {"columns": ("a", "b", "c")}, r"columns=.*: give one or two columns of text, as a list\."),
        (DataSettings, {"columns": "ab"}, r"columns='ab': give one or two columns of text, as a list\."),
        (TrainingSettings, {"model": "m", "preset": "tiny"}, r"model='m' and preset='tiny' are two starts; give one\."),
        (TrainingSettings, {"learning_rate": 0}, r"learning_rate=0 cannot be used; give a positive number\."),
        (TrainingSettings, {"num_train_epochs": float("nan")}, r"num_train_epochs=nan cannot be used; give a positive number\."),
        (TrainingSettings, {"weight_decay": -0.1}, r"weight_decay=-0\.1 cannot be used; give a number from 0\."),
        (TrainingSettings, {"dropout": 1.0}, r"dropout=1\.0 cannot be used; give a number from 0 to below 1\."),
        (TrainingSettings, {"warmup_ratio": 1.5}, r"warmup_ratio=1\.5 cannot be used; give a number from 0 to below 1\."),
    ],
)
def test_settings_that_cannot_be_used(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)
