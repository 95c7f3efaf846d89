"""Which scores a recipe gets when it is not told: those that predict retraining best (docs/results/finetuned.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
from whence.curvature.refine import SolverLike, named_solver
from whence.curvature.settings import DampingLike, ResponseLike
from whence.curvature.strategies import StrategyName
from whence.evidence.over_run import scores_over_run
from whence.recipes.base import Recipe
from whence.scores.matrix import Scores
from whence.scores.request import Aggregate, Normalize, scores_folder

OVER_RUN = "over-run"
"""Name of scores over a run, if they were given none."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of a recipe, and what they are.

    Attributes:
        scores: of all its queries and training rows, or of those that were asked for.
        name: their folder in the run folder.
        strategy: form of the curvature.
        over_run: whether they are the mean over the snapshots of the training.
        normalize: as of `Attributor.scores`.
    """

    scores: Scores
    name: str
    strategy: StrategyName
    over_run: bool
    normalize: Normalize | None


def usual_name(recipe: Recipe) -> str:
    """Return the name of the scores that `score_recipe` makes of a recipe when it is told nothing else."""
    return OVER_RUN if recipe.over_run else "ekfac"


def score_recipe(
    attributor: Attributor,
    recipe: Recipe,
    *,
    snapshots: Callable[[], Checkpoints],
    over_run: bool = False,
    strategy: StrategyName | None = None,
    damping: DampingLike = "auto",
    response: ResponseLike = "inverse",
    solver: SolverLike = "direct",
    normalize: Normalize | None = None,
    aggregate: Aggregate | None = None,
    name: str | None = None,
    **options: Any,
) -> Scored:
    """Score a recipe's queries and keep the scores in the run folder.

    A recipe that wants it (`Recipe.over_run`: short fine-tunes of classifiers) is scored over its run by the cosine of
    gradients, unless something from `strategy` to `aggregate` is given; any other by EKFAC. Errors are those of
    `Attributor.scores` and of `snapshots`.

    Args:
        attributor: of the recipe's model; fitted with the strategy, but for `"identity"` and scores over the run.
        recipe: with queries and training rows.
        snapshots: makes the checkpoints of the recipe's training; called for scores over the run alone.
        over_run: score over the run, which fits the strategy at each snapshot; then `"identity"` is the default strategy.
        strategy, damping, response, solver, normalize, aggregate: as of `Attributor.scores`.
        name: folder of the scores; None: `over-run`, `over-run-STRATEGY`, or as of `Attributor.scores`.
        options: further ones of `Attributor.scores`.
    """
    told = strategy, damping, response, solver, normalize, aggregate
    by_default = recipe.over_run and told == (None, "auto", "inverse", "direct", None, None)
    over_run = over_run or by_default
    normalize = "cosine" if by_default else normalize
    chosen: StrategyName = strategy or ("identity" if over_run else "ekfac")
    plan = named_solver(solver)
    kind = "direct" if plan is None else plan.name
    asked = options | {"damping": damping, "response": response, "solver": solver, "normalize": normalize, "aggregate": aggregate}
    asked["strategy"] = "identity" if kind == "exact" else chosen  # an exact inverse needs no fit
    if over_run:
        name = name or (OVER_RUN if chosen == "identity" else f"{OVER_RUN}-{chosen}")
        scores = scores_over_run(attributor, snapshots(), recipe, name=name, **asked)
    else:
        name = scores_folder(name, chosen, kind)
        scores = attributor.scores(recipe.queries, recipe.train, name=name, **asked)
    return Scored(scores=scores, name=name, strategy=chosen, over_run=over_run, normalize=normalize)
