"""From a recipe's name and options to an attributor on its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from whence.cli.options import DataOptions, RunOptions
from whence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from whence.attributor import Attributor
    from whence.checkpoints import Checkpoints
    from whence.recipes.base import Recipe

Flat = Parameter(name="*")
RECIPE_HELP = "digits, glue, swag, wikitext, or file.py:object, where the object is a Recipe or a function that returns one."
RecipeName = Annotated[str, Parameter(name="recipe", help=RECIPE_HELP)]


def open_recipe(spec: str, run: RunOptions, data: DataOptions) -> tuple[Attributor, Recipe]:
    """Load the recipe and bind it to its run folder."""
    from whence.attributor import Attributor
    from whence.recipes.base import load_recipe

    found = load_recipe(spec, **data.given())
    attributor = Attributor(found.model, found.task, run_dir=run_folder(found, run), **_options(found, run))
    attributor.run.origin = {"recipe": origin(spec, data)}
    return attributor, found


def origin(spec: str, data: DataOptions) -> dict[str, Any]:
    """Return what whence report needs to open a recipe again: its name and options; files and folders by their whole path."""
    file, colon, name = spec.rpartition(":")
    options = {key: _whole(value) if key in ("checkpoint_dir", "data", "train_file") else value for key, value in data.given().items()}
    return {"spec": f"{_whole(file)}:{name}" if colon and file.endswith(".py") else spec, "options": options}


def _whole(path: Any) -> str:
    # A name on the hub is no file here, and stays what it is.
    found = Path(path).expanduser()
    return str(found.resolve() if found.exists() else path)


def open_snapshots(found: Recipe, run: RunOptions) -> Checkpoints:
    """Return the states of a recipe's training as checkpoints, with a folder of their own in the run folder."""
    from whence.checkpoints import Checkpoints

    if not found.snapshots:
        raise ConfigError(f"--over-run: recipe {found.name} has no snapshots of its training; they are kept by whence train. Leave it out.")
    files = [file for file, _ in found.snapshots]
    return Checkpoints(found.model, found.task, files, run_dir=run_folder(found, run) / "over-run", **_options(found, run))


def _options(found: Recipe, run: RunOptions) -> dict[str, Any]:
    return {
        "layers": _layers(found, run.layers),
        "collate": found.collate,
        "fallback": run.fallback,
        "device": run.device,
        "precision": run.precision,
        "compile": run.compile,
        "offload": run.offload,
        "second_moments": _second_moments(found) if run.adam else None,
        "training_time": found.training_time,
        "seed": run.seed,
    }


def _layers(found: Recipe, asked: list[str] | None) -> str | Sequence[str] | None:
    if asked is None:
        return found.layers
    if asked == ["all"]:
        return "all"
    return found.layer_sets[asked[0]] if len(asked) == 1 and asked[0] in found.layer_sets else asked


def _second_moments(found: Recipe) -> dict[str, Tensor]:
    if found.second_moments is None or not found.second_moments.is_file():
        raise ConfigError(
            f"--adam: recipe {found.name} has no second moments; they are kept by whence train. Train with it, or leave --adam out."
        )
    import safetensors.torch

    return safetensors.torch.load_file(found.second_moments)


def run_folder(found: Recipe, run: RunOptions) -> Path:
    """Return the run folder: the one given, else runs/NAME."""
    return run.run_dir or Path("runs") / found.name
