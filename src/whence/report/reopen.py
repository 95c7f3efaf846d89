"""From a run folder back to the recipe whose rows were scored there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence.errors import RecipeError
from whence.recipes.base import BUILT_IN, Recipe, load_recipe
from whence.storage.run import read_records


def recipe_of(record: Any) -> dict[str, Any] | None:
    """Return what a record of `run.json` says of the recipe that was opened for it: `spec` and `options`; None: nothing."""
    found = record.get("recipe") if isinstance(record, Mapping) else None
    if isinstance(found, Mapping) and isinstance(found.get("spec"), str) and isinstance(found.get("options"), Mapping):
        return {"spec": found["spec"], "options": dict(found["options"])}
    return None


def named_recipe(run_dir: Path) -> dict[str, Any] | None:
    """Return what `run.json` says of the last recipe that was opened from the command line, as of `recipe_of`.

    Raises:
        StorageError: `run.json` is no list of records.
    """
    return next(filter(None, map(recipe_of, reversed(read_records(run_dir / "run.json")))), None)


def reopened(run_dir: Path, **options: Any) -> Recipe:
    """Open the last recipe that a run folder names, as of `open_named`."""
    return open_named(named_recipe(run_dir), **options)


def open_named(named: Mapping[str, Any] | None, **options: Any) -> Recipe:
    """Open a recipe that `run.json` names; `options` go before those that it names, for data or a model that were moved.

    A recipe in a Python file is not opened: a folder of results, which may come from elsewhere, must not choose code to be run.

    Raises:
        RecipeError: none is named, or one in a file. Others as of `load_recipe`.
    """
    if named is None:
        raise RecipeError("run.json names no recipe, as of runs that were made from Python")
    spec = named["spec"]
    if spec not in BUILT_IN:
        # Without its folder: the message goes onto a page that may be sent on.
        name = spec.replace("\\", "/").rpartition("/")[2]
        raise RecipeError(f"run.json names {name}, a file of Python, which is run only if it is asked for by --recipe")
    recorded = {key: tuple(value) if isinstance(value, list) else value for key, value in named["options"].items()}
    return load_recipe(spec, **{**recorded, **options})
