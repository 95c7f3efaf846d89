"""Planted duplicates: does a query find its own copy among the training rows?

A check that scores belong to the rows they are said to belong to, in minutes and with a known answer. Two ways:

- no training: ask about some training rows themselves. `rows = sample_rows(len(train), 20)`, score `[train[row] for row in
  rows]` as queries, and `duplicate_ranks(scores, rows)`.
- training with copies: `plant` appends copies of some queries to the training rows; train on `planted.train`, score
  `planted.queries`, and `duplicate_ranks(scores, planted.positions)`.

What it says: with cosine-normalised gradient products a copy has the highest score there is, so a rank above 1 is a fault, or
a second copy in the data. Scores that are not normalised need not put a copy first: a row that is fitted well has a small
gradient, and rows of larger ones may matter more. So this tests plumbing and likeness, not how well effects are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from whence.errors import ConfigError, DataError
from whence.evaluate.estimates import Estimate, check_resamples, mean_estimate, share_estimate
from whence.runtime.batches import check_dataset, check_rows


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Training rows with copies of queries at their end.

    Attributes:
        train: the training rows, then the copies; rows are read from the data sets they come from.
        queries: the queries that were copied.
        chosen: which of all queries these are.
        positions: where in `train` the copy of each is.
    """

    train: ConcatDataset[Any]
    queries: Subset[Any]
    chosen: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DuplicateRanks:
    """Where the planted rows came in the rankings of their queries.

    Attributes:
        ranks: from 1 for the highest score, float64 `[query]`; among equal scores the mean of their ranks.
        rows: how many rows were ranked; random scores have mean rank `(rows + 1) / 2`.
        resamples, seed: of the bootstrap over queries.
    """

    ranks: Tensor
    rows: int
    resamples: int = 1000
    seed: int = 0

    @property
    def mean_reciprocal(self) -> Estimate:
        """Mean over queries of 1 / rank: 1 if every copy came first."""
        return mean_estimate(self.ranks.reciprocal(), resamples=self.resamples, seed=self.seed)

    def recall(self, k: int = 10) -> Estimate:
        """Return the share of queries whose copy is among the first `k` rows, with Wilson's interval.

        Raises:
            ConfigError: `k` is less than 1.
        """
        if k < 1:
            raise ConfigError(f"k={k!r} rows can hold no copy; give 1 or more.")
        return share_estimate(int((self.ranks <= k).sum()), len(self.ranks))

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        recalls = {f"recall_at_{k}": self.recall(k).to_json() for k in (1, 10)}
        return {"queries": len(self.ranks), "rows": self.rows, "mean_reciprocal_rank": self.mean_reciprocal.to_json(), **recalls}


def sample_rows(rows: int, count: int, *, seed: int = 0) -> list[int]:
    """Draw `count` of `rows` rows without replacement, rising.

    Raises:
        ConfigError: there are not as many.
    """
    if not 0 < count <= rows:
        raise ConfigError(f"count={count!r} of {rows} rows cannot be drawn; give 1 to {rows}.")
    return sorted(torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def plant(train: Any, queries: Any, *, count: int, seed: int = 0) -> Planted:
    """Append copies of `count` queries, drawn by the seed, to the training rows.

    Args:
        train, queries: rows of one kind, which one collate function can join.
        count: how many queries.
        seed: of the draw.

    Raises:
        ConfigError: there are not as many queries. DataError: a data set is empty or none.
    """
    rows = check_dataset(train, "training")
    chosen = sample_rows(check_dataset(queries, "query"), count, seed=seed)
    copies = Subset(queries, chosen)
    return Planted(
        train=ConcatDataset([train, copies]), queries=copies, chosen=tuple(chosen), positions=tuple(range(rows, rows + len(chosen)))
    )


def duplicate_ranks(scores: Tensor, positions: Sequence[int], *, resamples: int = 1000, seed: int = 0) -> DuplicateRanks:
    """Return where each query's copy comes in its ranking.

    Args:
        scores: `[query, train]`, high for rows that should come first.
        positions: the training row that is each query's copy, `[query]`.
        resamples, seed: of the bootstrap over queries.

    Raises:
        DataError: sizes do not fit or a score is NaN. ConfigError: a position is no row, or there are fewer than 2 samples.
    """
    if scores.dim() != 2 or len(scores) != len(positions):
        raise DataError(f"scores have shape {tuple(scores.shape)} for {len(positions)} copies; give [query, train] and one copy per query.")
    if torch.isnan(scores).any():
        query, row = torch.isnan(scores).nonzero()[0].tolist()
        raise DataError(f"the score of query {query} and row {row} is NaN, so rows cannot be ranked. Find out where it comes from.")
    check_resamples(resamples)
    copies = torch.tensor(check_rows(positions, scores.shape[1], "positions"), device=scores.device)
    own = scores.gather(1, copies.unsqueeze(1))
    above, equal = (scores > own).sum(1), (scores == own).sum(1)
    ranks = above.double() + (equal.double() + 1) / 2
    return DuplicateRanks(ranks=ranks.cpu(), rows=scores.shape[1], resamples=resamples, seed=seed)
