"""Rank correlations row by row, with repeated items and ties, and the reliability of repeated measurements.

Spearman's correlation is Pearson's of the ranks, where equal values share their mean rank. An item that counts `w` times
(in a bootstrap sample) takes `w` neighbouring ranks and has their mean.
"""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor


def dense_ranks(values: Tensor) -> Tensor:
    """Return which distinct value of its row, from 0 for the smallest, each entry of `[row, item]` is (int64)."""
    return torch.from_numpy(rankdata(values.double().numpy(), method="dense", axis=-1)).long() - 1


def mid_ranks(dense: Tensor, weights: Tensor) -> Tensor:
    """Return the ranks `[row, item]`, up to a constant, of items that count so many times; `dense` as of `dense_ranks`.

    `weights` are `[item]`, or `[row, item]` where rows have weights of their own.
    """
    spread = weights.expand(dense.shape).contiguous()
    mass = torch.zeros(dense.shape, dtype=weights.dtype).scatter_add_(1, dense, spread)
    return (mass.cumsum(1) - mass / 2).gather(1, dense)


def rank_correlations(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Spearman's correlation `[row]` of two matrices `[row, item]` given as dense ranks; `weights` as for `mid_ranks`.

    Where `right` has one value only there is none, and the result is NaN. Where only `left` does, it says nothing about
    `right`, and the result is 0.
    """
    if weights is None:
        weights = torch.ones(left.shape[1], dtype=torch.float64)
    x, y = mid_ranks(left, weights), mid_ranks(right, weights)
    total = weights.sum(-1, keepdim=True)
    x, y = (ranks - ((ranks * weights).sum(1, keepdim=True) / total) for ranks in (x, y))
    xx, xy, yy = ((weights * product).sum(1) for product in (x * x, x * y, y * y))
    # Ranks are multiples of a half and their variance is at least of order 1 where there are two values.
    correlation = xy / (xx * yy).sqrt()
    correlation = torch.where(xx < 1e-9, 0.0, correlation)
    return torch.where(yy < 1e-9, torch.nan, correlation).clamp(-1, 1)


def bootstrap_means(left: Tensor, right: Tensor, *, resamples: int, seed: int) -> Tensor:
    """Return the mean correlation over rows of `resamples` bootstrap samples, float64 `[resample]`.

    Rows and items are drawn anew, with replacement, each independently of the other (A. Owen, "The pigeonhole
    bootstrap", 2007): the result speaks of other rows and other items, and its intervals are slightly too wide rather
    than too narrow. Dense ranks as for `rank_correlations`. Equal seeds give equal draws, so that two methods can be
    compared sample by sample.
    """
    rows, items = left.shape
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        items_drawn, rows_drawn = (
            torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double() for count in (items, rows)
        )
        correlations = rank_correlations(left, right, items_drawn)
        real = ~torch.isnan(correlations) & (rows_drawn > 0)
        means[number] = (correlations * rows_drawn)[real].sum() / rows_drawn[real].sum()
    return means


def reliability(measurements: Tensor, *, splits: int = 50, seed: int = 0) -> Tensor:
    """Return how well the mean over repeats would correlate with that of as many new repeats, `[query]`, from 0 to 1.

    `measurements` is `[subset, repeat, query]`. Repeats are split into two halves at random (one is left out if they are
    odd in number), the rank correlation over subsets of the halves' means is averaged over the splits, and carried to all
    repeats by the formula of C. Spearman and W. Brown (1910): `n r / (1 + (n - 1) r)`, n = repeats per half.
    NaN with one repeat, and for a query that does not vary.
    """
    repeats = measurements.shape[1]
    if repeats < 2:
        return torch.full((measurements.shape[2],), torch.nan, dtype=torch.float64)
    half = repeats // 2
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(splits if repeats > 2 else 1):
        order = torch.randperm(repeats, generator=generator)
        sides = [dense_ranks(measurements[:, part].mean(1).T) for part in (order[:half], order[half : 2 * half])]
        found.append(rank_correlations(*sides))
    # Below zero is noise about zero; the formula would turn it into anything.
    correlation, longer = torch.stack(found).mean(0).clamp(min=0), repeats / half
    return longer * correlation / (1 + (longer - 1) * correlation)
