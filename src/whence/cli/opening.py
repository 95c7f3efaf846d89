"""From a recipe's name and options to an attributor on its run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter

from whence.cli.options import DataOptions, RunOptions, Strategy
from whence.errors import ConfigError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from whence.attributor import Attributor
    from whence.checkpoints import Checkpoints
    from whence.index.index import Index
    from whence.recipes.base import Recipe

Flat = Parameter(name="*")
RECIPE_HELP = (
    "cot, digits, glue, instruct, stdlib, swag, wikitext, or file.py:object, where the object is a Recipe or a function that returns one."
)
RecipeName = Annotated[str, Parameter(name="recipe", help=RECIPE_HELP)]

INDEX_HELP = (
    f"Folder of an index (RUN_DIR/index/NAME) or of the run that has one; or its recipe: {RECIPE_HELP} A folder is opened with the layers, "
    "fallback, precision, adam and seed that it was made with; another value than the default goes before them."
)
IndexName = Annotated[str, Parameter(name="index", help=INDEX_HELP)]
IndexRecipe = Annotated[str | None, Parameter(help="Recipe of an index that is given by its folder. Default: the one that run.json names.")]
# What an index depends on beside its recipe, and how run.json may say it.
_RECORDED: dict[str, Any] = {"layers": list, "fallback": bool, "precision": str, "adam": bool, "seed": int}


def open_recipe(spec: str, run: RunOptions, data: DataOptions) -> tuple[Attributor, Recipe]:
    """Load the recipe and bind it to its run folder."""
    from whence.attributor import Attributor
    from whence.recipes.base import load_recipe

    found = load_recipe(spec, **data.given())
    attributor = Attributor(found.model, found.task, run_dir=run_folder(found, run), **_options(found, run))
    chosen = {name: value for name in _RECORDED if (value := getattr(run, name)) != getattr(RunOptions, name)}
    attributor.run.origin = {"recipe": origin(spec, data)} | ({"options": chosen} if chosen else {})
    return attributor, found


def open_index(
    spec: str,
    run: RunOptions,
    data: DataOptions,
    *,
    recipe: str | None = None,
    strategy: str | None = None,
    name: str | None = None,
    over_run: bool = False,
) -> tuple[Attributor, Recipe, Index]:
    """Open an index by its recipe, or by its folder, whose `run.json` names recipe and options.

    What is given goes before what is recorded. Of the options that an index is made with, a default does not count as given.
    A recipe in a Python file that a folder names is not run; `recipe` asks for it. `over_run`: that of the training's snapshots.

    Raises:
        ConfigError: there is no index, or not one alone. RecipeError: no recipe is named. StorageError: the index cannot be read.
    """
    from whence.index.index import Index
    from whence.scores.request import check_name

    if name is not None and strategy is not None:
        raise ConfigError(f"--name {name} and --strategy {strategy} both say which index is asked. Give one of them.")
    check_name(name or strategy)
    folder = _index_folder(spec)
    if folder is None:
        if recipe is not None:
            raise ConfigError(f"--recipe {recipe}: {spec} is a recipe already. Give the folder of the index, or leave --recipe out.")
        attributor, found = open_recipe(spec, run, data)
        bench: Attributor | Checkpoints = attributor
        folders = [run_folder(found, run) / "index" / (name or strategy or "ekfac")]
        if over_run:
            bench = open_snapshots(found, run)
            folders = bench.index_folders(name or strategy or "identity")
        if not folders[0].exists():
            raise ConfigError(_no_index(spec, run, folders[0], "identity" if over_run else "ekfac", over_run=over_run))
        return attributor, found, Index(bench, folders, train=found.train)
    if over_run:
        raise ConfigError(f"--over-run: {folder} is the folder of one index; name the recipe whose training had the snapshots instead.")
    if run.run_dir is not None or name is not None or strategy is not None:
        raise ConfigError(f"{folder} says which index it is; leave --run-dir, --name and --strategy out.")
    attributor, found = _reopened(folder, run, data, recipe)
    return attributor, found, Index(attributor, folder, train=found.train)


def _no_index(spec: str, run: RunOptions, folder: Path, default: str, *, over_run: bool) -> str:
    """Say how the index that is not there is made, and which ones are."""
    name, there = folder.name, sorted(path.parent.name for path in folder.parent.glob("*/manifest.json"))
    which = "" if name == default else f" --{'strategy' if name in get_args(Strategy) else 'name'} {name}"
    place = "" if run.run_dir is None else f" --run-dir {run.run_dir}"
    others = f", or ask another with --name: {', '.join(there)}" if there else ""
    run_first = f"whence index {spec}{' --over-run' if over_run else ''}{which}{place}"
    return f"{folder} does not exist: there is no index to ask. Run first: {run_first}{others}."


def _index_folder(spec: str) -> Path | None:
    """Return the folder of the index that an argument names; None: it names a recipe."""
    from whence.recipes.base import BUILT_IN

    folder = Path(spec)
    if spec in BUILT_IN or not folder.is_dir():
        if "/" in spec and ":" not in spec and not spec.endswith(".py"):
            raise ConfigError(f"{spec}: there is no such folder. Give the folder of an index, of a run that has one, or a recipe.")
        return None
    if (folder / "manifest.json").is_file():
        return _checked_index(folder)
    found = sorted(path.parent for path in folder.glob("index/*/manifest.json"))
    if len(found) != 1:
        have = f"several: {', '.join(map(str, found))}. Name one" if found else "none. Make one with whence index, or give another folder"
        raise ConfigError(f"{folder} has no index of its own, and of indexes within it {have}.")
    return found[0]


def _checked_index(folder: Path) -> Path:
    from whence.storage.manifest import read_manifest

    kind = read_manifest(folder).kind
    if kind != "index":
        raise ConfigError(f"{folder} holds {kind}, and no index. Give the folder of an index, of a run that has one, or a recipe.")
    if folder.resolve().parent.name != "index":
        raise ConfigError(f"{folder} lies in no run folder; an index is opened where it was made, as RUN_DIR/index/NAME.")
    return folder


def _reopened(folder: Path, run: RunOptions, data: DataOptions, recipe: str | None) -> tuple[Attributor, Recipe]:
    """Open the recipe of an index on its run folder, with the options that it was made with."""
    from whence.attributor import Attributor
    from whence.recipes.base import load_recipe
    from whence.report.reopen import named_recipe, open_named, recipe_of

    place = folder.resolve().parent.parent
    record = _record_of(folder)
    try:
        if recipe is not None:
            found = load_recipe(recipe, **data.given())
        else:
            found = open_named(named_recipe(place) if record is None else recipe_of(record), **data.given())
    except RecipeError as error:
        if recipe is not None:
            raise
        raise RecipeError(f"{folder}: {str(error).rstrip('.')}. Name the recipe with --recipe.") from error
    run = replace(run, run_dir=place, **{name: value for name, value in _made_with(record).items() if _is_default(run, name)})
    return Attributor(found.model, found.task, run_dir=place, **_options(found, run)), found


def _is_default(run: RunOptions, name: str) -> bool:
    return bool(getattr(run, name) == getattr(RunOptions, name))


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Return what `run.json` says of the making of an index: its last record that names a recipe, else its last; None: nothing."""
    from whence.index.stored import StoredIndex
    from whence.report.reopen import recipe_of
    from whence.storage.run import read_records

    settings = StoredIndex.open(folder).settings
    records = [record for record in reversed(read_records(folder.resolve().parent.parent / "run.json")) if isinstance(record, dict)]
    own = [record for record in records if record.get("call") == "index" and record.get("settings") == settings]
    # Rows that were appended from Python leave a record too, which names no recipe.
    return next(filter(recipe_of, own), own[0] if own else None)


def _made_with(record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options that a record of `run.json` says an index was made with."""
    options = (record or {}).get("options") or {}
    return {name: options[name] for name, kind in _RECORDED.items() if isinstance(options.get(name), kind)}


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
