"""What is selected from, and by what: training rows in groups, validation examples, a metric."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.linear import Linearised, row_curvature, row_slope
from whence.refit.predict import Metric, Target, higher_is_better, unit_values
from whence.refit.solve import RefitOptions, refit_groups
from whence.refit.subsets import Groups


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A selection to be made.

    Attributes:
        train: training rows.
        groups: the groups that are chosen or not.
        target: validation examples. Its split is recorded; a test split is refused.
        metric: what is to be good: a low `loss`, a high `accuracy` or `probability`. Accuracy moves in steps and ties often;
            `probability` is its smooth stand-in.
        options: of the refits.

    Raises:
        ConfigError: the target is of a test split, or has no rows for the metric. DataError: sizes do not fit.
    """

    train: Linearised
    groups: Groups
    target: Target
    metric: Metric
    options: RefitOptions
    _unconverged: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_split(self.target.split)
        self.target.check(self.metric)
        if len(self.groups.numbers) != self.train.examples:
            raise DataError(f"groups are of {len(self.groups.numbers)} examples, training rows of {self.train.examples}.")

    @property
    def sign(self) -> float:
        """1 where the metric is the better the higher, -1 otherwise."""
        return 1.0 if higher_is_better(self.metric) else -1.0

    def refit(self, members: Tensor, start: Tensor | None = None) -> Tensor:
        """Return `w` `[subset, k]` of subsets `[subset, group]`; `start` `[k]` is of a subset that differs little."""
        known = start if self.options.steps is None else None
        found = refit_groups(self.train, self.groups.numbers, members, self.options, start=known)
        self._unconverged.append(found.unconverged)
        return found.w

    @property
    def unconverged(self) -> int:
        """How many refits were given up before they converged, so far."""
        return sum(self._unconverged)

    def units(self, w: Tensor) -> Tensor:
        """Return the metric of every validation example or query, `[subset, unit]`."""
        return unit_values(self.target, w, self.metric).cpu()

    def values(self, w: Tensor) -> Tensor:
        """Return the metric `[subset]`."""
        return self.units(w).mean(1)

    def as_is(self) -> float:
        """Return the estimated metric at `w = 0`: of the model as it is, trained on all rows, not of what fine-tunes begin at."""
        return float(self.values(torch.zeros(1, self.train.dimensions, dtype=torch.float64, device=self.train.gradients.device)))

    def influence(self) -> Tensor:
        """Return how much each group betters the metric to first order, float64 `[group]`; positive: it helps.

        The metric's derivative at `w = 0` times `H^-1 g`: H the curvature of all groups, g a group's gradient. This is TRAK's
        score and the influence function, added up over a group's examples.

        Raises:
            ConfigError: accuracy has no derivative.
        """
        if self.metric == "accuracy":
            raise ConfigError("accuracy has no derivative; use metric='probability' for influence, or another method.")
        train = self.train
        slopes = row_slope(train.outputs.double(), self.options.loss)
        gradients = train.gradients.double()
        pulls = train.group_sums((-slopes * gradients.T), self.groups.numbers.to(gradients.device), len(self.groups))
        w = torch.zeros(train.dimensions, dtype=torch.float64, device=gradients.device, requires_grad=True)
        (slope,) = torch.autograd.grad(self.target.units(w, self.metric).mean(), w)
        bend = train.weights.double() * row_curvature(train.outputs.double(), self.options.loss)
        ridge = self.options.ridges(torch.tensor([float(train.examples)], dtype=torch.float64)).to(gradients.device)
        hessian = (gradients * bend[:, None]).T @ gradients
        hessian.diagonal().add_(ridge)
        return (self.sign * torch.linalg.solve(hessian, slope) @ pulls).cpu()

    def to_json(self) -> dict[str, Any]:
        """Return what a selection records of it."""
        return {
            "metric": self.metric,
            "split": self.target.split,
            "groups": len(self.groups),
            "examples": self.train.examples,
            "refit": self.options.to_json(),
        }


def check_split(split: str) -> None:
    """Refuse to select by a test split.

    Raises:
        ConfigError: its name says that it is one.
    """
    if "test" in re.split(r"[^a-z]+", split.lower()):
        raise ConfigError(
            f"the target is split {split!r}: a selection made on test rows makes their result worthless. Select on a validation split, "
            "or on held-out training rows."
        )
