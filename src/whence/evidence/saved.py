"""Scores that were saved, to be judged: they must be of the model and the rows at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError, MismatchError
from whence.recipes.base import Recipe
from whence.scores.matrix import Scores
from whence.storage.run import fingerprint_model, fingerprint_rows

_WHAT = {"model": "another model", "train": "other training rows", "queries": "other queries"}


def saved_scores(attributor: Attributor, recipe: Recipe, names: Sequence[str]) -> dict[str, Tensor]:
    """Read scores `[query, train]` from the run folder by their names.

    Raises:
        ConfigError: there are none of a name. MismatchError: they are of another model, of other rows, or of some of them.
    """
    folders = {name: _folder(attributor, name) for name in names}
    rows = {"train": fingerprint_rows(recipe.train), "queries": fingerprint_rows(recipe.queries)}
    now = {"model": fingerprint_model(recipe.model), **rows}
    return {name: _checked(folder, recipe, now).values for name, folder in folders.items()}


def check_same_rows(first: Scores, second: Scores) -> None:
    """Check that two matrices of one shape are of the same queries and training rows.

    Raises:
        MismatchError: they are not.
    """
    queries, train = first.values.shape
    for what, count, one, other in (
        ("queries", queries, first.query_rows, second.query_rows),
        ("training rows", train, first.train_rows, second.train_rows),
    ):
        every = list(range(count))
        if (one or every) != (other or every):
            raise MismatchError(f"the two files hold scores of different {what}. Give two of the same rows, or score all rows in both.")


def _folder(attributor: Attributor, name: str) -> Path:
    folder = attributor.run.sub("scores", name)
    if not folder.exists():
        have = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
        raise ConfigError(f"there are no scores {name!r} in {folder.parent}; it has {', '.join(have) or 'none'}. Run whence score first.")
    return folder


def _checked(folder: Path, recipe: Recipe, now: Mapping[str, str]) -> Scores:
    """Read scores and compare what they are of with fingerprints of what is at hand."""
    scores = Scores.load(folder)
    if scores.values.shape != (len(recipe.queries), len(recipe.train)):
        raise MismatchError(
            f"{folder} holds scores of {scores.values.shape[0]} queries and {scores.values.shape[1]} rows; recipe {recipe.name} has "
            f"{len(recipe.queries)} and {len(recipe.train)}. Score all of them again."
        )
    if scores.query_rows is not None or scores.train_rows is not None:
        raise MismatchError(f"{folder} holds scores of chosen rows (--query-rows or --train-rows). Score all of them again.")
    # Over a run, the snapshots were scored; the model they led to is noted apart.
    of = scores.settings | scores.settings.get("over run", {})
    wrong = [what for key, what in _WHAT.items() if of.get(key, now[key]) != now[key]]
    if wrong:
        raise MismatchError(
            f"{folder} holds scores of {' and '.join(wrong)} than recipe {recipe.name} has now. Score anew, or give "
            "the run folder of this model."
        )
    return scores
