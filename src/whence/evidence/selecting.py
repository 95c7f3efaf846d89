"""From a recipe to the data set that estimates say is best to fine-tune on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast, get_args

import torch

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.cleaned import Cleaned, check_out, write_cleaned
from whence.evaluate.decision import BELOW, BY_SCORE, Decision
from whence.evaluate.retrain import Running
from whence.evidence.calibrating import EstimateSettings, gather
from whence.evidence.estimating import SubsetSettings, judgement
from whence.evidence.first_order import GradientSettings, check_recipe, linearise_recipe
from whence.recipes.base import Recipe, class_names
from whence.refit.calibrate import Calibration
from whence.refit.limits import Constraints, Limits
from whence.refit.predict import Metric
from whence.refit.problem import Problem, check_split
from whence.refit.select import Selection, SelectOptions, check_until, select
from whence.refit.trust import Trust
from whence.workbench import Size


@dataclass(frozen=True, kw_only=True)
class Selected:
    """Chosen rows, written.

    Attributes:
        selection: which groups, and how; its estimates are in the metric's units where there were calibration runs, else as they come.
        start: the metric of the model as it is, measured.
        calibration: what real fine-tunes say of the estimates that chose; None without any.
        trust: what others say that nothing was chosen by; None without any.
        unreported: why there is no trust, though there are held-out fine-tunes.
        written: the files.
    """

    selection: Selection
    start: float
    calibration: Calibration | None
    trust: Trust | None
    written: Cleaned
    unreported: str | None = None

    def lines(self) -> list[str]:
        """Return the summary for people: no estimate without what is known of its error."""
        own, settings, calibration = self.selection, self.selection.settings, self.calibration
        told = f"estimated {settings['metric']} on {settings['split']}: {own.estimate:.4g}; with all groups {own.everything:.4g}"
        told += f"; {self.start:.4g} as the model is. It chose, so that it is too good: fine-tune, and look at rows it never saw."
        first = [own.lines()[0]]
        if own.unconverged:
            first.append(f"{own.unconverged:,} refits did not converge: give a greater ridge.")
        if self.trust is not None:
            return [*first, *([told] if self.trust.beats else []), *self.trust.lines()]
        return [*first, *([f"No report: {self.unreported}."] if self.unreported else []), *judgement(calibration, told)]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "selection": self.selection.to_json(),
            "start": self.start,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "trust": None if self.trust is None else self.trust.to_json(),
            "unreported": self.unreported,
            "files": self.written.to_json(),
        }


def select_rows(
    attributor: Attributor,
    recipe: Recipe,
    *,
    out: Path,
    gradients: GradientSettings,
    settings: EstimateSettings,
    how: SelectOptions,
    constraints: Constraints,
    batch_size: Size = "auto",
    overwrite: bool = False,
    **running: Unpack[Running],
) -> Selected:
    """Choose training rows to fine-tune on by estimates, and write them with where they come from.

    The ridge is chosen by `settings.calibration` real fine-tunes on random subsets, `how.share` of the groups, or given. Fine-tune on
    the result and look at rows that had no part in this: the estimate of the best of many is too good.

    Args:
        attributor, recipe, gradients, settings, batch_size, running: as of `whence.evidence.estimating.estimate`; the metric is one
            over all queries.
        out, overwrite: as of `whence.evaluate.cleaned.write_cleaned`; `overwrite` does not measure gradients anew.
        how, constraints: see `whence.refit.select`; classes are the recipe's groups, or its classes where it has no groups.

    Raises:
        ConfigError: the recipe's raw rows are not known, a setting cannot be used, or constraints cannot be met.
    """
    _check(recipe, out, gradients, settings, how, constraints, overwrite=overwrite)
    subsets = SubsetSettings(share=how.share, seed=how.seed)
    linear = linearise_recipe(attributor, recipe, gradients, batch_size=batch_size)
    limits = Limits(linear.groups, constraints, tokens=linear.tokens, classes=_classes(recipe), linear=linear.train)
    several = settings.fine_tunes
    chosen = subsets.draw_real(linear.groups, several) if several else None
    evidence = gather(recipe, linear, chosen, settings, seed=how.seed, **running)
    metric = cast(Metric, settings.metric)
    problem = Problem(train=linear.train, groups=linear.groups, target=linear.target, metric=metric, options=evidence.options)
    with attributor.stages.stage("Select"):
        found = select(problem, how, limits)
    if not found.examples:
        raise ConfigError("no group betters the metric, so nothing is chosen; choose another metric or method.")
    found = replace(found, settings=found.settings | {"gradients": asdict(gradients), "estimates": asdict(settings)})
    calibration, trust = evidence.calibration.get(metric), evidence.trust.get(metric)
    if calibration is not None:
        found = found.in_units(calibration.apply)
    origin = {
        "recipe": recipe.name,
        "selected": list(found.groups),
        "order": list(found.order),
        "estimate": found.estimate,
        "calibration": None if calibration is None else calibration.to_json(),
        "trust": None if trust is None else trust.to_json(),
    }
    assert recipe.raw is not None  # _check asks for them
    written = write_cleaned(list(recipe.raw), _decision(found, len(recipe.train)), out, origin=origin, overwrite=overwrite)
    start = float(linear.start.of(metric)[0])
    why = evidence.unreported.get(metric)
    return Selected(selection=found, start=start, calibration=calibration, trust=trust, written=written, unreported=why)


def _check(
    recipe: Recipe,
    out: Path,
    gradients: GradientSettings,
    settings: EstimateSettings,
    how: SelectOptions,
    constraints: Constraints,
    *,
    overwrite: bool,
) -> None:
    """Refuse before any work what cannot be done."""
    check_out(out, overwrite=overwrite)
    if recipe.raw is None or len(recipe.raw) != len(recipe.train):
        raise ConfigError(f"recipe {recipe.name} has no raw row for each training row, so there is nothing to write; give raw=...")
    if settings.method == "gradex":
        raise ConfigError("method='gradex' is estimated, not selected by: it is a baseline. Choose refit, influence or gradient.")
    if settings.metric not in get_args(Metric):
        raise ConfigError(
            f"metric={settings.metric!r}: a selection is made by a metric of all queries; choose {', '.join(get_args(Metric))}."
        )
    if settings.metric == "accuracy" and how.method == "influence":
        raise ConfigError("accuracy has no derivative; use metric='probability' for influence, or another method.")
    check_until(how, constraints)
    if recipe.query_split is not None:
        check_split(recipe.query_split)
    check_recipe(recipe, by=gradients.by, metric=settings.metric, fine_tunes=settings.fine_tunes > 0)
    classes = _classes(recipe)
    if constraints.minimum and classes is None:
        raise ConfigError(f"minimum={dict(constraints.minimum)!r}: the rows of recipe {recipe.name} are of no group and no class.")
    for name, least in constraints.minimum.items():
        if (there := (classes or []).count(name)) < least:
            known = ", ".join(sorted(set(classes or []))[:20])
            raise ConfigError(f"minimum of {least} examples of class {name!r}: there are {there}. Classes: {known}.")


def _classes(recipe: Recipe) -> list[str] | None:
    """Return the class of every training row as constraints name it."""
    if recipe.groups is not None:
        return [str(group) for group in recipe.groups]
    if recipe.classes is None:
        return None
    names = class_names(recipe)
    return [names.get(number, str(number)) for number in recipe.classes.tolist()]


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
