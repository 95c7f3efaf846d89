"""Which settings a checkpoint folder keeps, and which folders open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from finetuned import Checkpoint, differing, edit, measured, opened, procedure_of, weights
from whence.errors import ConfigError, DataError
from whence.recipes.base import load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.settings import DataSettings, TrainingSettings

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
NAMES = ["sst2", "swag", "wikitext"]
SEED = TrainingSettings().seed


# ------------------------------------------------------------------------------------------ settings


def test_the_share_of_flipped_labels_is_exact_and_found_again(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    raw = finetuned.rows_of("glue_sst2", "train")
    recipe = opened("sst2", checkpoint("sst2"))
    assert recipe.flipped is not None
    assert recipe.flipped.dtype == torch.bool
    assert recipe.flipped.sum() == round(0.25 * len(raw))
    assert recipe.raw is not None
    for row, was, first, flipped in zip(recipe.train, raw, recipe.raw, recipe.flipped.tolist(), strict=True):
        assert (row["labels"] != was["label"]) is flipped
        assert first == {**was, "label": row["labels"]}
    assert torch.equal(recipe.flipped, opened("sst2", checkpoint("sst2")).flipped)  # type: ignore[arg-type]
    other = finetuned.trained("sst2", data, tmp_path / "other", seed=SEED + 1)
    assert other.flipped is not None
    assert not torch.equal(recipe.flipped, other.flipped)
    assert opened("swag", checkpoint("swag")).flipped is None


def test_labels_of_a_choice_can_be_flipped(data: Path, tmp_path: Path) -> None:
    recipe = finetuned.trained("swag", data, tmp_path / "model", settings={"flip": 0.25})
    assert recipe.flipped is not None
    assert recipe.flipped.sum() == 6
    was = [row["label"] for row in finetuned.rows_of("swag", "train")]
    assert [row["labels"] != label for row, label in zip(recipe.train, was, strict=True)] == recipe.flipped.tolist()


def test_settings_are_kept_and_may_be_replaced(checkpoint: Checkpoint) -> None:
    folder = checkpoint("sst2")
    usual = opened("sst2", folder)
    assert usual.task.measure == "margin"  # type: ignore[attr-defined]
    loss = opened("sst2", folder, measurement="loss")
    assert loss.task.measure == "loss"  # type: ignore[attr-defined]
    assert procedure_of(loss).key != procedure_of(usual).key
    assert loss.train == usual.train
    assert len(opened("sst2", folder, max_train_rows=10).train) == 10
    with pytest.raises(ConfigError, match=r"flip=0.0: .* was trained with flip=0.25"):
        opened("sst2", folder, flip=0.0)
    shorter = opened("sst2", folder, max_length=6)
    assert max(len(row["input_ids"]) for row in shorter.train) == 6


def test_the_data_is_found_from_another_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    finetuned.trained("rte", ".", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert len(opened("rte", tmp_path / "model").train) == finetuned.TRAIN
    monkeypatch.setenv("WHENCE_DATA", str(data))
    by_variable = train_recipe(
        FAMILIES["glue"],
        "relative",
        data=DataSettings(task="rte", max_length=32),
        training=TrainingSettings(preset="tiny", num_train_epochs=1, train_batch_size=8),
    )
    assert differing(weights(tmp_path / "model"), weights(tmp_path / "relative")) == set()
    assert procedure_of(by_variable).key == procedure_of(opened("rte", tmp_path / "model")).key


def test_a_start_from_a_pretrained_model(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    """A body that was trained on something else, with a new head."""
    options: dict[str, Any] = {"preset": None, "model": str(checkpoint("sst2")), "learning_rate": 1e-4, "dropout": 0.0}
    recipe = finetuned.trained("stsb", data, tmp_path / "model", settings={"max_length": 16}, **options)
    body, start = weights(checkpoint("sst2")), weights(tmp_path / "model" / "start")
    assert start["classifier.weight"].shape[0] == 1
    assert all(torch.equal(body[name], start[name]) for name in body if not name.startswith("classifier"))
    assert torch.isfinite(measured(recipe)).all()
    assert json.loads((tmp_path / "model" / "whence.json").read_text(encoding="utf-8"))["training"]["learning_rate"] == 1e-4


def test_a_model_that_is_not_there(data: Path, tmp_path: Path) -> None:
    message = (
        r"^the model '.*nowhere' cannot be loaded: .*Give --model FOLDER_OR_NAME of a pretrained model, check the network, or start from"
    )
    with pytest.raises(ConfigError, match=message):
        finetuned.trained("sst2", data, tmp_path / "model", preset=None, model=str(tmp_path / "nowhere"))
    assert not (tmp_path / "model").exists()


def test_rows_that_cannot_be_used_are_no_fault_of_the_model(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 has no 'words'; it has the columns sentence, label, idx"):
        finetuned.trained(
            "sst2", data, tmp_path / "m", settings={"columns": ("words",), "flip": None}, preset=None, model=str(checkpoint("sst2"))
        )


def test_a_schedule_that_the_trainer_does_not_know(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_type='straight' .*linear"):
        finetuned.trained("sst2", data, tmp_path / "model", lr_scheduler_type="straight")


# ------------------------------------------------------------------------------------------- folders


def test_a_training_that_did_not_end(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sst2"), folder)
    (folder / "whence.json").unlink()
    with pytest.raises(ConfigError, match=r"model is of a training that did not end\. Train again: whence train glue --overwrite"):
        opened("sst2", folder)


def test_an_interruption_leaves_no_model_that_opens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    finetuned.trained("rte", data, tmp_path / "model")
    monkeypatch.setattr("whence.recipes.finetune.train_model", interrupted)
    settings = {"data": DataSettings(task="rte", data=str(data)), "training": TrainingSettings(preset="tiny")}
    with pytest.raises(KeyboardInterrupt):
        train_recipe(FAMILIES["glue"], tmp_path / "model", overwrite=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did not end"):
        opened("rte", tmp_path / "model")


def test_a_folder_that_holds_something(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sst2 is not empty\. Give a new folder as --checkpoint-dir, or --overwrite to replace"):
        finetuned.trained("sst2", data, checkpoint("sst2"))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file is not empty"):
        finetuned.trained("sst2", data, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    finetuned.trained("rte", data, tmp_path / "empty")
    before = weights(tmp_path / "empty")
    again = train_recipe(
        FAMILIES["glue"],
        tmp_path / "empty",
        data=DataSettings(task="rte", data=str(data), max_length=32),
        training=TrainingSettings(preset="tiny", num_train_epochs=1, seed=3),
        overwrite=True,
    )
    assert differing(before, weights(tmp_path / "empty"))
    assert torch.isfinite(measured(again)).all()


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("sst2", "glue_sst2/train.jsonl", '"label": 1', '"label": 0'),
        ("swag", "swag/train.jsonl", "indeed", "surely"),
        ("wikitext", "wikitext2/train.txt", "film", "movie"),
    ],
)
def test_training_rows_that_were_edited_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, old: str, new: str
) -> None:
    data, folder = finetuned.write_data(tmp_path / "data"), tmp_path / "model"
    before = procedure_of(finetuned.trained(name, data, folder)).key
    edit(data / file, old, new)
    message = (
        r"the training rows of .*data are not those that .*model was trained on: they were changed since\. Restore them, or train again"
    )
    with pytest.raises(DataError, match=message):
        opened(name, folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="changed since"):
        opened(name, folder, data="data")
    if name == "sst2":  # other rows than those of the training may be asked for, as ever
        assert len(opened(name, folder, max_train_rows=10).train) == 10
    edit(folder / "whence.json", "train_fingerprint", "of_an_older_version")
    assert procedure_of(opened(name, folder)).key != before
    finetuned.write_data(data)
    edit(folder / "whence.json", "of_an_older_version", "train_fingerprint")
    assert procedure_of(opened(name, folder)).key == before


def test_other_columns_and_queries_may_change(tmp_path: Path) -> None:
    data, folder = finetuned.write_data(tmp_path / "data"), tmp_path / "model"
    finetuned.trained("sst2", data, folder)
    edit(data / "glue_sst2" / "train.jsonl", '"idx": 3', '"idx": 30')
    edit(data / "glue_sst2" / "validation.jsonl", "film", "movie")
    assert "movie" in "".join(row["text"] for row in opened("sst2", folder).queries)


def test_a_model_of_another_recipe(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"swag was trained by the recipe 'swag', not 'glue'\. Name that recipe\."):
        load_recipe("glue", checkpoint_dir=checkpoint("swag"))


def test_no_folder() -> None:
    message = r"the recipe swag needs a trained model: give --checkpoint-dir DIR\. whence train swag --checkpoint-dir DIR makes one\."
    with pytest.raises(ConfigError, match=message):
        load_recipe("swag")
    with pytest.raises(ConfigError, match=r"there is no folder 'nowhere'"):
        load_recipe("swag", checkpoint_dir=Path("nowhere"))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_ones_own(checkpoint: Checkpoint, data: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(name), folder, ignore=shutil.ignore_patterns("whence.json", "start", "snapshots", "second_moments*"))
    options = {**finetuned.SETTINGS[name][1], "data": str(data), "flip": None}
    recipe = opened(name, folder, **options)
    assert torch.equal(measured(recipe), measured(opened(name, checkpoint(name))))
    assert recipe.retraining is None
    assert recipe.second_moments is None
    assert recipe.training_time is None
    assert list(recipe.snapshots) == []
    assert recipe.raw is not None
