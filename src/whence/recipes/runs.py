"""The same training from several seeds, for means over models that chance has told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from whence.errors import ConfigError
from whence.recipes.base import Recipe
from whence.recipes.family import Family
from whence.recipes.finetune import is_trained, open_finetuned, train_recipe
from whence.recipes.record import RECORD
from whence.recipes.settings import DataSettings, TrainingSettings


def run_folders(folder: str | Path) -> list[Path]:
    """Return the folders `run-0`, `run-1`, ... of a folder that are trained: checkpoint folders, also for `whence.Checkpoints`."""
    found = [path.parent for path in Path(folder).glob(f"run-*/{RECORD}") if path.parent.name.removeprefix("run-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("run-")))


def run_folder(folder: str | Path, number: int) -> Path:
    """Return the checkpoint folder of a run."""
    return Path(folder) / f"run-{number}"


def train_runs(
    family: Family,
    folder: str | Path,
    runs: int,
    *,
    data: DataSettings,
    training: TrainingSettings,
    overwrite: bool = False,
    snapshots: int = 4,
    **options: Any,
) -> list[Recipe]:
    """Train `runs` models into `folder/run-0`, `run-1`, ..., of which each has a seed one higher; return their recipes.

    Broken off anywhere, the same call goes on: runs that have ended are kept, if they are of the same settings, also of
    those that are left to the recipe, and of the same versions of packages.

    Args:
        family: the recipe.
        folder: a folder of such runs.
        runs: how many.
        data, training, overwrite, snapshots, options: as for `train_recipe`; the seed is that of the first run.

    Raises:
        ConfigError: as of `train_recipe`, or `runs` is no whole number of 1 or more.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ConfigError(f"runs={runs!r} cannot be used; give a whole number of 1 or more.")
    found = []
    for number in range(runs):
        place, own = run_folder(folder, number), replace(training, seed=training.seed + number)
        if not overwrite and is_trained(family, place, data, own, snapshots=snapshots):
            found.append(open_finetuned(family, place, DataSettings()))
        else:
            chosen: dict[str, Any] = {"overwrite": overwrite, "snapshots": snapshots, **options}
            found.append(train_recipe(family, place, data=data, training=own, **chosen))
    return found
