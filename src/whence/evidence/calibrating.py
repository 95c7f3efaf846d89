"""Estimates to first order brought to the metrics' units by some real fine-tunes, and judged by others.

The two kinds share no subset: what chose the ridge and the shift between estimate and metric (calibration) does not judge (trust).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Unpack, get_args

import torch

from whence.errors import ConfigError, NumericalError
from whence.evaluate.retrain import Running
from whence.evidence.first_order import FineTunes, Linear, fine_tune
from whence.recipes.base import Recipe
from whence.refit.calibrate import LEAST, Calibration, calibrate, ridge_grid
from whence.refit.gradex import GradexOptions, gradex
from whence.refit.linear import row_curvature
from whence.refit.predict import Predictions, predict
from whence.refit.solve import RefitOptions, refit_groups
from whence.refit.subsets import Subsets
from whence.refit.trust import Trust, same, trust

Method = Literal["refit", "influence", "gradient", "gradex"]
_STEPS: dict[str, int | None] = {"refit": None, "influence": 1, "gradient": 1}
_FLAT = 1e6
"""A ridge so many times the curvature leaves the plain gradient."""


@dataclass(frozen=True, kw_only=True)
class EstimateSettings:
    """How subsets are estimated.

    Attributes:
        method: `"refit"` (until converged), `"influence"` (one Newton step: TRAK), `"gradient"` (the ridge's limit: the sum of the
            rows' gradients, and its product with a validation row's) or `"gradex"` (the published recipe, a baseline).
        metric: what the ridge is chosen by, a metric of `Predictions`.
        ridge: lambda; None: chosen by the calibration runs.
        calibration: real fine-tunes to choose the ridge and the shift by, 4 or more; 0: none, and then a ridge must be given.
        held_out: further ones that only judge; 0: no trust report.
        repeats: seeds of each real fine-tune.
        scale: of `"gradex"`: the length of its move over that of the weights.

    Raises:
        ConfigError: one of them cannot be used, or has no effect.
    """

    method: Method = "refit"
    metric: str = "loss"
    ridge: float | None = None
    calibration: int = 6
    held_out: int = 0
    repeats: int = 1
    scale: float = 0.4

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"method={self.method!r}: choose {', '.join(get_args(Method))}.")
        if self.ridge is not None and self.method not in ("refit", "influence"):
            raise ConfigError(f"ridge={self.ridge!r} is for method refit and influence; {self.method} has none. Leave it out.")
        for name in ("ridge", "scale"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r}: give a number above 0.")
        if self.calibration == 0 and self.ridge is None and self.method in ("refit", "influence"):
            raise ConfigError(f"calibration=0 leaves nothing to choose the ridge by; give ridge=..., or {LEAST} real fine-tunes or more.")
        if 0 != self.calibration < LEAST or self.held_out < 0 or 0 < self.held_out < 3 or self.repeats < 1:
            raise ConfigError(
                f"calibration={self.calibration}, held_out={self.held_out}, repeats={self.repeats}: give 0 or {LEAST} and "
                "more to calibrate, 0 or 3 and more to judge, and 1 repeat or more."
            )

    @property
    def fine_tunes(self) -> int:
        """Subsets that are really fine-tuned on."""
        return self.calibration + self.held_out


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What real fine-tunes say of estimates.

    Attributes:
        options: of the refit: chosen by them, or as given.
        calibration: by metric; empty without fine-tunes to calibrate by.
        trust: by metric; empty without held-out fine-tunes. A metric that has no report is not there.
        unreported: by metric, why it has none, though there are held-out fine-tunes.
    """

    options: RefitOptions
    calibration: dict[str, Calibration]
    trust: dict[str, Trust]
    unreported: dict[str, str] = field(default_factory=dict)


def gather(
    recipe: Recipe, linear: Linear, subsets: Subsets | None, settings: EstimateSettings, *, seed: int, **running: Unpack[Running]
) -> Evidence:
    """Make real fine-tunes, calibrate by the first and judge by the others.

    Args:
        recipe: with `retraining`.
        linear: its model to first order.
        subsets: different ones, `calibration + held_out` of them; None: none.
        settings: how subsets are estimated.
        seed: of the fine-tunes.
        running: of them; see `whence.evaluate.retrain.Running`.
    """
    if subsets is None:
        return Evidence(options=raw_options(linear, settings), calibration={}, trust={})
    real = fine_tune(recipe, linear, subsets, repeats=settings.repeats, seed=seed, **running)
    several = settings.calibration
    found = calibrated(linear, real.take(range(several)), settings) if several else {}
    options = found[settings.metric].options if found else raw_options(linear, settings)
    rest = real.take(range(several, len(subsets))) if settings.held_out else None
    judged, why = ({}, {}) if rest is None else judge(linear, rest, options, settings, found)
    return Evidence(options=options, calibration=found, trust=judged, unreported=why)


def raw_estimates(linear: Linear, subsets: Subsets, options: RefitOptions, settings: EstimateSettings) -> Predictions:
    """Return estimates of subsets before any shift."""
    if settings.method == "gradex":
        return predict(linear.target, gradex(linear.train, subsets.example_masks(), _gradex(linear, settings)))
    found = refit_groups(linear.train, linear.groups.numbers, subsets.members, options)
    return replace(predict(linear.target, found.w), unconverged=found.unconverged)


def calibrated(linear: Linear, real: FineTunes, settings: EstimateSettings) -> dict[str, Calibration]:
    """Choose the ridge by one metric, and for every metric what is added to an estimate.

    A ridge with which a refit does not converge is not chosen.

    Raises:
        NumericalError: there is no other.
    """
    base = raw_options(linear, settings)
    made: dict[RefitOptions, Predictions] = {}

    def estimates(options: RefitOptions) -> Predictions:
        if options not in made:
            made[options] = raw_estimates(linear, real.subsets, options, settings)
        return made[options]

    several = settings.ridge is None and settings.method in ("refit", "influence")
    candidates = [base]
    if several:
        tried = ridge_grid(base, ridges(linear), steps=(base.steps,))
        candidates = [options for options in tried if not estimates(options).unconverged]
    if not candidates:
        raise NumericalError(
            f"none of {len(tried)} ridges from {tried[0].ridge:.3g} to {tried[-1].ridge:.3g} has refits that converge on the calibration "
            "runs; give a greater ridge, or method='influence', which takes one step."
        )
    found: dict[str, Calibration] = {}
    for metric in (settings.metric, *(name for name in linear.start.metrics if name != settings.metric)):
        found[metric] = calibrate(
            lambda options, metric=metric: estimates(options).of(metric),  # type: ignore[misc]
            real.metric(metric),
            candidates,
            constant=float(linear.start.of(metric)[0]),
            adjust=("none", "shift") if len(real.subsets) < 6 else ("none", "shift", "affine"),
        )
        candidates = [found[settings.metric].options]  # the others take its ridge
    return found


def judge(
    linear: Linear, real: FineTunes, options: RefitOptions, settings: EstimateSettings, calibrations: dict[str, Calibration]
) -> tuple[dict[str, Trust], dict[str, str]]:
    """Return a trust report of every metric, from fine-tunes that nothing was chosen by, or why there is none."""
    found = in_units(raw_estimates(linear, real.subsets, options, settings), calibrations)
    reports: dict[str, Trust] = {}
    why: dict[str, str] = {}
    for metric in found.metrics:
        mean = calibrations[metric].mean if metric in calibrations else None
        measured = real.metric(metric)
        if same(measured):
            why[metric] = f"{metric} is {float(measured.mean()):.4g} in all {len(measured)} held-out fine-tunes"
            continue
        reports[metric] = trust(found.of(metric), measured, constant=float(linear.start.of(metric)[0]), mean=mean)
    return reports, why


def in_units(found: Predictions, calibrations: dict[str, Calibration]) -> Predictions:
    """Return estimates with what calibration adds to them."""
    columns = [calibrations[name].apply(found.of(name)) if name in calibrations else found.of(name) for name in found.metrics]
    return replace(found, values=torch.stack(columns, 1))


def ridges(linear: Linear) -> Sequence[float]:
    """Return the ridges that are tried: around the mean curvature of all training rows, per direction."""
    return [_curvature(linear) * 10 ** (power / 2) for power in range(-8, 9)]


def _curvature(linear: Linear) -> float:
    train = linear.train
    weights = train.weights.double() * row_curvature(train.outputs.double(), "logistic")
    return float((weights[:, None] * train.gradients.double().square()).sum()) / train.dimensions


def raw_options(linear: Linear, settings: EstimateSettings) -> RefitOptions:
    """Return how refits are done where no real fine-tune chooses: with the ridge that is given, or one of the curvature's size."""
    if settings.method == "gradient":
        return RefitOptions(ridge=_curvature(linear) * _FLAT, steps=1)
    return RefitOptions(ridge=_curvature(linear) if settings.ridge is None else settings.ridge, steps=_STEPS.get(settings.method))


def _gradex(linear: Linear, settings: EstimateSettings) -> GradexOptions:
    """Return the published recipe with its move as long, in the weights, as it is there."""
    return GradexOptions(weight_norm=linear.weight_norm, parameters=linear.parameters, directions=linear.directions, scale=settings.scale)
