"""The same training from several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
import whence
from finetuned import differing, weights
from whence.errors import ConfigError, DataError
from whence.recipes.families import FAMILIES
from whence.recipes.record import RECORD
from whence.recipes.runs import run_folders, train_runs
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.storage.run import read_json

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def runs(
    data: Path, folder: Path, count: int, *, rows: int | None = 16, kept: dict[str, Any] | None = None, **training: Any
) -> list[whence.Recipe]:
    options: dict[str, Any] = {"preset": "tiny", "num_train_epochs": 1, "train_batch_size": 8, "seed": 5} | training
    settings = DataSettings(data=str(data), max_length=32, max_train_rows=rows)
    more: dict[str, Any] = {"snapshots": 1} | (kept or {})
    return train_runs(FAMILIES["instruct"], folder, count, data=settings, training=TrainingSettings(**options), **more)


def test_runs_have_seeds_of_their_own_and_are_checkpoints(data: Path, tmp_path: Path) -> None:
    found = runs(data, tmp_path / "many", 2)
    folders = run_folders(tmp_path / "many")
    assert folders == [tmp_path / "many" / "run-0", tmp_path / "many" / "run-1"]
    assert [recipe.name for recipe in found] == ["instruct-many-run-0", "instruct-many-run-1"], "their run folders differ from others'"
    for number, folder in enumerate(folders):
        finetuned.trained("alpaca", data, tmp_path / f"alone{number}", settings={"max_length": 32, "max_train_rows": 16}, seed=5 + number)
        assert differing(weights(folder), weights(tmp_path / f"alone{number}")) == set(), "as trained alone from this seed"
    assert differing(weights(folders[0]), weights(folders[1]))
    one = found[0]
    options: dict[str, Any] = {"collate": one.collate, "progress": False, "device": "cpu"}
    rows = {"queries": one.queries[:2], "train": one.train[:3]}
    mean = whence.Checkpoints(one.model, one.task, folders, **options).scores(**rows, strategy="identity").values
    each = [whence.Attributor(r.model, r.task, **options).scores(**rows, strategy="identity").values for r in found]
    torch.testing.assert_close(mean, torch.stack(each).mean(0))


def test_more_runs_keep_those_that_are_there(data: Path, tmp_path: Path) -> None:
    runs(data, tmp_path / "many", 1)
    file = tmp_path / "many" / "run-0" / "model.safetensors"
    before = file.stat().st_mtime_ns
    assert len(runs(data, tmp_path / "many", 2)) == 2
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"run-0 is not empty\. Give a new folder as --checkpoint-dir, or --overwrite"):
        runs(data, tmp_path / "many", 2, learning_rate=1e-2)
    with pytest.raises(ConfigError, match=r"run-0 is not empty"):
        runs(data, tmp_path / "many", 2, rows=8)
    runs(data, tmp_path / "many", 1, kept={"overwrite": True})
    assert file.stat().st_mtime_ns != before


def test_what_is_left_to_the_recipe_is_compared_too(data: Path, tmp_path: Path) -> None:
    """A run of some of the rows, with adapters, is none of all rows without."""
    pytest.importorskip("peft")
    adapted: dict[str, Any] = {"lora_rank": 2, "lora_targets": ("c_attn",), "num_train_epochs": 0.1}
    runs(data, tmp_path / "many", 1, **adapted)
    file = tmp_path / "many" / "run-0" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    runs(data, tmp_path / "many", 1, **adapted)
    runs(data, tmp_path / "many", 1, **adapted, lora_alpha=16, lora_dropout=0.1)  # what would be chosen
    assert file.stat().st_mtime_ns == before
    others: list[dict[str, Any]] = [
        adapted | {"rows": None},
        {"num_train_epochs": 0.1},
        adapted | {"lora_targets": None},  # the recipe's choice is another
        adapted | {"dropout": 0.0, "lora_dropout": 0.1},
        adapted | {"kept": {"snapshots": 2}},
    ]
    for other in others:
        with pytest.raises(ConfigError, match=r"run-0 is not empty"):
            runs(data, tmp_path / "many", 1, **other)


def test_runs_of_other_versions_are_not_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(data, tmp_path / "many", 1)
    record = tmp_path / "many" / "run-0" / RECORD
    held = read_json(record)
    record.write_text(json.dumps({name: value for name, value in held.items() if name != "made_with"}), encoding="utf-8")
    runs(data, tmp_path / "many", 1)  # an earlier version of whence did not write it
    record.write_text(json.dumps(held | {"made_with": held["made_with"] | {"torch": "0.1"}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run-0 is not empty"):
        runs(data, tmp_path / "many", 1)


@pytest.mark.parametrize("at", [0, 3])
def test_runs_that_are_broken_off_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Two steps each: in the midst of the first run, and of the second."""
    transformers = pytest.importorskip("transformers")
    step, count = transformers.Trainer.training_step, iter(range(1000))

    def breaks(self: Any, *arguments: Any, **more: Any) -> Any:
        if next(count) == at:
            raise KeyboardInterrupt
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            runs(data, tmp_path / "broken", 2)
    assert len(run_folders(tmp_path / "broken")) == at // 2
    assert len(runs(data, tmp_path / "broken", 2)) == 2
    runs(data, tmp_path / "whole", 2)
    for one, two in zip(run_folders(tmp_path / "broken"), run_folders(tmp_path / "whole"), strict=True):
        assert differing(weights(one), weights(two)) == set()


def test_runs_of_rows_that_were_changed_are_not_kept(data: Path, tmp_path: Path) -> None:
    rows = finetuned.rows_of("alpaca", "train")
    own = Path(finetuned.own(tmp_path / "own", rows, rows[:2]))
    runs(own, tmp_path / "many", 1)
    finetuned.edit(own / "train.jsonl", "Say", "Tell")
    with pytest.raises(DataError, match=r"are not those that .*run-0 was trained on"):
        runs(own, tmp_path / "many", 1)


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_a_number_of_runs_that_is_none(data: Path, tmp_path: Path, count: Any) -> None:
    with pytest.raises(ConfigError, match=r"runs=.* cannot be used; give a whole number of 1 or more\."):
        runs(data, tmp_path, count)


def test_a_folder_of_adapters_is_no_model_to_start_from(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    runs(data, tmp_path / "base", 1, lora_rank=2)
    adapters = tmp_path / "base" / "run-0"
    with pytest.raises(ConfigError, match=r"holds adapters, and no model to start from\. Give the model that they are for as --model"):
        runs(data, tmp_path / "more", 1, preset=None, model=str(adapters))
    assert runs(data, tmp_path / "more", 1, preset=None, model=str(adapters / "start"), lora_rank=2)
