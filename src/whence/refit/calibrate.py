"""The ridge, and how estimates are brought to the metric's units, chosen on a few real fine-tunes.

Every candidate predicts each fine-tune; what is fitted (a shift, a slope) is fitted on the others. The candidate with the least
squared error is taken. Since the choice was made on these fine-tunes, its own error is too small; `Calibration.error` is that of
the whole procedure: each fine-tune predicted by the candidate that the others alone choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.solve import RefitOptions

Adjust = Literal["none", "shift", "affine"]
"""What is fitted on top of an estimate: nothing, a constant, or a constant and a slope."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to estimate, tried.

    Attributes:
        options: of the refit.
        adjust: what was fitted on top.
        rmse: root mean squared error, each fine-tune held out in turn.
    """

    options: RefitOptions
    adjust: Adjust
    rmse: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What real fine-tunes say about a refit.

    Attributes:
        options: of the refit that was chosen.
        adjust: what is fitted on top; shift, slope: the fit on all fine-tunes, `shift + slope * estimate`.
        error: root mean squared error of the procedure, choice included.
        constant_error, mean_error: of f(theta*), and of the mean of the other fine-tunes.
        mean: of the fine-tunes, what the mean predictor says of others.
        runs: how many fine-tunes.
        at_edge: whether the chosen ridge is the least or greatest that was tried: try beyond it.
        table: all that was tried, in the order given.
    """

    options: RefitOptions
    adjust: Adjust
    shift: float
    slope: float
    error: float
    constant_error: float
    mean_error: float
    mean: float
    runs: int
    at_edge: bool
    table: tuple[Candidate, ...]

    def apply(self, estimates: Tensor) -> Tensor:
        """Return estimates in the metric's units, of the same shape."""
        return self.shift + self.slope * estimates

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in {"options", "table"}}
        table = [{"options": one.options.to_json(), "adjust": one.adjust, "rmse": one.rmse} for one in self.table]
        return {"options": self.options.to_json(), **plain, "table": table}


def ridge_grid(base: RefitOptions, ridges: Sequence[float], *, steps: Sequence[int | None] = (None,)) -> list[RefitOptions]:
    """Return refit options with every ridge and number of steps, the rest as `base`."""
    return [replace(base, ridge=ridge, steps=number) for number in steps for ridge in ridges]


def calibrate(
    estimate: Callable[[RefitOptions], Tensor],
    measured: Tensor,
    candidates: Sequence[RefitOptions],
    *,
    constant: float,
    adjust: Sequence[Adjust] = ("none", "shift"),
) -> Calibration:
    """Choose refit options by a few real fine-tunes; of equals, the first.

    Args:
        estimate: gives the estimated metric of the fine-tunes' subsets, `[run]`, for options.
        measured: the metric of the fine-tunes, `[run]` or `[run, repeat]`, 2 runs or more (`affine`: 4). They must not be among
            those that a trust report is made from.
        candidates: what to choose from (`ridge_grid`).
        constant: the metric before fine-tuning, f(theta*).
        adjust: what to try to fit on top.

    Raises:
        ConfigError: there is nothing to choose from, or too few fine-tunes. DataError: shapes do not fit, or a number is not finite.
    """
    truth = (measured if measured.dim() == 1 else measured.mean(1)).double()
    _check(truth, candidates, adjust)
    tried: list[tuple[RefitOptions, Adjust]] = []
    errors, values = [], []
    for options in candidates:
        found = estimate(options).double().cpu()
        if found.shape != truth.shape or not torch.isfinite(found).all():
            raise DataError(f"estimates have shape {tuple(found.shape)}; give {len(truth)} finite numbers, one for each fine-tune.")
        for one in adjust:
            tried.append((options, one))
            values.append(found)
            errors.append(_held_out(found, truth, one))
    squares = torch.stack(errors).square()  # [candidate, run]
    best = int(squares.mean(1).argmin())
    # What is held out has no say in the choice by which it is predicted.
    without = squares.sum(1, keepdim=True) - squares
    nested = squares.gather(0, without.argmin(0, keepdim=True))[0]
    options, fitted = tried[best]
    shift, slope = _fit(values[best], truth, fitted)
    ridges = {one.ridge for one in candidates if one.steps == options.steps}
    others = (truth.sum() - truth) / (len(truth) - 1)
    return Calibration(
        options=options,
        adjust=fitted,
        shift=shift,
        slope=slope,
        error=float(nested.mean().sqrt()),
        constant_error=float((constant - truth).square().mean().sqrt()),
        mean_error=float((others - truth).square().mean().sqrt()),
        mean=float(truth.mean()),
        runs=len(truth),
        at_edge=len(ridges) > 1 and options.ridge in {min(ridges), max(ridges)},
        table=tuple(
            Candidate(options=options, adjust=one, rmse=float(own.mean().sqrt()))
            for (options, one), own in zip(tried, squares, strict=True)
        ),
    )


def _check(truth: Tensor, candidates: Sequence[RefitOptions], adjust: Sequence[Adjust]) -> None:
    if not candidates or not adjust:
        raise ConfigError("there is nothing to choose from: give one candidate and one kind of `adjust`, or more.")
    if unknown := [one for one in adjust if one not in get_args(Adjust)]:
        raise ConfigError(f"adjust={unknown[0]!r}: choose among {', '.join(get_args(Adjust))}.")
    need = 4 if "affine" in adjust else 2
    if len(truth) < need:
        raise ConfigError(f"{len(truth)} fine-tunes cannot calibrate with adjust={tuple(adjust)}; give {need} or more.")
    if not torch.isfinite(truth).all():
        raise DataError("a measurement is not finite; leave its fine-tune out, or find out where it comes from.")


def _held_out(found: Tensor, truth: Tensor, adjust: Adjust) -> Tensor:
    """Return the error of each fine-tune with what the others fit, `[run]`."""
    errors = torch.empty_like(truth)
    for run in range(len(truth)):
        rest = torch.arange(len(truth)) != run
        shift, slope = _fit(found[rest], truth[rest], adjust)
        errors[run] = shift + slope * found[run] - truth[run]
    return errors


def _fit(found: Tensor, truth: Tensor, adjust: Adjust) -> tuple[float, float]:
    """Return shift and slope of least squares."""
    if adjust == "none":
        return 0.0, 1.0
    x, y = found - found.mean(), truth - truth.mean()
    square = float(x.square().sum())
    slope = 1.0 if adjust == "shift" or square == 0 else float((x * y).sum()) / square
    return float(truth.mean()) - slope * float(found.mean()), slope
