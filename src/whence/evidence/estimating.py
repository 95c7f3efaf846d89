"""How good would fine-tunes on thousands of subsets be: estimates to first order, set right and judged by a few real fine-tunes.

The real fine-tunes are of two kinds that share no subset: some choose the ridge and the shift between estimate and metric
(calibration), the others only judge (trust). Without the latter an estimate comes with the error of calibration alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import pyarrow as pa
import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.retrain import Running
from whence.evidence.first_order import FineTunes, GradientSettings, Linear, at_the_start, fine_tune, linearise_recipe
from whence.recipes.base import Recipe
from whence.refit.calibrate import Calibration, calibrate, ridge_grid
from whence.refit.gradex import GradexOptions, gradex
from whence.refit.linear import row_curvature
from whence.refit.predict import Predictions, predict
from whence.refit.solve import RefitOptions, refit_groups
from whence.refit.subsets import Groups, Subsets, bernoulli, fixed_share, leave_one_group_out, subsets_from_file
from whence.refit.trust import Trust, trust
from whence.storage.run import write_json_atomic, write_table_atomic

Design = Literal["groups", "rows", "bernoulli", "leave-one-out"]
Method = Literal["refit", "influence", "gradient", "gradex"]
_STEPS: dict[str, int | None] = {"refit": None, "influence": 1, "gradient": 1}
_FLAT = 1e6
"""A ridge so many times the curvature leaves the plain gradient."""


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """Which subsets are estimated.

    Attributes:
        count: how many.
        share: of the groups, or of the rows.
        design: `"groups"` (that share of the groups), `"rows"` (groups up to that share of the rows), `"bernoulli"` (each group with
            that probability) or `"leave-one-out"` (all but one group, each in turn).
        file: subsets from a file instead (`whence.refit.subsets.subsets_from_file`).
        seed: of the draws.
    """

    count: int = 1000
    share: float = 0.5
    design: Design = "groups"
    file: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.design not in get_args(Design):
            raise ConfigError(f"design={self.design!r}: choose {', '.join(get_args(Design))}.")

    def draw(self, groups: Groups, *, count: int | None = None, seed: int | None = None) -> Subsets:
        """Return the subsets, or others of the same design."""
        several, drawn = self.count if count is None else count, self.seed if seed is None else seed
        if self.file is not None and count is None:
            return subsets_from_file(self.file, groups)
        if self.design == "leave-one-out" and count is None:
            return leave_one_group_out(groups)
        if self.design == "bernoulli":
            return bernoulli(groups, count=several, share=self.share, seed=drawn)
        return fixed_share(groups, count=several, share=self.share, of="rows" if self.design == "rows" else "groups", seed=drawn)


@dataclass(frozen=True, kw_only=True)
class EstimateSettings:
    """How subsets are estimated.

    Attributes:
        method: `"refit"` (until converged), `"influence"` (one Newton step: TRAK), `"gradient"` (the ridge's limit: the sum of the
            rows' gradients, and its product with a validation row's) or `"gradex"` (the published recipe, a baseline).
        metric: what the ridge is chosen by, a metric of `Predictions`.
        ridge: lambda; None: chosen by the calibration runs.
        calibration: real fine-tunes to choose the ridge and the shift by; 0: none, and then a ridge must be given.
        held_out: further ones that only judge; 0: no trust report.
        repeats: seeds of each real fine-tune.
        scale: of `"gradex"`: the length of its move over that of the weights.
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
        if self.calibration == 0 and self.ridge is None and self.method in ("refit", "influence"):
            raise ConfigError("calibration=0 leaves nothing to choose the ridge by; give ridge=..., or 2 real fine-tunes or more.")
        if self.calibration < 0 or self.calibration == 1 or self.held_out < 0 or 0 < self.held_out < 3 or self.repeats < 1:
            raise ConfigError(
                f"calibration={self.calibration}, held_out={self.held_out}, repeats={self.repeats}: give 0 or 2 and more to calibrate, "
                "0 or 3 and more to judge, and 1 repeat or more."
            )


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """Estimated metrics of subsets.

    Attributes:
        subsets: what they are of.
        predictions: in the metrics' units where there were calibration runs; else as they come.
        start: the metrics of the model as it is.
        calibration: by metric; empty without real fine-tunes.
        trust: by metric; empty without held-out fine-tunes.
        settings: JSON.
    """

    subsets: Subsets
    predictions: Predictions
    start: Predictions
    calibration: dict[str, Calibration]
    trust: dict[str, Trust]
    settings: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a summary for people: no number without what is known of its error."""
        metric = str(self.settings["metric"])
        values = self.predictions.of(metric)
        low, middle, high = values.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=values.dtype)).tolist()
        lines = [f"{len(self.subsets):,} subsets of {len(self.subsets.groups):,} groups; {metric} on {self.predictions.split}"]
        report = self.trust.get(metric)
        told = f"estimated {low:.4g} to {high:.4g}, median {middle:.4g}; {float(self.start.of(metric)[0]):.4g} as the model is"
        if report is not None:
            lines += ([told] if report.beats else []) + report.lines()
        elif metric in self.calibration:
            own = self.calibration[metric]
            better = own.error < min(own.constant_error, own.mean_error)
            lines.append(told if better else "The estimates are worse than a trivial predictor:")
            lines.append(
                f"root mean squared error {own.error:.3g} on {own.runs} calibration runs, each held out in turn; the constant predictor "
                f"{own.constant_error:.3g}, the mean of the others {own.mean_error:.3g}"
            )
        else:
            lines.append("not compared with any real fine-tune: only the order of subsets may mean something. Give --calibration 6.")
        if metric in self.calibration and self.calibration[metric].at_edge:
            lines.append("The best ridge is the least or greatest that was tried.")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, all but the single estimates."""
        return {
            "settings": self.settings,
            "subsets": len(self.subsets),
            "groups": len(self.subsets.groups),
            "start": self.start.to_json(),
            "calibration": {name: one.to_json() for name, one in self.calibration.items()},
            "trust": {name: one.to_json() for name, one in self.trust.items()},
        }

    def save(self, folder: Path) -> None:
        """Write `subsets.json`, `estimates.parquet` (subset, metric, value) and, last, `estimate.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.subsets.save(folder / "subsets.json")
        write_table_atomic(folder / "estimates.parquet", pa.Table.from_pylist(self.predictions.table()))
        write_json_atomic(folder / "estimate.json", self.to_json())


def estimate(
    attributor: Attributor,
    recipe: Recipe,
    *,
    gradients: GradientSettings,
    subsets: SubsetSettings,
    settings: EstimateSettings,
    overwrite: bool = False,
    **running: Unpack[Running],
) -> Estimation:
    """Estimate the metrics of fine-tunes on subsets of a recipe's training rows.

    Args:
        attributor: of the recipe's model, the one to be linearised at: trained on all rows, or on few steps of them.
        recipe: with `retraining`, where real fine-tunes are asked for.
        gradients, subsets, settings: what is measured, of which subsets, and how.
        overwrite: measure gradients anew.
        running: of real fine-tunes; see `whence.evaluate.retrain.Running`.

    Raises:
        ConfigError: settings that cannot be used, or a recipe that has not what they need. Others of `Attributor.linearise`.
    """
    linear = linearise_recipe(attributor, recipe, gradients, overwrite=overwrite)
    drawn = subsets.draw(linear.groups)
    real, several = None, settings.calibration + settings.held_out
    if several:
        chosen = subsets.draw(linear.groups, count=several, seed=subsets.seed + 1)
        real = fine_tune(recipe, linear, chosen, repeats=settings.repeats, seed=subsets.seed, **running)
    calibrations = {} if real is None or not settings.calibration else calibrated(linear, real.take(range(settings.calibration)), settings)
    options = calibrations[settings.metric].options if settings.metric in calibrations else raw_options(linear, settings)
    found = in_units(raw_estimates(linear, drawn, options, settings), calibrations)
    judged = {}
    if real is not None and settings.held_out:
        rest = real.take(range(settings.calibration, several))
        judged = judge(linear, rest, options, settings, calibrations)
    return Estimation(
        subsets=drawn,
        predictions=found,
        start=at_the_start(linear),
        calibration=calibrations,
        trust=judged,
        settings={
            **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(subsets).items()},
            **asdict(settings),
            "gradients": asdict(gradients),
            "options": options.to_json(),
        },
    )


def raw_estimates(linear: Linear, subsets: Subsets, options: RefitOptions, settings: EstimateSettings) -> Predictions:
    """Return estimates of subsets before any shift."""
    if settings.method == "gradex":
        w = gradex(linear.train, subsets.example_masks(), _gradex(linear, settings))
    else:
        w = refit_groups(linear.train, linear.groups.numbers, subsets.members, options).w
    return predict(linear.target, w)


def calibrated(linear: Linear, real: FineTunes, settings: EstimateSettings) -> dict[str, Calibration]:
    """Choose the ridge by one metric, and for every metric what is added to an estimate."""
    start = at_the_start(linear)
    base = raw_options(linear, settings)
    made: dict[RefitOptions, Predictions] = {}

    def estimates(options: RefitOptions) -> Predictions:
        if options not in made:
            made[options] = raw_estimates(linear, real.subsets, options, settings)
        return made[options]

    several = settings.ridge is None and settings.method in ("refit", "influence")
    candidates = ridge_grid(base, ridges(linear), steps=(base.steps,)) if several else [base]
    found: dict[str, Calibration] = {}
    for metric in (settings.metric, *(name for name in start.metrics if name != settings.metric)):
        found[metric] = calibrate(
            lambda options, metric=metric: estimates(options).of(metric),  # type: ignore[misc]
            real.metric(metric),
            candidates,
            constant=float(start.of(metric)[0]),
            adjust=("none", "shift") if len(real.subsets) < 6 else ("none", "shift", "affine"),
        )
        candidates = [found[settings.metric].options]  # the others take its ridge
    return found


def judge(
    linear: Linear, real: FineTunes, options: RefitOptions, settings: EstimateSettings, calibrations: dict[str, Calibration]
) -> dict[str, Trust]:
    """Return a trust report of every metric, from fine-tunes that nothing was chosen by."""
    found, start = in_units(raw_estimates(linear, real.subsets, options, settings), calibrations), at_the_start(linear)
    reports = {}
    for metric in found.metrics:
        mean = calibrations[metric].mean if metric in calibrations else None
        measured = real.metric(metric)
        if bool((measured.mean(1) == measured.mean()).all()) or bool((measured.mean(1) == 0).any()):
            continue  # a metric that does not move, or is 0, has no such report
        reports[metric] = trust(found.of(metric), measured, constant=float(start.of(metric)[0]), mean=mean)
    return reports


def in_units(found: Predictions, calibrations: dict[str, Calibration]) -> Predictions:
    """Return estimates with what calibration adds to them."""
    columns = [calibrations[name].apply(found.of(name)) if name in calibrations else found.of(name) for name in found.metrics]
    return replace(found, values=torch.stack(columns, 1))


def ridges(linear: Linear) -> Sequence[float]:
    """Return the ridges that are tried: around the mean curvature of all training rows, per direction."""
    return [float(_curvature(linear)) * 10 ** (power / 2) for power in range(-8, 9)]


def _curvature(linear: Linear) -> Tensor:
    train = linear.train
    weights = train.weights.double() * row_curvature(train.outputs.double(), "logistic")
    return (weights[:, None] * train.gradients.double().square()).sum() / train.dimensions


def raw_options(linear: Linear, settings: EstimateSettings) -> RefitOptions:
    """Return how refits are done where no real fine-tune chooses: with the ridge that is given, or one of the curvature's size."""
    if settings.method == "gradient":
        return RefitOptions(ridge=float(_curvature(linear)) * _FLAT, steps=1)
    return RefitOptions(ridge=settings.ridge or float(_curvature(linear)), steps=_STEPS.get(settings.method))


def _gradex(linear: Linear, settings: EstimateSettings) -> GradexOptions:
    """Return the published recipe with its lengths in projected space, where the weights' own are not known."""
    return GradexOptions(weight_norm=1.0, parameters=linear.train.dimensions, scale=settings.scale)
