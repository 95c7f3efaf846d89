"""The cheap baselines that stand beside scores in every table, made for a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.baselines import (
    BASELINES,
    bm25_scores,
    embedding_scores,
    loss_scores,
    random_scores,
    signed_by_class,
)
from whence.evaluate.embeddings import only_looking
from whence.recipes.base import Recipe
from whence.runtime.batches import iterate_batches
from whence.workbench import Size

Orders = dict[str, Tensor]
"""Scores `[query, train]` by the name they have in a table; higher for rows that push the measurement down."""

_BATCH = 32


def rows_at_a_time(batch_size: Size) -> int:
    """Return the rows per pass where nothing is kept of one, so that memory is no matter: 32 for `"auto"`."""
    return _BATCH if batch_size == "auto" else batch_size


def row_losses(attributor: Attributor, recipe: Recipe, *, batch_size: Size = "auto") -> Tensor:
    """Return the loss of every training row, float64 `[train]`."""
    rows = range(len(recipe.train))
    batches = iterate_batches(recipe.train, rows, batch_size=rows_at_a_time(batch_size), collate=recipe.collate, device=attributor.device)
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


def baseline_scores(
    attributor: Attributor, recipe: Recipe, *, names: Sequence[str] | None = None, seed: int = 0, batch_size: Size = "auto"
) -> Orders:
    """Return the baselines that every table has, those of them that the recipe's rows allow.

    BM25 is of rows that are text. Similarities of classified rows stand there twice, the second time (signed) negative where
    the classes differ.

    Args:
        attributor, recipe: of the model that was scored.
        names: which of `whence.evaluate.baselines.BASELINES`; None: all.
        seed: of the random one.
        batch_size: rows at a time.

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
            made[plain] = _baseline(plain, attributor, recipe, seed, batch_size)
        if name != plain:
            assert recipe.query_classes is not None
            assert recipe.classes is not None
            made[name] = signed_by_class(made[plain], recipe.query_classes, recipe.classes)
    return {name: made[name] for name in wanted}


def _possible(name: str, recipe: Recipe) -> bool:
    text = isinstance(recipe.train[0], Mapping) and recipe.train[0].get("input_ids") is not None
    classified = recipe.classes is not None and recipe.query_classes is not None
    return (text or not name.startswith("bm25")) and (classified or not name.endswith(" signed"))


def _baseline(name: str, attributor: Attributor, recipe: Recipe, seed: int, batch_size: Size) -> Tensor:
    queries, train = recipe.queries, recipe.train
    if name == "random":
        return random_scores(len(queries), len(train), seed=seed)
    if name == "gradient cosine":
        options: dict[str, Any] = {"strategy": "identity", "normalize": "cosine", "name": "gradient-cosine", "overwrite": True}
        return attributor.scores(queries, train, batch_size=batch_size, **options).values
    if name == "loss":
        return loss_scores(row_losses(attributor, recipe, batch_size=batch_size), len(queries))
    with attributor.stages.stage("Baselines"):
        if name == "bm25":
            return bm25_scores(queries, train)
        return embedding_scores(
            recipe.model,
            queries,
            train,
            collate=recipe.collate,
            device=attributor.device,
            batch_size=rows_at_a_time(batch_size),
            task=recipe.task,
        )
