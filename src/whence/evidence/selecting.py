"""From a recipe to the data set that estimates say is best to fine-tune on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.cleaned import Cleaned, check_out, write_cleaned
from whence.evaluate.decision import BELOW, BY_SCORE, Decision
from whence.evaluate.retrain import Running
from whence.evidence.estimating import EstimateSettings, SubsetSettings, calibrated, raw_options
from whence.evidence.first_order import GradientSettings, fine_tune, linearise_recipe
from whence.recipes.base import Recipe
from whence.refit.calibrate import Calibration
from whence.refit.limits import Constraints, Limits
from whence.refit.problem import Problem
from whence.refit.select import Selection, SelectOptions, select


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Chosen rows, written.

    Attributes:
        selection: which groups, and how.
        calibration: what real fine-tunes say of the estimates that chose; None without any.
        written: the files.
    """

    selection: Selection
    calibration: Calibration | None
    written: Cleaned

    def lines(self) -> list[str]:
        """Return the summary for people."""
        known = "its estimates were not compared with any real fine-tune"
        if self.calibration is not None:
            own = self.calibration
            trivial = min(own.constant_error, own.mean_error)
            known = f"estimates err by {own.error:.3g} on {own.runs} calibration runs, the better trivial predictor by {trivial:.3g}"
            known += "" if own.error < trivial else ": do not trust this selection"
        return [*self.selection.lines(), known]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        calibration = None if self.calibration is None else self.calibration.to_json()
        return {"selection": self.selection.to_json(), "calibration": calibration, "files": self.written.to_json()}


def select_rows(
    attributor: Attributor,
    recipe: Recipe,
    *,
    out: Path,
    gradients: GradientSettings,
    settings: EstimateSettings,
    how: SelectOptions,
    constraints: Constraints,
    overwrite: bool = False,
    **running: Unpack[Running],
) -> Selected:
    """Choose training rows to fine-tune on by estimates, and write them with where they come from.

    The ridge is chosen by `settings.calibration` real fine-tunes on random halves of the groups, or given. Fine-tune on the result
    and look at rows that had no part in this: the estimate of the best of many is too good.

    Args:
        attributor, recipe, gradients, settings, running: as of `whence.evidence.estimating.estimate`.
        out, overwrite: as of `whence.evaluate.cleaned.write_cleaned`; `overwrite` does not measure gradients anew.
        how, constraints: see `whence.refit.select`.

    Raises:
        ConfigError: the recipe's raw rows are not known, a setting cannot be used, or constraints cannot be met.
    """
    check_out(out, overwrite=overwrite)
    if recipe.raw is None or len(recipe.raw) != len(recipe.train):
        raise ConfigError(f"recipe {recipe.name} has no raw row for each training row, so there is nothing to write; give raw=...")
    if settings.method == "gradex":
        raise ConfigError("method='gradex' is estimated, not selected by: it is a baseline. Choose refit, influence or gradient.")
    linear = linearise_recipe(attributor, recipe, gradients)
    limits = Limits(linear.groups, constraints, tokens=linear.tokens, classes=recipe.groups, linear=linear.train)
    calibration = None
    options = raw_options(linear, settings)
    if settings.calibration:
        subsets = SubsetSettings(seed=how.seed).draw(linear.groups, count=settings.calibration, seed=how.seed + 1)
        real = fine_tune(recipe, linear, subsets, repeats=settings.repeats, seed=how.seed, **running)
        calibration = calibrated(linear, real, settings)[settings.metric]
        options = calibration.options
    metric: Any = settings.metric
    problem = Problem(train=linear.train, groups=linear.groups, target=linear.target, metric=metric, options=options)
    found = select(problem, how, limits)
    if not found.examples:
        raise ConfigError("no group betters the metric, so nothing is chosen; choose another metric or method, or until='budget'.")
    found = replace(found, settings=found.settings | {"gradients": vars(gradients)})
    written = write_cleaned(list(recipe.raw), _decision(found, len(recipe.train)), out, origin=_origin(recipe, found), overwrite=overwrite)
    return Selected(selection=found, calibration=calibration, written=written)


def _decision(selection: Selection, rows: int) -> Decision:
    """Return the selection as which rows stay; a row's score is 1 where it goes."""
    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[list(selection.examples)] = True
    dropped = tuple((~chosen).nonzero()[:, 0].tolist())
    return Decision(
        scores=(~chosen).double(),
        dropped=dropped,
        kept=selection.examples,
        reasons=tuple(BELOW if own else BY_SCORE for own in chosen.tolist()),
        classes=None,
        settings=selection.settings,
    )


def _origin(recipe: Recipe, selection: Selection) -> dict[str, Any]:
    return {"recipe": recipe.name, "selected": list(selection.groups), "order": list(selection.order), "estimate": selection.estimate}
