"""How near an index's own scores come to exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

QUERIES, ROWS, BEST = 16, 256, 10


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of the scores of rows as they are stored with exact ones.

    Which rows a query reads is not in it: it is measured on rows that are all read, without the coarse vectors of triplets and
    without an approximate index, which may miss some of the best (docs/results/index.md; `nprobe=0` reads all rows).

    Attributes:
        spearman: rank correlation over the rows, mean over the queries. least: that of the worst query.
        recall: share of the ten best rows by exact scores that are among the ten best by the index, mean over the queries.
        queries, rows: how many were looked at.
    """

    spearman: float
    least: float
    recall: float
    queries: int
    rows: int

    def __str__(self) -> str:
        """Everything in a line."""
        return (
            f"Spearman {self.spearman:.3f} with exact scores (least {self.least:.3f}), {self.recall:.0%} of the ten best, "
            f"on {self.queries} queries and {self.rows} rows"
        )


def fidelity(found: Tensor, exact: Tensor) -> Fidelity:
    """Compare the index's scores with exact ones, both `[query, row]`. Where all scores are equal there is nothing to agree on: 0."""
    correlations = torch.tensor([_spearman(one, other) for one, other in zip(found, exact, strict=True)], dtype=torch.float64)
    best = min(BEST, exact.shape[1])
    return Fidelity(
        spearman=correlations.mean().item(),
        least=correlations.min().item(),
        recall=recall(found, exact, best, best),
        queries=len(exact),
        rows=exact.shape[1],
    )


def recall(found: Tensor, exact: Tensor, best: int, among: int) -> float:
    """Return the share of the `best` rows by exact scores that are `among` so many by the index, mean over queries."""
    wanted, had = exact.topk(best, dim=1).indices, found.topk(among, dim=1).indices
    return float((wanted.unsqueeze(2) == had.unsqueeze(1)).any(2).double().mean())


def drawn_for_fidelity(rows: int, seed: int) -> tuple[list[int], list[int]] | None:
    """Draw places of rows to ask about, and of other rows to score; None where there are too few."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    asked = min(QUERIES, rows // 3)
    return (order[:asked], sorted(order[asked : asked + ROWS])) if asked else None


def _spearman(one: Tensor, other: Tensor) -> float:
    return float(spearmanr(one, other).statistic) if len(one.unique()) > 1 and len(other.unique()) > 1 else 0.0
