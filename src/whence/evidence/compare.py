"""Comparisons of scores on one recipe: by training again, by a step, by copies, by labels that are known to be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.baselines import random_scores
from whence.evaluate.counterfactual import RANDOM, check_counts, counterfactual
from whence.evaluate.duplicates import DuplicateRanks, duplicate_ranks, sample_rows
from whence.evaluate.lds import Lds, lds
from whence.evaluate.removal import Counterfactual
from whence.evaluate.retrain import RetrainBank, Running, draw_masks, retrain_bank
from whence.evaluate.tail_patch import TailPatch, tail_patch
from whence.evidence.baselines import row_losses, rows_at_a_time
from whence.evidence.retraining import measure_of, procedure_of, running_in
from whence.recipes.base import Recipe
from whence.recipes.quality import tokens_of
from whence.runtime.batches import check_rows
from whence.tasks import CausalLM
from whence.workbench import Size


@dataclass(frozen=True, kw_only=True)
class LdsTable:
    """The linear datamodeling score of every method on one bank of retrains, and the bank."""

    results: dict[str, Lds]
    bank: RetrainBank

    def to_json(self) -> dict[str, Any]:
        """Return the figures; `minus_first` is the difference to the first method with its interval."""
        first = next(iter(self.results.values()))
        subsets, repeats, queries = self.bank.measurements.shape
        return {
            "subsets": subsets,
            "repeats": repeats,
            "queries": queries,
            "reliability": _or_none([first.reliability]),
            "ceiling": _or_none([first.ceiling]),
            "methods": {
                name: {
                    "lds": score.mean,
                    "interval": _or_none([score.low, score.high]),
                    "minus_first": _or_none([*score.minus(first)]),
                }
                for name, score in self.results.items()
            },
        }


def _or_none(values: list[float]) -> Any:
    """Return one value, or several as a list; None where one is not a number, which JSON does not know."""
    if any(math.isnan(value) for value in values):
        return None
    return values[0] if len(values) == 1 else values


def check_lds(recipe: Recipe, *, masks: int, share: float) -> None:
    """Check what `lds_table` is asked for before anything is scored or trained.

    Raises:
        ConfigError: the recipe cannot be trained again, or not on such subsets.
    """
    procedure_of(recipe)
    if masks < 3:
        raise ConfigError(f"masks={masks}: no correlation can be taken. Give 3 or more, 100 for a score to rely on.")
    draw_masks(len(recipe.train), 1, share=share)


def check_counterfactual(recipe: Recipe, *, remove: Sequence[int], mode: str, queries: Sequence[int] | None = None) -> None:
    """Check what `counterfactual_of` is asked for before anything is scored or trained.

    Raises:
        ConfigError: the recipe cannot be trained again or has no such rows, or its measurement cannot tell what is classified right.
    """
    procedure_of(recipe)
    check_counts(remove, len(recipe.train))
    check_rows(queries, len(recipe.queries), "queries")
    measure = measure_of(recipe)
    if mode == "each" and measure not in ("margin", None):
        raise ConfigError(
            f"mode='each' follows queries until they are misclassified, which the measurement {measure!r} does not tell. "
            "Give --mode sum, or for a classifier --measurement margin and scores of it."
        )


def lds_table(
    attributor: Attributor,
    recipe: Recipe,
    orders: Mapping[str, Tensor],
    *,
    masks: int = 100,
    share: float = 0.5,
    repeats: int = 5,
    seed: int = 0,
    **running: Unpack[Running],
) -> LdsTable:
    """Train on random subsets (or find the retrains on disk), and judge scores by them.

    Args:
        attributor, recipe: of the model that was scored.
        orders: scores by name; differences are to the first.
        masks: how many subsets.
        share: of the training rows in each.
        repeats: trainings per subset.
        seed: of the subsets and trainings.
        running: see `whence.evaluate.retrain.Running`; by default the retrains are kept in the run folder, under `retrain`.
    """
    check_lds(recipe, masks=masks, share=share)
    how: Running = {**running_in(attributor), **running}
    bank = retrain_bank(
        procedure_of(recipe),
        draw_masks(len(recipe.train), masks, share=share, seed=seed),
        repeats=repeats,
        seed=seed,
        **how,
    )
    return LdsTable(results={name: lds(scores, bank) for name, scores in orders.items()}, bank=bank)


def counterfactual_of(
    attributor: Attributor, recipe: Recipe, orders: Mapping[str, Tensor], *, mode: Literal["each", "sum"], **options: Any
) -> Counterfactual:
    """Remove the rows at the top of each order and train again; options as of `whence.evaluate.counterfactual.counterfactual`."""
    check_counterfactual(recipe, remove=options["remove"], mode=mode, queries=options.get("queries"))
    language = mode == "sum" and isinstance(recipe.task, CausalLM) and measure_of(recipe) == "loss"
    return counterfactual(
        {name: scores for name, scores in orders.items() if name != RANDOM},
        procedure_of(recipe),
        mode=mode,
        tokens=tokens_of(recipe, recipe.queries) if language else None,
        **{**running_in(attributor), **options},
    )


def tail_patch_of(
    attributor: Attributor,
    recipe: Recipe,
    orders: Mapping[str, Tensor],
    *,
    queries: Sequence[int] | None = None,
    batch_size: Size = "auto",
    **options: Any,
) -> TailPatch:
    """Step on each query's first rows; options as of `whence.evaluate.tail_patch.tail_patch`. By default of the first 20 queries."""
    chosen = list(queries) if queries is not None else list(range(min(20, len(recipe.queries))))
    check_rows(chosen, len(recipe.queries), "queries")
    with attributor.stages.stage("Tail patch"):
        return tail_patch(
            recipe.model,
            recipe.task,
            [recipe.queries[query] for query in chosen],
            recipe.train,
            {name: scores[chosen] for name, scores in orders.items()},
            collate=recipe.collate,
            device=attributor.device,
            batch_size=rows_at_a_time(batch_size),
            **options,
        )


def duplicates_of(
    attributor: Attributor,
    recipe: Recipe,
    *,
    count: int,
    strategy: Any = "ekfac",
    seed: int = 0,
    batch_size: Size = "auto",
    **inverse: Any,
) -> dict[str, DuplicateRanks]:
    """Ask for `count` training rows themselves and say where each one comes in its own ranking.

    `inverse` is damping and response, as of `Attributor.scores`.
    """
    rows = sample_rows(len(recipe.train), min(count, len(recipe.train)), seed=seed)
    asked = [recipe.train[row] for row in rows]
    options: dict[str, Any] = {"name": "duplicates", "batch_size": batch_size, "overwrite": True}
    found = {
        strategy: attributor.scores(asked, recipe.train, strategy=strategy, **inverse, **options).values,
        "gradient cosine": attributor.scores(asked, recipe.train, strategy="identity", normalize="cosine", **options).values,
        "random": random_scores(len(rows), len(recipe.train), seed=seed),
    }
    return {name: duplicate_ranks(scores, rows) for name, scores in found.items()}


def suspicious_orders(
    attributor: Attributor, recipe: Recipe, *, strategy: Any = "ekfac", batch_size: Size = "auto", **inverse: Any
) -> dict[str, Tensor]:
    """Return rankings `[train]` of suspicious rows, high for rows to look at first: self-influence, gradient norm, loss, chance.

    `inverse` is damping and response, as of `Attributor.self_influence`.
    """
    # Names of their own: what whence self keeps is not replaced.
    options: dict[str, Any] = {"batch_size": batch_size, "overwrite": True}
    values = attributor.self_influence(recipe.train, strategy=strategy, name="mislabeled", **options, **inverse)
    norms = attributor.self_influence(recipe.train, strategy="identity", name="gradient-norm", **options)
    return {
        "self-influence": values.double(),
        "gradient norm": norms.double(),
        "loss": row_losses(attributor, recipe, batch_size=batch_size),
        "random": torch.rand(len(recipe.train), generator=torch.Generator().manual_seed(attributor.seed), dtype=torch.float64),
    }
