"""The linear datamodeling score: do scores predict what training on a part of the data does?

For a subset S the scores predict, up to a constant and a positive factor, that measurement q becomes
`-(sum of score[q, t] over t in S)`: training on a row with a positive score pushes the measurement down. The linear
datamodeling score (LDS) of a query is Spearman's correlation, over subsets, of that with the measurement of models trained
on the subsets: A. Ilyas et al., "Datamodels: Predicting Predictions from Training Data" (2022); S. M. Park et al.,
"TRAK: Attributing Model Behavior at Scale" (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.estimates import check_resamples, middle
from whence.evaluate.retrain import RetrainBank
from whence.evaluate.statistics import bootstrap_means, dense_ranks, rank_correlations, reliability

D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Lds:
    """A linear datamodeling score, from -1 to 1, and how far it can be trusted.

    Attributes:
        mean: mean over queries.
        low, high: 95% bootstrap interval of the mean, over queries and subsets, both drawn anew. The retrained models and
            the model that was scored are taken as they are.
        per_query: `[query]`; NaN for queries that were left out because their measurement does not vary.
        reliability: how well the bank's means over repeats would correlate with new ones, mean over queries; NaN where
            there is one repeat.
        ceiling: the score that perfect predictions would reach on this bank on average, mean of `sqrt(reliability)`.
        samples: the mean in each bootstrap sample, `[resample]`.
    """

    mean: float
    low: float
    high: float
    per_query: Tensor
    reliability: float
    ceiling: float
    samples: Tensor

    def minus(self, other: Lds) -> tuple[float, float, float]:
        """Return how much better than `other` this is on the same bank: the difference with its 95% interval.

        Both are looked at in the same bootstrap samples, so that the interval is narrower than those of the two suggest.

        Raises:
            ConfigError: the two were not computed with the same number of samples and queries.
        """
        if self.samples.shape != other.samples.shape or self.per_query.shape != other.per_query.shape:
            raise ConfigError("two scores can be subtracted if they are of the same bank with the same `resamples` and `seed`.")
        return self.mean - other.mean, *middle(self.samples - other.samples)


def predictions(values: Tensor, masks: Tensor) -> Tensor:
    """Return the predicted measurements, `-(sum of values[q, t] over t in S)`, float64 `[query, subset]`.

    Args:
        values: scores `[query, train]`, positive for rows that push the measurement down.
        masks: bool `[subset, train]`.

    Raises:
        DataError: the numbers of training rows differ, or a score is NaN or infinite.
    """
    if values.dim() != 2 or values.shape[1] != masks.shape[1]:
        raise DataError(
            f"scores have shape {tuple(values.shape)}, the subsets are of {masks.shape[1]} rows; give scores [query, train] of those rows."
        )
    if not torch.isfinite(values).all():
        query, row = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise DataError(f"the score of query {query} and row {row} is {values[query, row].item()}. Find out where it comes from.")
    return -(values.double() @ masks.double().T)


def lds(values: Tensor, bank: RetrainBank, *, resamples: int = 1000, seed: int = 0) -> Lds:
    """Return the linear datamodeling score of scores `[query, train]` on a bank of the same queries and rows.

    Queries whose measurement is the same for all subsets are left out. A query whose predictions are all equal has 0.

    Args:
        values: scores, `Scores.values`; any number that is higher for rows that push the measurement down.
        bank: real retrains.
        resamples: bootstrap samples for the interval.
        seed: of the samples; scores that are to be compared by `Lds.minus` need the same.

    Raises:
        DataError: sizes do not fit, a score is not finite, there are fewer than 3 subsets, or no query varies.
        ConfigError: there are fewer than 2 samples.
    """
    check_resamples(resamples)
    predicted, measured = _ranks(values, bank)
    varies = measured.max(1).values > 0
    if len(bank.masks) < 3 or not varies.any():
        raise DataError(f"no correlation can be taken: {len(bank.masks)} subsets (3 are needed), {int(varies.sum())} queries that vary.")
    per_query = rank_correlations(predicted, measured)
    samples = bootstrap_means(predicted[varies], measured[varies], resamples=resamples, seed=seed)
    trust = reliability(bank.measurements)[varies]
    low, high = middle(samples)
    return Lds(
        mean=float(per_query[varies].mean()),
        low=low,
        high=high,
        per_query=per_query,
        reliability=float(trust.mean()),
        ceiling=float(trust.sqrt().mean()),
        samples=samples,
    )


@dataclass(frozen=True, kw_only=True)
class Calibration(Generic[D]):
    """What calibration subsets say about damping and units.

    Attributes:
        damping: the one of the best mean score.
        scale: factor on `Scores.removal_effect()` that brings it to what was measured, by least squares over all queries
            and subsets together. It holds for removing as many rows as the subsets leave out, and is less than one where
            the effect of a row falls off with what is left.
        table: every damping with its mean score, in the order given.
    """

    damping: D
    scale: float
    table: tuple[tuple[D, float], ...]


def calibrate(values: Callable[[D], Tensor], dampings: Sequence[D], bank: RetrainBank) -> Calibration[D]:
    """Choose the damping whose scores predict the calibration subsets best; of equals, the first.

    Args:
        values: gives scores `[query, train]` for a damping.
        dampings: what to choose from.
        bank: the calibration side of `RetrainBank.split`; the side that is reported is refused.

    Raises:
        ConfigError: there is no damping, or the bank is the reported side of a split. DataError: as for `lds`.
    """
    if not dampings:
        raise ConfigError("there is no damping to choose from; give one or more.")
    if bank.settings.get("part") == "reported":
        raise ConfigError("these subsets are to be reported, so nothing may be chosen by them. Give the other side of RetrainBank.split.")
    table: list[tuple[D, float]] = []
    scales = []
    for damping in dampings:
        scores = values(damping)
        table.append((damping, mean_lds(scores, bank)))
        scales.append(removal_scale(scores, bank))
    best = max(range(len(table)), key=lambda number: table[number][1])
    return Calibration(damping=table[best][0], scale=scales[best], table=tuple(table))


def mean_lds(values: Tensor, bank: RetrainBank) -> float:
    """Return the mean of `lds` alone, without an interval.

    Raises:
        DataError: as for `lds`.
    """
    correlations = rank_correlations(*_ranks(values, bank))
    if torch.isnan(correlations).all():
        raise DataError("no correlation can be taken: the measurement of no query varies over these subsets.")
    return float(correlations.nanmean())


def removal_scale(values: Tensor, bank: RetrainBank) -> float:
    """Return the factor between predicted and measured effect of removal, by least squares.

    Predicted is the sum of `values[q, t] / N` over the rows left out, N = all rows; measured is the mean over repeats. Each
    query's mean over subsets is taken off both, since the bank holds no model trained on all rows. 0 if nothing is predicted.

    Raises:
        DataError: as for `predictions`.
    """
    measured = bank.mean.T
    # The rows left out are all rows but those of the subset: the same up to a constant of the query.
    predicted = predictions(values, bank.masks) / bank.masks.shape[1]
    predicted, measured = (side - side.mean(1, keepdim=True) for side in (predicted, measured))
    square = float(predicted.square().sum())
    return float((predicted * measured).sum()) / square if square else 0.0


def _ranks(values: Tensor, bank: RetrainBank) -> tuple[Tensor, Tensor]:
    """Return dense ranks of predictions and measurements, `[query, subset]` each."""
    if len(values) != bank.measurements.shape[2]:
        raise DataError(f"scores are of {len(values)} queries, measurements of {bank.measurements.shape[2]}; they must be the same ones.")
    return dense_ranks(predictions(values, bank.masks)), dense_ranks(bank.mean.T)
