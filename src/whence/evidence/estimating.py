"""How good would fine-tunes on thousands of subsets be: estimates to first order, set right and judged by a few real fine-tunes.

Some real fine-tunes choose the ridge and the shift between estimate and metric (calibration), others only judge (trust). Without the
latter an estimate comes with the error of calibration alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import pyarrow as pa
import torch

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.retrain import Running
from whence.evidence.calibrating import EstimateSettings, gather, in_units, raw_estimates
from whence.evidence.first_order import GradientSettings, check_recipe, linearise_recipe
from whence.recipes.base import Recipe
from whence.refit.calibrate import Calibration
from whence.refit.predict import Predictions
from whence.refit.subsets import Groups, Subsets, bernoulli, fixed_share, leave_one_group_out, subsets_from_file
from whence.refit.trust import Trust
from whence.storage.run import write_json_atomic, write_table_atomic
from whence.workbench import Size

Design = Literal["groups", "rows", "bernoulli", "leave-one-out"]
_DRAWS = 16
"""So many subsets are drawn for each that is to differ from the others."""


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
        if self.count < 1 or not 0 < self.share < 1:
            raise ConfigError(f"count={self.count!r}, share={self.share!r}: give 1 subset or more, and a share between 0 and 1.")
        if self.file is not None and not self.file.is_file():
            raise ConfigError(f"{self.file}: there is no such file of subsets.")

    def draw(self, groups: Groups) -> Subsets:
        """Return the subsets to be estimated."""
        if self.file is not None:
            return subsets_from_file(self.file, groups)
        if self.design == "leave-one-out":
            return leave_one_group_out(groups)
        return self._random(groups, self.count, self.seed)

    def draw_real(self, groups: Groups, count: int) -> Subsets:
        """Return different subsets of the same design for real fine-tunes: `count` of a file's, else drawn with a seed of their own.

        A larger count adds subsets to those of a smaller one.

        Raises:
            ConfigError: there are not so many different ones.
        """
        if self.file is not None or self.design == "leave-one-out":
            drawn = self.draw(groups)
            drawn = drawn.take(torch.randperm(len(drawn), generator=torch.Generator().manual_seed(self.seed + 1)).tolist())
        else:
            drawn = self._random(groups, _DRAWS * count, self.seed + 1)
        first: dict[tuple[bool, ...], int] = {}
        for place, own in enumerate(drawn.members.tolist()):
            first.setdefault(tuple(own), place)
        if len(first) < count:
            raise ConfigError(
                f"{count} real fine-tunes need as many different subsets, and there are {len(first)}. Make smaller groups or more subsets, "
                "or ask for fewer to calibrate and to judge by; few subsets are better fine-tuned on than estimated."
            )
        return drawn.take(list(first.values())[:count])

    def _random(self, groups: Groups, count: int, seed: int) -> Subsets:
        if self.design == "bernoulli":
            return bernoulli(groups, count=count, share=self.share, seed=seed)
        return fixed_share(groups, count=count, share=self.share, of="rows" if self.design == "rows" else "groups", seed=seed)


@dataclass(frozen=True, kw_only=True)
class Estimation:
    """Estimated metrics of subsets.

    Attributes:
        subsets: what they are of.
        predictions: in the metrics' units where there were calibration runs; else as they come.
        start: the metrics of the model as it is, measured.
        calibration: by metric; empty without real fine-tunes.
        trust: by metric; empty without held-out fine-tunes.
        unreported: by metric, why there is no trust report, though there are held-out fine-tunes.
        settings: JSON.
    """

    subsets: Subsets
    predictions: Predictions
    start: Predictions
    calibration: dict[str, Calibration]
    trust: dict[str, Trust]
    unreported: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a summary for people: no number without what is known of its error."""
        metric = str(self.settings["metric"])
        values = self.predictions.of(metric)
        low, middle, high = values.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=values.dtype)).tolist()
        lines = [f"{len(self.subsets):,} subsets of {len(self.subsets.groups):,} groups; {metric} on {self.predictions.split}"]
        report, calibration = self.trust.get(metric), self.calibration.get(metric)
        told = f"estimated {low:.4g} to {high:.4g}, median {middle:.4g}; {float(self.start.of(metric)[0]):.4g} as the model is"
        if report is not None:
            lines += [*([told] if report.beats else []), *report.lines()]
        else:
            if metric in self.unreported:
                lines.append(f"No report: {self.unreported[metric]}.")
            lines += judgement(calibration, told)
        if calibration is not None and calibration.at_edge:
            lines.append("The best ridge is the least or greatest that was tried.")
        if lost := self.predictions.unconverged:
            lines.append(f"{lost:,} refits did not converge: do not use their estimates; give a greater ridge.")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, all but the single estimates."""
        return {
            "settings": self.settings,
            "subsets": len(self.subsets),
            "groups": len(self.subsets.groups),
            "unconverged": self.predictions.unconverged,
            "start": self.start.to_json(),
            "calibration": {name: one.to_json() for name, one in self.calibration.items()},
            "trust": {name: one.to_json() for name, one in self.trust.items()},
            "unreported": self.unreported,
        }

    def save(self, folder: Path) -> None:
        """Write `subsets.json`, `estimates.parquet` (subset, metric, value) and, last, `estimate.json` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.subsets.save(folder / "subsets.json")
        names, values = self.predictions.metrics, self.predictions.values
        columns = {
            "subset": torch.arange(len(values)).repeat_interleave(len(names)).numpy(),
            "metric": list(names) * len(values),
            "value": values.flatten().numpy(),
        }
        write_table_atomic(folder / "estimates.parquet", pa.table(columns))
        write_json_atomic(folder / "estimate.json", self.to_json())


def judgement(calibration: Calibration | None, told: str) -> list[str]:
    """Return `told`, a sentence with estimates, only where calibration runs were predicted better than by a trivial predictor, and why."""
    if calibration is None:
        return ["not compared with any real fine-tune: only the order of subsets may mean something. Give --calibration 6."]
    # By more than rounding: under a very large ridge the shift alone is the mean predictor.
    better = calibration.error < 0.99 * min(calibration.constant_error, calibration.mean_error)
    return [
        told if better else "The estimates are no better than a trivial predictor:",
        f"root mean squared error {calibration.error:.3g} on {calibration.runs} calibration runs, each held out in turn; the constant "
        f"predictor {calibration.constant_error:.3g}, the mean of the others {calibration.mean_error:.3g}",
    ]


def estimate(
    attributor: Attributor,
    recipe: Recipe,
    *,
    gradients: GradientSettings,
    subsets: SubsetSettings,
    settings: EstimateSettings,
    batch_size: Size = "auto",
    overwrite: bool = False,
    **running: Unpack[Running],
) -> Estimation:
    """Estimate the metrics of fine-tunes on subsets of a recipe's training rows.

    Args:
        attributor: of the recipe's model, the one to be linearised at: trained on all rows, or on few steps of them.
        recipe: with `retraining`, where real fine-tunes are asked for.
        gradients, subsets, settings: what is measured, of which subsets, and how.
        batch_size: rows at a time; changes no result beyond rounding.
        overwrite: measure gradients anew.
        running: of real fine-tunes; see `whence.evaluate.retrain.Running`.

    Raises:
        ConfigError: settings that cannot be used, or a recipe that has not what they need. Others of `Attributor.linearise`.
    """
    several = settings.fine_tunes
    check_recipe(recipe, by=gradients.by, metric=settings.metric, fine_tunes=several > 0)
    linear = linearise_recipe(attributor, recipe, gradients, batch_size=batch_size, overwrite=overwrite)
    drawn = subsets.draw(linear.groups)
    chosen = subsets.draw_real(linear.groups, several) if several else None
    evidence = gather(recipe, linear, chosen, settings, seed=subsets.seed, **running)
    with attributor.stages.stage("Refit"):
        found = in_units(raw_estimates(linear, drawn, evidence.options, settings), evidence.calibration)
    return Estimation(
        subsets=drawn,
        predictions=found,
        start=linear.start,
        calibration=evidence.calibration,
        trust=evidence.trust,
        unreported=evidence.unreported,
        settings={
            **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(subsets).items()},
            **asdict(settings),
            "gradients": asdict(gradients),
            "options": evidence.options.to_json(),
        },
    )
