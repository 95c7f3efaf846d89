"""Scores and indexes over a run: means over the snapshots of one training, kept like any others."""

from __future__ import annotations

from typing import Any

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
from whence.index.index import Index
from whence.recipes.base import Recipe
from whence.scores.matrix import Scores
from whence.storage.run import fingerprint_model


def scores_over_run(
    attributor: Attributor, checkpoints: Checkpoints, recipe: Recipe, *, strategy: Any, name: str, overwrite: bool = False, **options: Any
) -> Scores:
    """Score a recipe's queries at each snapshot, and keep the mean in the run folder under `name`.

    Args:
        attributor: of the trained model; its run folder gets the mean, its stage table the time.
        checkpoints: the snapshots, with a run folder of their own.
        recipe: with queries and training rows.
        strategy: which curvature is fitted at each snapshot.
        name, overwrite: as of `Attributor.scores`.
        options: further ones of `Attributor.scores`.

    Raises:
        MismatchError: the folder holds scores of another model, other data or settings. Others as of `Attributor.scores`.
    """
    _fit(attributor, checkpoints, recipe, strategy=strategy, batch_size=options.get("batch_size", "auto"), overwrite=overwrite)
    found = checkpoints.scores(recipe.queries, recipe.train, strategy=strategy, name=name, overwrite=overwrite, **options)
    # The parts were checked against what was there before; the mean follows from them.
    found.settings["over run"] = {"model": fingerprint_model(recipe.model), "snapshots": len(checkpoints.checkpoints)}
    found.save(attributor.run.sub("scores", name))
    attributor.coverage = checkpoints.attributors[0].coverage
    attributor.run.record({"call": "scores over the run", "settings": found.settings, "stages": attributor.stages.to_json()})
    return found


def index_over_run(
    attributor: Attributor, checkpoints: Checkpoints, recipe: Recipe, *, strategy: Any, overwrite: bool = False, **options: Any
) -> Index:
    """Index a recipe's training rows at each snapshot; arguments and errors as of `scores_over_run` and of `Attributor.index`."""
    _fit(attributor, checkpoints, recipe, strategy=strategy, batch_size=options.get("batch_size", "auto"), overwrite=overwrite)
    made = checkpoints.index(recipe.train, strategy=strategy, overwrite=overwrite, **options)
    attributor.coverage = checkpoints.attributors[0].coverage
    attributor.run.record({"call": "index over the run", "settings": made.settings, "stages": attributor.stages.to_json()})
    return made


def _fit(attributor: Attributor, checkpoints: Checkpoints, recipe: Recipe, **options: Any) -> None:
    """Fit the curvature of every snapshot, on the stage table of the attributor."""
    for one in checkpoints.attributors:
        one.stages = attributor.stages
    checkpoints.fit(recipe.train, **options)
