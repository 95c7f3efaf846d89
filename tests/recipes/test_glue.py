"""What glue makes of rows under the hub's names and of one's own, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from finetuned import measured_rows, own, started
from whence.errors import ConfigError, DataError
from whence.recipes.base import load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.glue import TASKS, Glue
from whence.recipes.settings import DataSettings
from whence.recipes.splits import read_splits

pytest.importorskip("transformers")


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
    values = measured_rows("glue", model, tokenizer, train.encoded[:5], settled)
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
    assert measured_rows("glue", model, tokenizer, rows.encoded, settled).shape == (8,)
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
