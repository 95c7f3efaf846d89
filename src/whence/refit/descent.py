"""Descent of many regularised losses at once, in k dimensions: conjugate gradients behind a Newton step, with a line search.

Subset `s` has the objective `J(w) = sum over rows of c[s, row] loss(f0 + Z w) + lambda[s] / 2 |w|^2`. It is strictly convex. A
curvature that was factored once (of the subset itself at `w = 0`, or one for all) turns gradients into steps. Behind the first
step, directions are made conjugate (E. Polak and G. Ribiere, 1969, restarted where their factor is negative), so that the
curvature need not be factored again where `w` has moved far. Every step is searched for the lowest point along it and never goes
up, so that nothing can diverge. Gradients are exact, in float64; the factor may be float32, since it only shapes steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.refit.linear import Loss, row_curvature, row_loss, row_slope

Solver = Callable[[Tensor, Tensor], Tensor]
"""Gives `H^-1 g` for `g` `[active, k]` of the subsets `active`, int64."""

_TRIES = 12


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """The objectives of some subsets; all float64, on one device.

    Attributes:
        outputs: `f0`, `[row]`; gradients: `Z`, `[row, k]`.
        shares: `c`, `[subset, row]`, weight of a row in a subset's sum, 0 or more.
        ridge: lambda, `[subset]`.
        loss: of a row.
    """

    outputs: Tensor
    gradients: Tensor
    shares: Tensor
    ridge: Tensor
    loss: Loss

    def of(self, active: Tensor) -> Objectives:
        """Return the objectives of the subsets `active`, int64."""
        if len(active) == len(self.shares):
            return self
        return Objectives(
            outputs=self.outputs, gradients=self.gradients, shares=self.shares[active], ridge=self.ridge[active], loss=self.loss
        )

    def moved(self, w: Tensor) -> Tensor:
        """Return the outputs `[subset, row]` at `w` `[subset, k]`."""
        return torch.addmm(self.outputs, w, self.gradients.T)

    def value(self, w: Tensor, outputs: Tensor) -> Tensor:
        """Return the objectives, `[subset]`."""
        return (self.shares * row_loss(outputs, self.loss)).sum(1) + self.ridge / 2 * w.square().sum(1)

    def gradient(self, w: Tensor, outputs: Tensor) -> Tensor:
        """Return their gradients, `[subset, k]`."""
        return (self.shares * row_slope(outputs, self.loss)) @ self.gradients + self.ridge[:, None] * w

    def curved(self, direction: Tensor, outputs: Tensor) -> Tensor:
        """Return the Hessian at these outputs times a direction, `[subset, k]`."""
        bent = self.shares * row_curvature(outputs, self.loss) * (direction @ self.gradients.T)
        return bent @ self.gradients + self.ridge[:, None] * direction


def newton_step(problem: Objectives, solve: Solver, *, tolerance: float) -> Tensor:
    """Return the Newton step from `w = 0`, undamped, `[subset, k]`: `-H^-1 g`, to the relative residual `tolerance`.

    `solve` may be inexact by some digits; what it leaves is solved for again.
    """
    everyone = torch.arange(len(problem.shares), device=problem.shares.device)
    start = problem.outputs.expand_as(problem.shares)
    gradient = problem.gradient(problem.gradients.new_zeros(len(everyone), problem.gradients.shape[1]), start)
    step = -solve(gradient, everyone)
    for _ in range(5):
        left = -gradient - problem.curved(step, start)
        if (left.norm(dim=1) <= tolerance * gradient.norm(dim=1)).all():
            break
        step = step + solve(left, everyone)
    return step


def descend(problem: Objectives, solve: Solver, start: Tensor, *, steps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return `w` `[subset, k]`, steps taken and whether each subset converged, `[subset]`.

    A subset has converged where its gradient, measured with the inverse of the curvature that is given, is at most `tolerance`
    times as long as at `w = 0`; near the lowest point that is the relative error of `w` in the objective's own norm.
    """
    count = len(problem.shares)
    w, taken = start.clone(), torch.zeros(count, dtype=torch.int64, device=start.device)
    done = torch.zeros(count, dtype=torch.bool, device=start.device)
    zero = problem.gradient(torch.zeros_like(w), problem.outputs.expand_as(problem.shares))
    active = torch.arange(count, device=start.device)
    enough = tolerance**2 * (zero * solve(zero, active)).sum(1)
    outputs = problem.moved(w)
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for number in range(steps + 1):
        part = problem.of(active)
        gradient = part.gradient(w[active], outputs)
        shaped = solve(gradient, active)
        size = (gradient * shaped).sum(1)
        keep = size > enough[active]
        done[active[~keep]] = True
        if number == steps or not keep.any():
            break
        active, part, outputs, gradient, shaped = active[keep], part.of(keep.nonzero()[:, 0]), outputs[keep], gradient[keep], shaped[keep]
        last = None if before is None else (before[0][keep], before[1][keep], before[2][keep])
        direction = _conjugate(gradient, shaped, size[keep], last)
        length, outputs = _search(part, w[active], outputs, direction, (gradient * direction).sum(1))
        w[active] += length[:, None] * direction
        taken[active] += 1
        before = (shaped, size[keep], direction)
    return w, taken, done


def _conjugate(gradient: Tensor, shaped: Tensor, size: Tensor, before: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """Return directions downhill, `[subset, k]`; `before`: the last shaped gradient, its size and the last direction."""
    if before is None:
        return -shaped
    factor = ((size - (gradient * before[0]).sum(1)) / before[1]).clamp(min=0)
    direction = factor[:, None] * before[2] - shaped
    return torch.where(((direction * gradient).sum(1) < 0)[:, None], direction, -shaped)


def _search(part: Objectives, w: Tensor, outputs: Tensor, direction: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far to go, `[subset]`, and the outputs there, `[subset, row]`: near the lowest point, never above the start.

    Newton's method in one dimension, kept between the ends where the slope is known to fall and to rise.
    """
    rise = direction @ part.gradients.T
    along, square = part.ridge * (w * direction).sum(1), part.ridge * direction.square().sum(1)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    length, rises = torch.ones_like(slope), part.shares * rise
    for _ in range(_TRIES):
        there = outputs + length[:, None] * rise
        here = (rises * row_slope(there, part.loss)).sum(1) + along + length * square
        good = here.abs() <= 0.05 * slope.abs()
        if good.all():
            return length, there
        low, high = torch.where(here < 0, length, low), torch.where(here > 0, length, high)
        bend = (rises * rise * row_curvature(there, part.loss)).sum(1) + square
        trial = length - here / bend
        middle = torch.where(high.isinf(), 4 * low, (low + high) / 2)
        inside = (trial > low) & (trial < high) & (trial <= torch.where(high.isinf(), 4 * low, high))
        length = torch.where(good, length, torch.where(inside, trial, middle))
    there = outputs + length[:, None] * rise
    # Near the lowest point values differ by rounding alone, while slopes still tell; `low` is 0 or still downhill.
    worse = part.value(w + length[:, None] * direction, there) > part.value(w, outputs) * (1 + 1e-12)
    length = torch.where(worse, low, length)
    return length, outputs + length[:, None] * rise
