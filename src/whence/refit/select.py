"""Which groups to fine-tune on: true greedy selection, random ensembles, datamodels, influence.

Greedy selection refits every candidate at every step, all at once, from where the last step ended; this differs from one pass over
the groups in the order they happen to be in. Every selection records the metric and split it was made by.

The refit of no group, `w = 0`, is the model as it is: trained on all rows, where the outputs were measured. It is not what a
fine-tune begins at. So forward selection takes the best group first, whether or not the model as it is was better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.refit.limits import Constraints, Limits
from whence.refit.problem import Problem
from whence.refit.subsets import bernoulli
from whence.refit.surrogate import (
    Contributions,
    Threshold,
    conditional_means,
    cross_validated_share,
    lasso_datamodel,
    plain_contributions,
    ridge_datamodel,
)
from whence.runtime import notebook
from whence.storage.run import write_json_atomic

Method = Literal["forward", "backward", "ensemble", "ridge", "lasso", "influence"]
Until = Literal["gain", "budget", "best"]


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """How a selection is made.

    Attributes:
        method: `forward`, `backward`: greedy, a group at a time. `ensemble`: the best groups by the mean metric of random subsets
            with them; how many is cross-validated. `ridge`, `lasso`: groups with a positive coefficient in a linear datamodel.
            `influence`: groups that help to first order.
        until: of greedy selection. `gain`: stop where no further group betters the metric. `budget`: go on as long as limits allow
            (forward), or stop as soon as they are met (backward, only with a budget or `most_alike`). `best`: go on to the end, and
            keep the best that met all limits on the way.
        subsets: how many random subsets, for `ensemble`, `ridge` and `lasso`; share: of groups in each.
        shares: of the groups that `ensemble` may keep; folds: of the cross-validation.
        seed: of all draws.
    """

    method: Method = "forward"
    until: Until = "gain"
    subsets: int = 1000
    share: float = 0.5
    shares: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("until", Until)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose among {', '.join(get_args(kind))}.")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Groups chosen to fine-tune on.

    Attributes:
        groups: names of the chosen groups, in `numbers`' order.
        numbers: of the chosen groups: in the order chosen; with `backward` rising.
        examples: places of their examples, rising.
        order: numbers of groups in the order they were added, or with `backward` taken away; with until="best" all that were.
        path: the estimated metric after each step of `order`.
        start: the metric where `order` begins: of the model as it is, or with `backward` with all groups.
        as_is: the metric of the model as it is, at `w = 0`; everything: with all groups; estimate: with the chosen ones. All are
            estimates, as they come or in the metric's units (`in_units`).
        unconverged: how many of the refits that it was made by did not converge.
        contributions: of groups, where the method has any; as they come.
        threshold: of `ensemble`.
        settings: metric, split and all options, JSON.
    """

    groups: tuple[str, ...]
    numbers: tuple[int, ...]
    examples: tuple[int, ...]
    order: tuple[int, ...]
    path: tuple[float, ...]
    start: float
    as_is: float
    everything: float
    estimate: float
    unconverged: int = 0
    contributions: Contributions | None = None
    threshold: Threshold | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def in_units(self, apply: Callable[[Tensor], Tensor]) -> Selection:
        """Return the selection with its estimates brought to the metric's units; contributions stay as they come.

        Args:
            apply: what does so, such as `Calibration.apply`; it must rise, so that the choice stays the best.
        """
        values = torch.tensor([self.start, self.as_is, self.everything, self.estimate, *self.path], dtype=torch.float64)
        start, as_is, everything, estimate, *path = apply(values).tolist()
        return replace(self, start=start, as_is=as_is, everything=everything, estimate=estimate, path=tuple(path))

    def lines(self) -> list[str]:
        """Return a summary for people."""
        lost = [f"{self.unconverged:,} refits did not converge: give a greater ridge."] if self.unconverged else []
        metric = f"estimated {self.settings['metric']} on {self.settings['split']}"
        return [
            f"{len(self.groups):,} of {self.settings['groups']:,} groups chosen, {len(self.examples):,} of "
            f"{self.settings['examples']:,} examples ({self.settings['method']})",
            f"{metric}: {self.estimate:.4g}; with all groups {self.everything:.4g}, as the model is {self.as_is:.4g}",
            "The selection was made by this metric, so that its estimate is too good; fine-tune on it, and look at rows it never saw.",
            *lost,
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
            elif isinstance(value, Contributions | Threshold):
                values[name] = value.to_json()
        return values

    def save(self, path: Path | str) -> None:
        """Write the selection as JSON, atomically.

        Raises:
            StorageError: the file cannot be written.
        """
        write_json_atomic(Path(path), self.to_json())

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the summary and the first steps."""
        word = "taken away" if self.settings["method"] == "backward" else "added"
        names = self.settings["names"]
        rows = [(step + 1, names[group], f"{value:.4g}") for step, (group, value) in enumerate(zip(self.order, self.path, strict=True))]
        more = f"and {len(rows) - 20:,} more steps" if len(rows) > 20 else ""
        return notebook.table("; ".join(self.lines()), ("step", f"group {word}", self.settings["metric"]), rows[:20], more=more)


def select(problem: Problem, options: SelectOptions, limits: Limits | None = None) -> Selection:
    """Choose groups to fine-tune on.

    Args:
        problem: training rows in groups, validation examples and the metric; a test split is refused there.
        options: how.
        limits: a budget and other constraints; None: none.

    Raises:
        ConfigError: limits cannot be met, or an option does not fit. DataError: subsets are too few to tell groups apart.
    """
    limits = limits or Limits(problem.groups, Constraints())
    check_until(options, limits.constraints)
    count, lost = len(problem.groups), problem.unconverged
    everything = float(problem.values(problem.refit(torch.ones(1, count, dtype=torch.bool))))
    as_is = problem.as_is()
    contributions, threshold = None, None
    if options.method in {"forward", "backward"}:
        backward = options.method == "backward"
        order, path, steps = _greedy(problem, limits, options.until, everything if backward else as_is, backward=backward)
        chosen = sorted(set(range(count)) - set(order[:steps])) if backward else order[:steps]
    else:
        contributions, threshold = _contributions(problem, options)
        order = _ranked(contributions, limits, None if threshold is None else max(1, round(threshold.share * count)))
        chosen, steps = order, len(order)
        path = _prefixes(problem, order)
    start = everything if options.method == "backward" else as_is
    settings = problem.to_json() | asdict(options) | {"limits": limits.constraints.to_json(), "names": list(problem.groups.names)}
    return Selection(
        groups=tuple(problem.groups.names[group] for group in chosen),
        numbers=tuple(chosen),
        examples=problem.groups.examples(chosen),
        order=tuple(order),
        path=tuple(path),
        start=start,
        as_is=as_is,
        everything=everything,
        estimate=path[steps - 1] if steps else start,
        unconverged=problem.unconverged - lost,
        contributions=contributions,
        threshold=threshold,
        settings=settings | {"shares": list(options.shares)},
    )


def check_until(options: SelectOptions, constraints: Constraints) -> None:
    """Check that a selection has what it is to stop at.

    Raises:
        ConfigError: backward selection is to stop at a budget and has none, so that it would take nothing away.
    """
    some = (constraints.examples, constraints.tokens, constraints.most_alike)
    if options.method == "backward" and options.until == "budget" and all(one is None for one in some):
        raise ConfigError(
            "method='backward' with until='budget' stops as soon as the limits are met, and there are none; give a budget of examples or "
            "tokens or most_alike, or until='gain' or 'best'."
        )


def _greedy(problem: Problem, limits: Limits, until: Until, start: float, *, backward: bool) -> tuple[list[int], list[float], int]:
    """Return groups in the order added or taken away, the metric after each, and after how many steps to stop."""
    member = torch.full((len(problem.groups),), backward)
    may: Callable[[Tensor], Tensor] = limits.may_remove if backward else limits.may_add
    unmet = limits.exceeded if backward else limits.lacking
    w = problem.refit(member[None])[0]
    order: list[int] = []
    path: list[float] = []
    # To stay where the model is, trained on all rows, is no fine-tune: forward selection has no such choice.
    best, steps, value = (problem.sign * start if backward and not unmet(member) else -torch.inf), 0, start
    while (places := may(member).nonzero()[:, 0]).numel() and not (backward and int(member.sum()) == 1):
        met = not unmet(member)
        if met and until == "budget" and backward:
            break
        candidates = member.expand(len(places), -1).clone()
        candidates[torch.arange(len(places)), places] = not backward
        found = problem.refit(candidates, w)
        values = problem.sign * problem.values(found)
        winner = int(values.argmax())
        if met and until == "gain" and (backward or order) and float(values[winner]) <= problem.sign * value:
            break
        member, w, value = candidates[winner], found[winner], problem.sign * float(values[winner])
        order.append(int(places[winner]))
        path.append(value)
        if not unmet(member) and float(values[winner]) > best:
            best, steps = float(values[winner]), len(order)
    return order, path, (steps if until == "best" else len(order))


def _contributions(problem: Problem, options: SelectOptions) -> tuple[Contributions, Threshold | None]:
    if options.method == "influence":
        return plain_contributions(problem.influence(), {"method": "influence"}), None
    members = bernoulli(problem.groups, count=options.subsets, share=options.share, seed=options.seed).members
    units = problem.units(problem.refit(members))
    if options.method == "ensemble":
        found = conditional_means(members, units.mean(1), sign=problem.sign, seed=options.seed)
        return found, cross_validated_share(problem, members, units, options.shares, folds=options.folds, seed=options.seed)
    fit = ridge_datamodel if options.method == "ridge" else lasso_datamodel
    return fit(members, units.mean(1), sign=problem.sign, seed=options.seed), None


def _ranked(contributions: Contributions, limits: Limits, most: int | None) -> list[int]:
    """Return groups by falling contribution as far as limits allow: `most` of them, or all that help; classes' minima come first."""
    values, order = contributions.values, list[int]()
    member = torch.zeros(len(values), dtype=torch.bool)
    while (allowed := limits.may_add(member)).any():
        if not limits.lacking(member):
            if most is not None and len(order) >= most:
                break
            if most is None:
                allowed &= values > 0
                if not allowed.any():
                    break
        winner = int(torch.where(allowed, values, -torch.inf).argmax())
        member[winner] = True
        order.append(winner)
    return order


def _prefixes(problem: Problem, order: list[int]) -> list[float]:
    """Return the metric with the first group, the first two, and so on."""
    if not order:
        return []
    members = torch.zeros(len(order), len(problem.groups), dtype=torch.bool)
    for step in range(len(order)):
        members[step, order[: step + 1]] = True
    return problem.values(problem.refit(members)).tolist()
