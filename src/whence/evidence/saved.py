"""Scores that were saved, to be judged or listed: they must be of the rows at hand, and to be judged of the model too."""

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
    now = {"model": fingerprint_model(recipe.model), **_rows_of(recipe)}
    return {name: _checked(folder, recipe, now).values for name, folder in folders.items()}


def scores_to_list(folder: Path, recipe: Recipe) -> Scores:
    """Read scores of all or some of a recipe's rows. They name rows by number; with other data they would name other rows.

    Raises:
        ConfigError: they are sums over training rows. MismatchError: they are of other rows.
    """
    scores = Scores.load(folder)
    if scores.sums_rows:
        raise ConfigError(f"{folder} holds sums over training rows, so there are no rows to list. Score again without --aggregate rows.")
    queries, train = scores.values.shape
    stored = (queries, scores.trained_rows or train)
    listed = scores.query_rows is not None or scores.settings.get("aggregate") == "queries"
    present = (queries if listed else len(recipe.queries), len(recipe.train))
    if present != stored:
        raise MismatchError(
            f"{folder} holds scores of {stored[0]} queries and {stored[1]} training rows; recipe {recipe.name} now has {present[0]} and "
            f"{present[1]}. Score again, or use the recipe as it was."
        )
    if wrong := _differing(scores, _rows_of(recipe)):
        raise MismatchError(
            f"{folder} holds scores of {wrong} than recipe {recipe.name} has now, though as many. Score again, or use the recipe as it was."
        )
    return scores


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
    if wrong := _differing(scores, now):
        raise MismatchError(
            f"{folder} holds scores of {wrong} than recipe {recipe.name} has now. Score anew, or give the run folder of this model."
        )
    return scores


def _rows_of(recipe: Recipe) -> dict[str, str]:
    """Return fingerprints of the rows at hand."""
    return {"train": fingerprint_rows(recipe.train), "queries": fingerprint_rows(recipe.queries)}


def _differing(scores: Scores, now: Mapping[str, str]) -> str:
    """Say what scores are of that is not what is at hand now; nothing if all is the same."""
    # Over a run, the snapshots were scored; the model they led to is noted apart.
    of = scores.settings | scores.settings.get("over run", {})
    return " and ".join(_WHAT[key] for key, value in now.items() if of.get(key, value) != value)
