"""What a recipe is, and how one is found by its name or in a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from whence.errors import RecipeError, WhenceError
from whence.tasks import Task

# Name -> module and object; the module is imported when the recipe is asked for.
BUILT_IN = {
    "cot": ("whence.recipes.families", "cot"),
    "digits": ("whence.recipes.digits", "digits"),
    "glue": ("whence.recipes.families", "glue"),
    "instruct": ("whence.recipes.families", "instruct"),
    "stdlib": ("whence.recipes.families", "stdlib"),
    "swag": ("whence.recipes.families", "swag"),
    "wikitext": ("whence.recipes.families", "wikitext"),
}

_FORM = "A recipe is a whence.Recipe, or a function without required arguments that returns one."


@dataclass(frozen=True, kw_only=True)
class Options:
    """The answers that queries choose from, each as a row: the same prompt, another answer's tokens trained, no rationale.

    A query is right if the option with the least mean loss per trained token is the true one.

    Attributes:
        rows: encoded rows, one per option, those of a query behind each other.
        query: which query a row is an option of, int64 `[option row]`, rising.
        gold: whether it is the true one, bool `[option row]`.
    """

    rows: Sequence[Any]
    query: Tensor
    gold: Tensor


@dataclass(kw_only=True)
class Recipe:
    """A trained model with the data that made it and the behaviour to be explained.

    Attributes:
        name: used for the run folder, `runs/NAME`; letters, digits, `.`, `_` and `-`.
        model: the trained model.
        task: its loss and measurement; see `whence.tasks`.
        train: training rows, anything with `__len__` and `__getitem__`.
        queries: rows whose measurement is to be explained.
        query_split: how the data set names the split that the queries are of, such as `validation`, `train[90%:]` or `test`; None:
            not known. A selection of training rows is refused on a test split.
        collate: makes a batch of a list of rows; None: torch's `default_collate`.
        describe: text about a row, for people; it may have several lines.
        tokens: text of each token of a row, in their order; for the page of whence report.
        picture: image of a row, as `whence.report.pictures.picture` takes it; 0 is paper and 1 is ink.
        ask: makes a row to ask about of a text.
        encode: makes a row to ask about of a raw row: a dict with the columns of the data set.
        generate: makes a row of a text and what the model goes on with, of which only the latter is measured; it may have a
            `"continuation"`, for people.
        layers: which layers to track, as for `whence.Attributor`.
        layer_sets: lists of layers that can be asked for by a name.
        raw: training rows as they were read, to be filtered and written again; None: there are none.
        classes, query_classes: class of every training row and query, int64, where they have one.
        groups, query_groups: source, task or skill of every training row and query, where they have one.
        options: the answers that every query chooses from, where there are some.
        flipped: which training labels were made wrong on purpose, bool `[train]`.
        retraining: trains again on some of the training rows and measures the queries; see `whence.evaluate.retrain`.
        training_time: sum of the learning rates of all training steps.
        second_moments: safetensors file of Adam's second moments, by parameter name.
        snapshots: states in the midst of training, each the middle of a segment: file, and sum of its learning rates.
        over_run: whether scores are over the snapshots by default; it predicts retraining best after short trainings of
            classifiers (docs/results/finetuned.md).

    Raises:
        RecipeError: a field cannot be used.
    """

    name: str
    model: nn.Module
    task: Task
    train: Any
    queries: Any
    query_split: str | None = None
    collate: Callable[[list[Any]], Any] | None = None
    describe: Callable[[Any], str] | None = None
    tokens: Callable[[Any], Sequence[str]] | None = None
    picture: Callable[[Any], Tensor] | None = None
    ask: Callable[[str], Any] | None = None
    encode: Callable[[Mapping[str, Any]], Any] | None = None
    generate: Callable[[str], Any] | None = None
    layers: str | Sequence[str] | None = None
    layer_sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    raw: Sequence[dict[str, Any]] | None = None
    classes: Tensor | None = None
    query_classes: Tensor | None = None
    groups: Sequence[str] | None = None
    query_groups: Sequence[str] | None = None
    options: Options | None = None
    flipped: Tensor | None = None
    retraining: Any = None
    training_time: float | None = None
    second_moments: Path | None = None
    snapshots: Sequence[tuple[Path, float]] = ()
    over_run: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise RecipeError(
                f"Recipe: name={self.name!r} cannot name a run folder. Use letters, digits, '.', '_' and '-', for example 'my-model'."
            )
        if not isinstance(self.model, nn.Module):
            raise RecipeError(f"Recipe {self.name}: model is {_what(self.model)}; give a torch.nn.Module, already trained.")
        if not isinstance(self.task, Task):
            raise RecipeError(
                f"Recipe {self.name}: task is {_what(self.task)}; give a whence.tasks.Task, for example whence.tasks.Classification()."
            )
        for name in ("train", "queries"):
            rows = getattr(self, name)
            if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
                raise RecipeError(
                    f"Recipe {self.name}: {name} is {_what(rows)}; give rows with __len__ and __getitem__: a list or a map-style data set."
                )
        for name in ("collate", "describe", "tokens", "picture", "ask", "encode", "generate"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise RecipeError(f"Recipe {self.name}: {name} is {_what(getattr(self, name))}; give a function or None.")


def class_names(recipe: Recipe) -> dict[int, str]:
    """Return the names of a classifier's classes by number, as its model's configuration has them; else nothing."""
    names = getattr(getattr(recipe.model, "config", None), "id2label", None) or {}
    return {int(number): str(name) for number, name in names.items()}


def load_recipe(spec: str, **options: Any) -> Recipe:
    """Return the recipe that `spec` names: a built-in name, or `file.py:object`.

    The object is a `Recipe`, or a callable without required arguments that returns one. While the file runs, its folder
    is the first on `sys.path`, as if Python had been started on it. `options` are passed to the callable; for glue, swag,
    wikitext and stdlib they are `checkpoint_dir` and the fields of `whence.recipes.settings.DataSettings`.

    Raises:
        RecipeError: there is no such name, file or object, it fails, or it is no recipe.
    """
    if spec in BUILT_IN:
        module, name = BUILT_IN[spec]
        return _as_recipe(getattr(importlib.import_module(module), name), spec, options)
    # From the right: Windows paths have a colon of their own.
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        known = ", ".join(sorted(BUILT_IN))
        hint = f"; did you mean {spec.rstrip(':')}:recipe?" if spec.rstrip(":").endswith(".py") else "."
        raise RecipeError(f"recipe {spec!r} is neither a built-in name ({known}) nor of the form file.py:object{hint}")
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"recipe {spec!r}: there is no file {file} (looked in {Path.cwd()}). Check the path.")
    with _first_on_path(path.resolve().parent):
        module_ = _run_file(path, spec)
        if not hasattr(module_, name):
            raise RecipeError(f"recipe {spec!r}: {file} defines no {name!r}. {_candidates(module_, file)}")
        return _as_recipe(getattr(module_, name), spec, options)


def _run_file(path: Path, spec: str) -> ModuleType:
    """Execute a file as a module of its own, in `sys.modules` so that dataclasses and `inspect` find its source."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"whence_recipe_{path.stem}_{digest}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise RecipeError(f"recipe {spec!r}: {path} cannot be imported as Python. Give a .py file.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(
            f"recipe {spec!r}: running {path} raised {_told(error, path)}. Mend the file; "
            "what should not run on import belongs under `if __name__ == '__main__':`."
        ) from error
    return module


def _as_recipe(found: Any, spec: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe that an object is or makes."""
    if isinstance(found, Recipe):
        if options:
            raise RecipeError(_no_options(spec, options))
        return found
    if not callable(found):
        raise RecipeError(f"recipe {spec!r} is {_what(found)}. {_FORM}")
    _check_arguments(found, spec, options)
    try:
        made = found(**options)
    except WhenceError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"recipe {spec!r} raised {_told(error)}. Mend it, or the data it reads.") from error
    if not isinstance(made, Recipe):
        raise RecipeError(f"recipe {spec!r} returned {_what(made)}. {_FORM}")
    return made


def _no_options(spec: str, options: dict[str, Any]) -> str:
    given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
    return f"recipe {spec!r} takes no {given}. Leave it out, or write a function of that argument."


def _check_arguments(factory: Callable[..., Any], spec: str, options: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in callables have none; then calling tells
        return
    try:
        signature.bind_partial(**options)
    except TypeError:
        raise RecipeError(_no_options(spec, options)) from None
    try:
        signature.bind(**options)
    except TypeError:
        parameters = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        required = ", ".join(p.name for p in parameters if p.default is p.empty)
        raise RecipeError(f"recipe {spec!r} requires arguments ({required}). {_FORM} Give them default values.") from None


def _candidates(module: ModuleType, file: str) -> str:
    """Say which objects of a file may have been meant."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (isinstance(value, Recipe) or (inspect.isfunction(value) and value.__module__ == module.__name__))
    ]
    if not own:
        return f"Nothing in it looks like a recipe. {_FORM}"
    return f"Did you mean {' or '.join(f'{file}:{name}' for name in own[:5])}?"


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _told(error: BaseException, path: Path | None = None) -> str:
    """Return an error as `Type: message (file, line n)`, the place being the last one in `path` or anywhere."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if path is None or Path(f.filename).resolve() == path.resolve()]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        place = f" (line {error.lineno})"
    else:
        place = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{f': {message}' if message else ''}{place}"


def _what(value: Any) -> str:
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
