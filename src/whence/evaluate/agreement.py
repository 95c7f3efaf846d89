"""How far two sets of scores agree, query by query: correlations over the training rows, and the rows ranked first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.estimates import check_resamples, mean_estimate


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of two score matrices; symmetric in the two.

    A query whose scores are all equal in either matrix has no ranking to agree with: it is NaN in the vectors and left out of
    the means. Intervals are 95% bootstrap intervals of the mean over queries, NaN where fewer than two queries are left.

    Attributes:
        spearman, pearson: correlation over training rows, from -1 to 1, float64 `[query]`; equal scores share their mean rank.
        overlap: share of the first `k` training rows that both have in common, from 0 to 1, float64 `[query]`; two random
            orders share `k / train`. Among rows tied for the last places each is as likely as another, drawn for the two
            matrices independently, and the share is its mean.
        mean_spearman, mean_pearson, mean_overlap: means over the queries that are not left out.
        spearman_interval, pearson_interval, overlap_interval: low and high end, each.
        k: rows looked at for the overlap: those asked for, or all where there are fewer.
        left_out: number of queries left out.
    """

    spearman: Tensor
    pearson: Tensor
    overlap: Tensor
    mean_spearman: float
    mean_pearson: float
    mean_overlap: float
    spearman_interval: tuple[float, float]
    pearson_interval: tuple[float, float]
    overlap_interval: tuple[float, float]
    k: int
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """Return means, intervals (null where there is none) and counts as JSON values, without the vectors."""
        values: dict[str, Any] = {}
        for name in ("spearman", "pearson", "overlap"):
            low, high = getattr(self, f"{name}_interval")
            values[name] = {"mean": getattr(self, f"mean_{name}"), "interval": None if math.isnan(low) else [low, high]}
        return values | {"k": self.k, "queries": len(self.spearman), "left_out": self.left_out}


def agreement(first: Tensor, second: Tensor, *, k: int = 10, resamples: int = 1000, seed: int = 0) -> Agreement:
    """Compare two matrices of scores of the same queries and training rows.

    Args:
        first, second: scores `[query, train]`.
        k: how many of the first rows to compare.
        resamples: bootstrap samples for the intervals.
        seed: of the samples, the same for all three measures.

    Raises:
        DataError: the shapes differ or hold fewer than two training rows, a score is not finite, or no query has scores that
            vary in both matrices.
        ConfigError: `k` is less than 1 or `resamples` less than 2.
    """
    if k < 1:
        raise ConfigError(f"k={k!r} rows cannot overlap; give 1 or more.")
    check_resamples(resamples)
    left, right = _checked(first, second)
    k = min(k, left.shape[1])
    varies = ((left != left[:, :1]).any(1) & (right != right[:, :1]).any(1)).nonzero().flatten().tolist()
    if not varies:
        raise DataError(f"none of {len(left)} queries has scores that vary over training rows in both matrices, so none can agree.")
    found = torch.full((3, len(left)), torch.nan, dtype=torch.float64)
    for query in varies:  # one at a time: copies in float64 of whole matrices may not fit
        found[:, query] = torch.stack(_compared(left[query].double(), right[query].double(), k))
    spearman, pearson, overlap = (mean_estimate(row, resamples=resamples, seed=seed) for row in found[:, varies])
    return Agreement(
        spearman=found[0],
        pearson=found[1],
        overlap=found[2],
        mean_spearman=spearman.value,
        mean_pearson=pearson.value,
        mean_overlap=overlap.value,
        spearman_interval=(spearman.low, spearman.high),
        pearson_interval=(pearson.low, pearson.high),
        overlap_interval=(overlap.low, overlap.high),
        k=k,
        left_out=len(left) - len(varies),
    )


def _checked(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU."""
    if first.dim() != 2 or first.shape != second.shape or first.shape[0] < 1 or first.shape[1] < 2:
        raise DataError(
            f"scores have the shapes {tuple(first.shape)} and {tuple(second.shape)}. Give two matrices [query, train] of the same "
            "queries and training rows, of which there are two at least."
        )
    for name, scores in (("first", first), ("second", second)):
        wrong = (~scores.isfinite()).nonzero()
        if len(wrong):
            query, row = wrong[0].tolist()
            raise DataError(
                f"the {name} scores have {len(wrong)} values that are not finite, the first at query {query} and training row {row}. "
                "Find out where they come from, or leave the rows out of both."
            )
    return first.detach().cpu(), second.detach().cpu()


def _compared(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return Spearman's and Pearson's correlation and the overlap of two vectors `[train]` that vary."""
    pair = torch.stack([left, right])
    ranks = torch.from_numpy(rankdata(pair.numpy(), axis=1))
    return torch.corrcoef(ranks)[0, 1], torch.corrcoef(pair)[0, 1], _in_first(pair, k).prod(0).sum() / k


def _in_first(values: Tensor, k: int) -> Tensor:
    """Return the probability `[row, item]` that an item is among the `k` greatest of its row, ties broken at random."""
    last = values.topk(k, dim=1).values[:, -1:]
    above, tied = (values > last).double(), (values == last).double()
    return above + tied * (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
