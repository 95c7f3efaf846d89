"""What a checkpoint folder remembers of its training: `whence.json`, written last."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from whence.errors import ConfigError, DataError
from whence.recipes.family import Family
from whence.recipes.retraining import START
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings, TrainingSettings, to_json
from whence.recipes.splits import fingerprint_raw
from whence.recipes.training import Trained, snapshot_file
from whence.recipes.unfinished import is_unfinished
from whence.storage.run import read_json

RECORD = "whence.json"
_WHICH_ROWS = ("task", "data", "train_file", "columns", "label", "max_train_rows")


def read_record(family: Family, folder: Path) -> dict[str, Any] | None:
    """Return what `train_recipe` wrote; None for a folder of your own."""
    if not (folder / RECORD).is_file():
        if (folder / START).is_dir():
            verb = f"whence train {family.name}"
            again = f"Go on with it: the same {verb} ..." if is_unfinished(folder) else f"Train again: {verb} --overwrite ..."
            raise ConfigError(f"{folder} is of a training that did not end. {again}")
        return None
    record: dict[str, Any] = read_json(folder / RECORD)
    if record.get("recipe") != family.name:
        raise ConfigError(f"{folder} was trained by the recipe {record.get('recipe')!r}, not {family.name!r}. Name that recipe.")
    return record


def check_unchanged(family: Family, folder: Path, data: DataSettings, raw: list[Row], record: dict[str, Any]) -> None:
    """Check that the rows are still those of the training, where the same are asked for and it is known which they were."""
    expected, recorded = record.get("train_fingerprint"), family.settled(DataSettings(**known(DataSettings, record["data"])))
    same = all(lasting(data)[name] == lasting(recorded)[name] for name in _WHICH_ROWS)
    if expected is None or not same or fingerprint_raw(family, data, raw) == expected:
        return
    origin = data.train_file or data.data or family.source(data).hub
    raise DataError(
        f"the training rows of {origin} are not those that {folder} was trained on: they were changed since. Restore them, "
        f"or train again: whence train {family.name} --checkpoint-dir {folder} --overwrite ..."
    )


def known(kind: type[DataSettings] | type[TrainingSettings], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of fields, JSON's lists as tuples."""
    names = {field.name for field in fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in names}


def lasting(data: DataSettings) -> dict[str, Any]:
    """Return the settings as JSON values, with paths that are found from another folder too."""
    settings = to_json(data)
    for name in ("data", "train_file"):
        path = settings[name]
        settings[name] = str(Path(path).resolve()) if path is not None and Path(path).exists() else path
    return settings


def to_record(family: Family, data: DataSettings, training: TrainingSettings, trained: Trained, rows: int) -> dict[str, Any]:
    """Return what is remembered of a training on so many rows."""
    return {
        "recipe": family.name,
        "data": lasting(data),
        "training": to_json(training),
        "training_time": trained.time,
        "train_rows": rows,
        "snapshots": [{"file": snapshot_file(s.step), "step": s.step, "time": s.time} for s in trained.snapshots],
    }
