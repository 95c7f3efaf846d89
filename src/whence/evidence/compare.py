"""What is compared when scores are judged: scores, and the cheap baselines that stand beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.baselines import (
    BASELINES,
    bm25_scores,
    embedding_scores,
    loss_scores,
    only_looking,
    random_scores,
    signed_by_class,
)
from whence.evaluate.counterfactual import RANDOM, check_counts, counterfactual
from whence.evaluate.duplicates import DuplicateRanks, duplicate_ranks, sample_rows
from whence.evaluate.lds import Lds, lds
from whence.evaluate.removal import Counterfactual
from whence.evaluate.retrain import RetrainBank, Running, draw_masks, retrain_bank
from whence.evaluate.tail_patch import TailPatch, tail_patch
from whence.evidence.retraining import measure_of, procedure_of, running_in
from whence.recipes.base import Recipe
from whence.recipes.quality import tokens_of
from whence.runtime.batches import check_rows, iterate_batches
from whence.tasks import CausalLM

Orders = dict[str, Tensor]
"""Scores `[query, train]` by the name they have in a table; higher for rows that push the measurement down."""

_BATCH = 32


def row_losses(attributor: Attributor, recipe: Recipe) -> Tensor:
    """Return the loss of every training row, float64 `[train]`."""
    rows = range(len(recipe.train))
    batches = iterate_batches(recipe.train, rows, batch_size=_BATCH, collate=recipe.collate, device=attributor.device)
    parts = []
    with (
        only_looking(recipe.model, attributor.device),
        attributor.stages.stage("Losses"),
        attributor.stages.track(len(rows), "Losses") as advance,
    ):
        for batch in batches:
            parts.append(recipe.task.loss(recipe.model, batch.data).double().cpu())
            advance(len(parts[-1]))
    return torch.cat(parts)


def baseline_scores(attributor: Attributor, recipe: Recipe, *, names: Sequence[str] | None = None, seed: int = 0) -> Orders:
    """Return the baselines that every table has, those of them that the recipe's rows allow.

    BM25 is of rows that are text. Similarities of classified rows stand there twice, the second time (signed) negative where
    the classes differ.

    Args:
        attributor, recipe: of the model that was scored.
        names: which of `whence.evaluate.baselines.BASELINES`; None: all.
        seed: of the random one.

    Raises:
        ConfigError: there is no baseline of a name, or the recipe's rows do not allow one that is named.
    """
    unknown = sorted(set(names or ()) - set(BASELINES))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no baseline; choose from {', '.join(BASELINES)}.")
    wanted = [name for name in (names or BASELINES) if _possible(name, recipe)]
    impossible = sorted(set(names or ()) - set(wanted))
    if impossible:
        needs = "classes of rows and queries" if impossible[0].endswith(" signed") else "rows that are text (input_ids)"
        raise ConfigError(f"the baseline {impossible[0]!r} needs {needs}, which recipe {recipe.name} does not have. Leave it out.")
    made: Orders = {}
    for name in wanted:
        plain = name.removesuffix(" signed")
        if plain not in made:
            made[plain] = _baseline(plain, attributor, recipe, seed)
        if name != plain:
            assert recipe.query_classes is not None
            assert recipe.classes is not None
            made[name] = signed_by_class(made[plain], recipe.query_classes, recipe.classes)
    return {name: made[name] for name in wanted}


def _possible(name: str, recipe: Recipe) -> bool:
    text = isinstance(recipe.train[0], Mapping) and recipe.train[0].get("input_ids") is not None
    classified = recipe.classes is not None and recipe.query_classes is not None
    return (text or not name.startswith("bm25")) and (classified or not name.endswith(" signed"))


def _baseline(name: str, attributor: Attributor, recipe: Recipe, seed: int) -> Tensor:
    queries, train = recipe.queries, recipe.train
    if name == "random":
        return random_scores(len(queries), len(train), seed=seed)
    if name == "gradient cosine":
        options: dict[str, Any] = {"strategy": "identity", "normalize": "cosine", "name": "gradient-cosine", "overwrite": True}
        return attributor.scores(queries, train, **options).values
    if name == "loss":
        return loss_scores(row_losses(attributor, recipe), len(queries))
    with attributor.stages.stage("Baselines"):
        if name == "bm25":
            return bm25_scores(queries, train)
        return embedding_scores(recipe.model, queries, train, collate=recipe.collate, device=attributor.device, task=recipe.task)


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
    attributor: Attributor, recipe: Recipe, orders: Mapping[str, Tensor], *, queries: Sequence[int] | None = None, **options: Any
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
            **options,
        )


def duplicates_of(
    attributor: Attributor, recipe: Recipe, *, count: int, strategy: Any = "ekfac", seed: int = 0, **inverse: Any
) -> dict[str, DuplicateRanks]:
    """Ask for `count` training rows themselves and say where each one comes in its own ranking.

    `inverse` is damping and response, as of `Attributor.scores`.
    """
    rows = sample_rows(len(recipe.train), min(count, len(recipe.train)), seed=seed)
    asked = [recipe.train[row] for row in rows]
    options: dict[str, Any] = {"name": "duplicates", "overwrite": True}
    found = {
        strategy: attributor.scores(asked, recipe.train, strategy=strategy, **inverse, **options).values,
        "gradient cosine": attributor.scores(asked, recipe.train, strategy="identity", normalize="cosine", **options).values,
        "random": random_scores(len(rows), len(recipe.train), seed=seed),
    }
    return {name: duplicate_ranks(scores, rows) for name, scores in found.items()}


def suspicious_orders(attributor: Attributor, recipe: Recipe, *, strategy: Any = "ekfac", **inverse: Any) -> dict[str, Tensor]:
    """Return rankings `[train]` of suspicious rows, high for rows to look at first: self-influence, gradient norm, loss, chance.

    `inverse` is damping and response, as of `Attributor.self_influence`.
    """
    # Names of their own: what whence self keeps is not replaced.
    values = attributor.self_influence(recipe.train, strategy=strategy, name="mislabeled", overwrite=True, **inverse)
    norms = attributor.self_influence(recipe.train, strategy="identity", name="gradient-norm", overwrite=True)
    return {
        "self-influence": values.double(),
        "gradient norm": norms.double(),
        "loss": row_losses(attributor, recipe),
        "random": torch.rand(len(recipe.train), generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    }
