"""Scores over a run: the mean over the snapshots of one training, kept like any other scores."""

from __future__ import annotations

from typing import Any

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
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
    for one in checkpoints.attributors:
        one.stages = attributor.stages
    checkpoints.fit(recipe.train, strategy=strategy, batch_size=options.get("batch_size", "auto"), overwrite=overwrite)
    found = checkpoints.scores(recipe.queries, recipe.train, strategy=strategy, name=name, overwrite=overwrite, **options)
    # The parts were checked against what was there before; the mean follows from them.
    found.settings["over run"] = {"model": fingerprint_model(recipe.model), "snapshots": len(checkpoints.checkpoints)}
    found.save(attributor.run.sub("scores", name))
    attributor.coverage = checkpoints.attributors[0].coverage
    attributor.run.record({"call": "scores over the run", "settings": found.settings, "stages": attributor.stages.to_json()})
    return found
