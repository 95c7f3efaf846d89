"""The ridge, and how estimates are brought to the metric's units, chosen on a few real fine-tunes.

Every candidate predicts each fine-tune; what is fitted (a shift, a slope) is fitted on the others. The candidate with the least
squared error is taken. Since the choice was made on these fine-tunes, its own error is too small; `Calibration.error` is that of
the whole procedure: each fine-tune predicted by the candidate that the others alone choose, each of them held out in turn, with the
shift and slope that the others alone fit.

A slope that is not above 0 would make the worst estimate the best: such a fit is never taken.
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
"""What is fitted on top of an estimate: nothing, a constant, or a constant and a slope above 0."""
LEAST, LEAST_AFFINE = 4, 5
"""So many fine-tunes at least: with two left out, what is fitted has data left."""


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
        measured: the metric of the fine-tunes, `[run]` or `[run, repeat]`, 4 runs or more (`affine`: 5). They must not be among
            those that a trust report is made from.
        candidates: what to choose from (`ridge_grid`).
        constant: the metric of the model as it is, f(theta*): what the constant predictor says.
        adjust: what to try to fit on top.

    Raises:
        ConfigError: there is nothing to choose from, or too few fine-tunes. DataError: shapes do not fit, a number is not finite, or
            there is only "affine" and every estimate falls where the measurements rise.
    """
    truth = (measured if measured.dim() == 1 else measured.mean(1)).double()
    _check(truth, candidates, adjust)
    tried: list[tuple[RefitOptions, Adjust]] = []
    squares, rising, fits = [], [], []
    for options in candidates:
        found = estimate(options).double().cpu()
        if found.shape != truth.shape or not torch.isfinite(found).all():
            raise DataError(f"estimates have shape {tuple(found.shape)}; give {len(truth)} finite numbers, one for each fine-tune.")
        for one in adjust:
            tried.append((options, one))
            shift, slope = _fit(found, truth, one, _without_two(len(truth)))
            squares.append((shift + slope.clamp(min=0) * found - truth).square())
            rising.append(slope.diagonal() > 0)
            fits.append(_fit(found, truth, one, torch.ones(len(truth), dtype=torch.bool)))
    own, nested, best = _chosen(torch.stack(squares), torch.stack(rising), [float(slope) for _, slope in fits])
    options, fitted = tried[best]
    ridges = {one.ridge for one in candidates if one.steps == options.steps}
    others = (truth.sum() - truth) / (len(truth) - 1)
    return Calibration(
        options=options,
        adjust=fitted,
        shift=float(fits[best][0]),
        slope=float(fits[best][1]),
        error=float(nested.mean().sqrt()),
        constant_error=float((constant - truth).square().mean().sqrt()),
        mean_error=float((others - truth).square().mean().sqrt()),
        mean=float(truth.mean()),
        runs=len(truth),
        at_edge=len(ridges) > 1 and options.ridge in {min(ridges), max(ridges)},
        table=tuple(
            Candidate(options=options, adjust=one, rmse=float(mean.sqrt())) for (options, one), mean in zip(tried, own.mean(1), strict=True)
        ),
    )


def _check(truth: Tensor, candidates: Sequence[RefitOptions], adjust: Sequence[Adjust]) -> None:
    if not candidates or not adjust:
        raise ConfigError("there is nothing to choose from: give one candidate and one kind of `adjust`, or more.")
    if unknown := [one for one in adjust if one not in get_args(Adjust)]:
        raise ConfigError(f"adjust={unknown[0]!r}: choose among {', '.join(get_args(Adjust))}.")
    need = LEAST_AFFINE if "affine" in adjust else LEAST
    if len(truth) < need:
        raise ConfigError(f"{len(truth)} fine-tunes cannot calibrate with adjust={tuple(adjust)}; give {need} or more.")
    if not torch.isfinite(truth).all():
        raise DataError("a measurement is not finite; leave its fine-tune out, or find out where it comes from.")


def _chosen(pairs: Tensor, rising: Tensor, slopes: Sequence[float]) -> tuple[Tensor, Tensor, int]:
    """Return the squared errors of held-out fine-tunes `[candidate, run]`, those of the whole procedure `[run]`, and the best candidate.

    Args:
        pairs: squared errors `[candidate, run left out, run predicted without both]`.
        rising: whether the slope that is fitted without a run is above 0, bool `[candidate, run]`.
        slopes: those that are fitted on all fine-tunes.
    """
    own = pairs.diagonal(dim1=1, dim2=2)
    # What is held out has no say in the choice by which it is predicted, nor in the fits that the choice is made by.
    inner = (pairs.sum(2) - own).masked_fill(~rising, torch.inf)
    nested = own.gather(0, inner.argmin(0, keepdim=True))[0]
    outer = own.mean(1).masked_fill(torch.tensor(slopes) <= 0, torch.inf)
    best = int(outer.argmin())
    if not torch.isfinite(outer[best]):
        raise DataError("every estimate falls where the measurements rise, so that no slope above 0 fits; allow adjust='shift'.")
    return own, nested, best


def _without_two(runs: int) -> Tensor:
    """Return which runs take part in the fit that predicts run q where run r is left out, bool `[r, q, run]`."""
    same = torch.eye(runs, dtype=torch.bool)
    return ~(same[:, None] | same[None])


def _fit(found: Tensor, truth: Tensor, adjust: Adjust, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and slope of least squares, `[...]`, each among some of the runs, bool `[..., run]`."""
    share = among.double()
    if adjust == "none":
        return torch.zeros_like(share[..., 0]), torch.ones_like(share[..., 0])
    share = share / share.sum(-1, keepdim=True)
    middle, level = (share * found).sum(-1), (share * truth).sum(-1)
    x, y = found - middle[..., None], truth - level[..., None]
    square = (share * x.square()).sum(-1)
    flat = torch.full_like(square, adjust == "shift", dtype=torch.bool)
    flat |= square <= 1e-24 * (share * found.square()).sum(-1)  # estimates that are the same but for rounding have no slope
    slope = torch.where(flat, 1.0, (share * x * y).sum(-1) / square)
    return level - slope * middle, slope
