"""How far estimates of fine-tunes can be trusted: measured beside real fine-tunes, and beside two predictors that know nothing.

The constant predictor says that every fine-tune ends at the model as it is, f(theta*), that estimates are taken around: the one
trained on all rows, not what fine-tunes begin at. The mean predictor says the mean of fine-tunes known before. A relative error of
one per cent means little where metrics differ by less; both predictors' errors stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whence.errors import DataError
from whence.evaluate.estimates import Estimate, bootstrap_weights, interval_of, mean_estimate
from whence.evaluate.statistics import dense_ranks, rank_correlations, reliability
from whence.runtime import notebook

FEWEST = 5
"""Of fewer subsets nothing is claimed: chance alone puts 4 in their order once in 24 times, and a bootstrap does not see that."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Estimates beside real fine-tunes that nothing was chosen by. Intervals are 95% bootstrap intervals over subsets.

    Attributes:
        subsets, repeats: real fine-tunes compared with: so many subsets, each trained so many times.
        error: mean of `|predicted - measured| / |measured|`; constant_error, mean_error: the same of the two trivial predictors.
            None where a measurement is 0, so that there is no relative error.
        rmse, constant_rmse, mean_rmse: roots of the mean squared errors, in the metric's units.
        gain: mean squared error of the better trivial predictor less that of the estimates; above 0: the estimates are better.
        spearman: rank correlation of estimates and measurements.
        r2: 1 - squared errors of the estimates / those of the mean predictor.
        rank_reliability: rank correlation of the measured means with those of as many new repeats; NaN with one repeat.
        allowed_r2: what r2 perfect estimates would have, given the noise of retraining; NaN with one repeat.
        mean: what the mean predictor said, or NaN where every subset had the mean of the others.
        settings: whatever the estimates were made with, JSON.
    """

    subsets: int
    repeats: int
    error: Estimate | None
    constant_error: Estimate | None
    mean_error: Estimate | None
    rmse: float
    constant_rmse: float
    mean_rmse: float
    gain: Estimate
    spearman: Estimate
    r2: Estimate
    rank_reliability: float
    allowed_r2: float
    mean: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def relative_spearman(self) -> float:
        """The share of what retraining noise allows: spearman over `sqrt(rank_reliability)`; NaN where that is unknown or nothing."""
        return self.spearman.value / math.sqrt(self.rank_reliability) if self.rank_reliability > 0 else math.nan

    @property
    def relative_r2(self) -> float:
        """The share of what retraining noise allows: r2 over `allowed_r2`; NaN where that is unknown or nothing."""
        return self.r2.value / self.allowed_r2 if self.allowed_r2 > 0 else math.nan

    @property
    def beats(self) -> bool:
        """Whether estimates are surely better than both trivial predictors: the interval of `gain` over `FEWEST` or more lies above 0."""
        return self.subsets >= FEWEST and self.gain.low > 0

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        better = "the constant predictor" if self.constant_rmse <= self.mean_rmse else "the mean of other fine-tunes"
        numbers = f"root mean squared error {self.rmse:.4g}, that of {better} {min(self.constant_rmse, self.mean_rmse):.4g}"
        where = f"{self.subsets} held-out subsets"
        if self.beats:
            return f"The estimates are better than both trivial predictors on {where} ({numbers})."
        if self.subsets < FEWEST:
            few = f"{where} are too few to tell whether they are better than {better}"
            return f"Do not use the estimates: {few} ({numbers}); give {FEWEST} or more."
        if self.spearman.low > 0:
            return (
                f"Do not use the estimates as numbers: on {where} they are not shown to be better than {better} ({numbers}). "
                f"Their order can be used: rank correlation {self.spearman}."
            )
        return f"Do not use the estimates: on {where} they are not shown to be better than {better} ({numbers}), nor to rank subsets."

    def tell(self, value: float) -> str:
        """Return an estimate as text: with its error where estimates beat the trivial predictors, otherwise the verdict alone."""
        return f"{value:.4g} ± {self.rmse:.2g}" if self.beats else self.verdict

    def lines(self) -> list[str]:
        """Return the report for people, the verdict first."""
        return [
            self.verdict,
            "no relative error: the metric is 0 in a fine-tune"
            if self.error is None
            else f"relative error {self.error} (constant predictor {self.constant_error}, mean predictor {self.mean_error})",
            f"rank correlation {self.spearman}; R^2 over the mean predictor {self.r2}",
            "retraining noise is unknown: one repeat of each subset"
            if self.repeats < 2
            else f"retraining noise allows R^2 {self.allowed_r2:.3g} (reached: {self.relative_r2:.1%}) and rank correlation "
            f"{math.sqrt(self.rank_reliability):.3g} (reached: {self.relative_spearman:.1%})",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the verdict first; what there is not is null."""
        values: dict[str, Any] = {"verdict": self.verdict, "beats": self.beats}
        for name in (*self.__dataclass_fields__, "relative_spearman", "relative_r2"):
            value = getattr(self, name)
            values[name] = value.to_json() if isinstance(value, Estimate) else value
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        return values

    def _repr_html_(self) -> str:
        """Return the report for notebooks."""
        return "".join(notebook.paragraph(line) for line in self.lines())


def trust(
    predicted: Tensor,
    measured: Tensor,
    *,
    constant: float,
    mean: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Trust:
    """Compare estimates with real fine-tunes on the same subsets, which nothing may have been chosen or calibrated by.

    Args:
        predicted: the estimated metric, `[subset]`.
        measured: the metric of real fine-tunes, `[subset]` or `[subset, repeat]` (other seeds, the same rows).
        constant: the metric of the model as it is, f(theta*).
        mean: what the mean predictor says: the mean of the fine-tunes that calibration used. None: for each subset the mean of the
            others.
        resamples: bootstrap samples; seed: of them.
        settings: recorded.

    Raises:
        DataError: shapes do not fit, there are fewer than 3 subsets, a number is not finite, or all measurements are the same
            (`same`). ConfigError: fewer than 2 samples.
    """
    predicted, measured = _checked(predicted, measured)
    truth = measured.mean(1)
    count = len(truth)
    others = (truth.sum() - truth) / (count - 1) if mean is None else torch.full_like(truth, mean)
    guesses = torch.stack([predicted, torch.full_like(truth, constant), others])
    squares = (guesses - truth).square()
    rmse = squares.mean(1).sqrt().tolist()
    weights = bootstrap_weights(count, resamples=resamples, seed=seed)
    drawn = weights @ squares.T
    # Both trivial predictors have to be beaten in each sample: the better of them there.
    gains, ratios = drawn[:, 1:].min(1).values - drawn[:, 0], 1 - drawn[:, 0] / drawn[:, 2].clamp(min=1e-300)
    r2 = 1 - float(squares[0].sum() / squares[2].sum())
    relative = [None] * 3 if (truth == 0).any() else list((guesses - truth).abs() / truth.abs())
    errors = [None if row is None else mean_estimate(row, resamples=resamples, seed=seed) for row in relative]
    left, right = dense_ranks(predicted[None]), dense_ranks(truth[None])
    spearman = float(rank_correlations(left, right)[0])
    return Trust(
        subsets=count,
        repeats=measured.shape[1],
        error=errors[0],
        constant_error=errors[1],
        mean_error=errors[2],
        rmse=rmse[0],
        constant_rmse=rmse[1],
        mean_rmse=rmse[2],
        gain=interval_of(min(rmse[1:]) ** 2 - rmse[0] ** 2, gains, queries=count),
        spearman=interval_of(spearman, _rank_samples(left, right, weights), queries=count),
        r2=interval_of(r2, ratios, queries=count),
        rank_reliability=float(reliability(measured[:, :, None])[0]),
        allowed_r2=_allowed(measured),
        mean=math.nan if mean is None else float(mean),
        settings=dict(settings or {}),
    )


def same(measured: Tensor) -> bool:
    """Return whether all subsets, `[subset]` or `[subset, repeat]`, were measured to be the same, but for the rounding of means."""
    truth = measured.double() if measured.dim() == 1 else measured.double().mean(1)
    return bool((truth - truth[0]).abs().max() <= 1e-12 * truth.abs().max())


def _rank_samples(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Return the one row's correlation in bootstrap samples; a sample with one subset only, many times, has none and is left out."""
    samples = rank_correlations(left.expand(len(weights), -1), right.expand(len(weights), -1), weights * left.shape[1])
    real = samples[~torch.isnan(samples)]
    return real if len(real) else torch.full((2,), torch.nan, dtype=torch.float64)


def _allowed(measured: Tensor) -> float:
    """Return the share of the variance of the subsets' means that is not noise of retraining; NaN with one repeat."""
    repeats = measured.shape[1]
    if repeats < 2:
        return math.nan
    noise = float(measured.var(1).mean()) / repeats
    return max(0.0, 1 - noise / float(measured.mean(1).var()))


def _checked(predicted: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float64, measurements `[subset, repeat]`."""
    measured = measured.double()
    measured = measured[:, None] if measured.dim() == 1 else measured
    if predicted.dim() != 1 or measured.dim() != 2 or len(predicted) != len(measured) or len(predicted) < 3:
        raise DataError(
            f"estimates have shape {tuple(predicted.shape)}, measurements {tuple(measured.shape)}; give [subset] and [subset] or "
            "[subset, repeat] of the same 3 subsets or more."
        )
    if not torch.isfinite(predicted).all() or not torch.isfinite(measured).all():
        raise DataError("an estimate or a measurement is not finite; leave its subset out, or find out where it comes from.")
    if same(measured):
        raise DataError("all subsets were measured to be the same, so nothing can be told about estimates; measure subsets that differ.")
    return predicted.double(), measured
