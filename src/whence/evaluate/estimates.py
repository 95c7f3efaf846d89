"""A mean or share over queries with its 95% interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from whence.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95% interval; low and high are NaN where fewer than two queries leave none to be had."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"

    def to_json(self) -> dict[str, float | list[float] | None]:
        """Return the value and its interval, null where there is none."""
        return {"value": self.value, "interval": None if math.isnan(self.low) else [self.low, self.high]}


def check_resamples(resamples: int) -> None:
    """Check a number of bootstrap samples before long work starts.

    Raises:
        ConfigError: there are fewer than 2 samples.
    """
    if resamples < 2:
        raise ConfigError(f"resamples={resamples!r} gives no interval; use 2 or more, 1000 for two sure digits.")


def bootstrap_weights(count: int, *, resamples: int, seed: int) -> Tensor:
    """Return how much each of `count` items weighs in each bootstrap sample, float64 `[resample, item]`; rows sum to 1.

    Equal counts and seeds give equal draws, so that two methods can be compared sample by sample.

    Raises:
        ConfigError: there are fewer than 2 samples.
    """
    check_resamples(resamples)
    drawn = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))


def middle(samples: Tensor) -> tuple[float, float]:
    """Return the low and the high end of the middle 95% of bootstrap samples, float64 `[resample]`."""
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval_of(value: float, samples: Tensor, *, queries: int) -> Estimate:
    """Return a number with the middle of its bootstrap samples, float64 `[resample]`, as interval."""
    low, high = middle(samples) if queries > 1 else (math.nan, math.nan)
    return Estimate(value=value, low=low, high=high)


def mean_estimate(values: Tensor, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean of `[query]` with its bootstrap interval over queries.

    Raises:
        ConfigError: there are fewer than 2 samples.
    """
    values = values.double()
    samples = bootstrap_weights(len(values), resamples=resamples, seed=seed) @ values
    return interval_of(float(values.mean()), samples, queries=len(values))


def share_estimate(successes: int, trials: int) -> Estimate:
    """Return a share with its interval by E. B. Wilson (1927), which also holds near none and all."""
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return Estimate(value=successes / trials, low=float(interval.low), high=float(interval.high))
