"""How well a ranking finds wrong labels: the share found among the rows that are looked at first.

Rows of equal score are as likely to come in one order as in another, so the share found is the mean over all orders:
a score that is the same for every row does exactly as well as chance, and the order of the data set plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class RecallCurve:
    """Share of the wrong labels found, against the share of rows looked at, from none to all.

    Attributes:
        fractions: rows looked at over rows, float64 `[rows + 1]`, from 0 to 1. A random order finds this share on average.
        recalls: wrong labels among them over wrong labels, float64 `[rows + 1]`, from 0 to 1.
    """

    fractions: Tensor
    recalls: Tensor

    def at(self, fraction: float) -> float:
        """Return the share found in the first `fraction` of the ranking, rounded down to whole rows.

        Raises:
            ConfigError: the fraction is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise ConfigError(f"fraction={fraction!r} is no share of a ranking; give a number from 0 to 1.")
        rows = len(self.fractions) - 1
        # 0.29 * 100 is 28.999...: a share that is meant to be a whole number of rows is one.
        return float(self.recalls[int(fraction * rows + 1e-9)])

    @property
    def area(self) -> float:
        """Area under the curve: 0.5 for a random order on average, `1 - share / 2` for a perfect one."""
        return float(torch.trapezoid(self.recalls, self.fractions))


def recall_curve(scores: Tensor, flipped: Tensor) -> RecallCurve:
    """Rank rows by falling score and count the wrong labels found on the way.

    Args:
        scores: `[row]`, high for rows that should be looked at first.
        flipped: bool `[row]`, which labels are wrong.

    Raises:
        DataError: the sizes differ, a score is NaN, or no label is wrong.
    """
    if scores.dim() != 1 or scores.shape != flipped.shape:
        raise DataError(f"scores have shape {tuple(scores.shape)} and flipped {tuple(flipped.shape)}; give one number of each per row.")
    if torch.isnan(scores).any():
        first = int(torch.isnan(scores).nonzero()[0])
        raise DataError(f"the score of row {first} is NaN, so rows cannot be ranked. Find out where it comes from, or leave the row out.")
    if not flipped.any():
        raise DataError("no label is marked as wrong, so there is nothing to find. Mark the rows that are known to be wrong.")
    ranked, order = torch.sort(scores, descending=True, stable=True)
    wrong = flipped[order].double()
    _, group, sizes = torch.unique_consecutive(ranked, return_inverse=True, return_counts=True)
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group, wrong) / sizes
    found = torch.cat([torch.zeros(1, dtype=torch.float64), means[group].cumsum(0)])
    rows = len(scores)
    return RecallCurve(fractions=torch.arange(rows + 1, dtype=torch.float64) / rows, recalls=(found / wrong.sum()).clamp_(max=1))


def recall_at(scores: Tensor, flipped: Tensor, fraction: float) -> float:
    """Return the share of wrong labels in the first `fraction` of the ranking; see `recall_curve`."""
    return recall_curve(scores, flipped).at(fraction)


def roc_area(scores: Tensor, wrong: Tensor) -> float:
    """Return the probability that a wrong label's row `[train]` has a higher score than a right one's; 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wrong.numpy(), scores.numpy()))
