"""Refit in projected space: what would `w` be after fine-tuning on this subset?

    w = argmin  sum over examples of s_i loss_i(w)  +  lambda / 2 |w|^2

`loss_i` is the loss of outputs to first order, `outputs + gradients @ w` (`Linearised`): offsets included, no intercept. The form
is of D. Li et al., "Scalable Fine-tuning from Multiple Data Sources: A First-Order Approximation Approach" (2024); lambda says how
far training moves. Its limits are known methods: a large lambda gives gradient dot products, one Newton step is TRAK (S. M. Park
et al., 2023) and the influence function, and weights `1 - e_i` leave one out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.descent import Objectives, Solver, descend, newton_step
from whence.refit.grams import Grams, factored, solver_of
from whence.refit.linear import Linearised, Loss, check_loss, row_curvature

_ROWS = 2**21
"""Outputs `[subset, row]` in float64 held at a time."""
_CENTRED = 8
"""From so many subsets on, the refit of their mean is done first, as the place to begin and to take the curvature at."""


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """How a refit is done.

    Attributes:
        ridge: lambda, more than 0. It is absolute: the loss is summed over examples, so that a larger subset moves further, as
            training for a number of epochs does.
        per_example: lambda is `ridge` times the sum of a subset's weights: the loss is a mean, as training for a number of steps.
        steps: 1: one undamped Newton step from `w = 0` (TRAK, influence). A greater number: so many steps, each with a line
            search. None: until converged.
        loss: of a row.
        tolerance: of convergence: a subset's gradient, measured by an inverse curvature, over that at `w = 0`. It is about the
            relative error of `w`.
        most_steps: where a subset that does not converge is given up; `Refit.converged` says so.
    """

    ridge: float = 1.0
    per_example: bool = False
    steps: int | None = None
    loss: Loss = "logistic"
    tolerance: float = 1e-5
    most_steps: int = 200

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if not 0 < self.ridge < float("inf"):
            raise ConfigError(f"ridge={self.ridge!r}: give a number above 0; calibration on a few real fine-tunes finds one.")
        if (self.steps is not None and self.steps < 1) or self.most_steps < 1:
            raise ConfigError(f"steps={self.steps!r}, most_steps={self.most_steps!r}: give 1 or more; steps=None goes on until converged.")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"tolerance={self.tolerance!r}: give a number between 0 and 1, such as 1e-5.")

    def ridges(self, totals: Tensor) -> Tensor:
        """Return lambda `[subset]` for the sums of the subsets' weights; an empty subset has `ridge`, and `w = 0`."""
        return self.ridge * torch.where(totals > 0, totals, 1.0) if self.per_example else torch.full_like(totals, self.ridge)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Refit:
    """Where subsets' refits end.

    Attributes:
        w: float64 `[subset, k]`.
        steps: steps taken, int64 `[subset]`.
        converged: bool `[subset]`; with a given number of steps, whether the tolerance happened to be met (with one: False).
        options: as asked for.
    """

    w: Tensor
    steps: Tensor
    converged: Tensor
    options: RefitOptions

    def __len__(self) -> int:
        return len(self.w)

    @property
    def unconverged(self) -> int:
        """How many subsets were given up before they converged; 0 where a number of steps was asked for."""
        return int((~self.converged).sum()) if self.options.steps is None else 0


def refit(linear: Linearised, weights: Tensor, options: RefitOptions) -> Refit:
    """Refit subsets given as a weight for every example, one after the other, with each one's exact curvature at every step.

    Damped Newton in float64: for a few subsets, and what `refit_groups` is compared with.

    Args:
        linear: outputs and gradients of the training rows.
        weights: `[example]` or `[subset, example]`, 0 or more: 1 for members, `1 - e_i` to leave one out.
        options: how.

    Raises:
        DataError: weights do not fit. NumericalError: a curvature cannot be factored.
    """
    many = _checked(weights, linear.examples, "example").to(linear.gradients.device)
    reduced, basis = _span(linear)
    found = [_one(reduced, own, options) for own in many]
    w, steps, converged = (torch.cat(list(parts)) for parts in zip(*found, strict=True))
    return Refit(w=w @ basis, steps=steps, converged=converged, options=options)


def refit_groups(
    linear: Linearised,
    groups: Tensor,
    members: Tensor,
    options: RefitOptions,
    *,
    start: Tensor | None = None,
) -> Refit:
    """Refit thousands of subsets of groups at once.

    The curvature of a subset is the sum of its groups' Gram matrices, taken once (see `grams`): at `w = 0` where a number of steps
    is given; otherwise at the refit of the mean of the subsets, where all begin. Where rows are few, one curvature, of that mean,
    serves all subsets. Gradients are exact, so that all come to the same point (see `descent`).

    Args:
        linear: outputs and gradients of the training rows.
        groups: int64 `[example]`, numbered from 0.
        members: `[subset, group]`: bool, or weights of 0 or more for all examples of a group.
        options: how. With `steps=1` the result is that of the exact solver.
        start: where to begin, `[k]` or `[subset, k]`, for example at a subset that differs little; not with `steps=1`.

    Raises:
        DataError: groups or members do not fit. NumericalError: a curvature cannot be factored.
    """
    members = _checked(members, members.shape[-1], "group").to(linear.gradients.device)
    groups = check_groups(groups, linear.examples, members.shape[1]).to(linear.gradients.device)
    reduced, basis = _span(linear)
    totals = members @ groups.bincount(minlength=members.shape[1]).double()
    if start is not None:
        start = start.to(basis).expand(len(members), -1) @ basis.T
    elif options.steps is None and len(members) >= _CENTRED:
        start = _one(reduced, members.mean(0)[groups], options)[0].expand(len(members), -1)
    else:
        start = basis.new_zeros(len(members), reduced.dimensions)
    start = start * (totals > 0)[:, None]  # that of an empty subset is where it stays
    ridges = options.ridges(totals)
    solver, size = _solvers(reduced, groups, members, ridges, start.mean(0), options)

    def solved(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        problem = _problem(reduced, members[part][:, groups], ridges[part], options.loss)
        return _solved(problem, solver(part), options, start[part])

    parts = [slice(first, first + size) for first in range(0, len(members), size)]
    with ThreadPoolExecutor(_workers(basis.device)) as pool:
        found = list(pool.map(solved, parts))
    w, steps, converged = (torch.cat(values) for values in zip(*found, strict=True))
    return Refit(w=w @ basis, steps=steps, converged=converged, options=options)


def _solvers(
    linear: Linearised, groups: Tensor, members: Tensor, ridges: Tensor, at: Tensor, options: RefitOptions
) -> tuple[Callable[[slice], Solver], int]:
    """Return what gives the solver of a block of subsets, with the curvature at `w` `[k]`, and how many subsets are a block."""
    size = max(1, _ROWS // linear.rows)
    if options.steps is None and not _grams_pay(linear, members):
        middle = _problem(linear, members.mean(0)[None, groups], ridges.mean()[None], options.loss)
        solve = _curvature(middle, middle.moved(at[None]), shared=True)
        return lambda _: solve, size
    grams = Grams(linear, groups, members.shape[1], options.loss, linear.moved(at))
    return lambda part: grams.solver(members[part], ridges[part]), min(size, grams.block)


def _grams_pay(linear: Linearised, members: Tensor) -> bool:
    """Return whether a factor for each subset costs less than the about five more steps that one for all of them takes."""
    k, groups = linear.dimensions, members.shape[1]
    return 40 * linear.rows * k > 2 * groups * k**2 + k**3


def _workers(device: torch.device) -> int:
    """Return how many blocks of subsets are worked at together: one for each processor that torch leaves idle."""
    return 1 if device.type != "cpu" else max(1, min(8, (os.cpu_count() or 1) // torch.get_num_threads()))


def check_groups(groups: Tensor, examples: int, count: int) -> Tensor:
    """Return the groups `[example]`, checked.

    Raises:
        DataError: there is not one for each example, or a number is not below `count`.
    """
    if groups.shape != (examples,) or groups.dtype != torch.int64:
        raise DataError(f"groups is {groups.dtype} {tuple(groups.shape)}; give an int64 number for each of {examples} examples.")
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise DataError(f"groups are numbered {int(groups.min())} to {int(groups.max())}, subsets are of {count} groups, numbered from 0.")
    return groups


def _checked(weights: Tensor, count: int, what: str) -> Tensor:
    """Return weights float64 `[subset, count]`."""
    many = weights.double()
    many = many[None] if many.dim() == 1 else many
    if many.dim() != 2 or many.shape[1] != count or not len(many):
        raise DataError(f"weights have shape {tuple(weights.shape)}; give [{what}] or [subset, {what}] of {count}, one subset at least.")
    if not torch.isfinite(many).all() or (many < 0).any():
        raise DataError(f"weights of {what}s must be finite and 0 or more.")
    return many


def _span(linear: Linearised) -> tuple[Linearised, Tensor]:
    """Return the same outputs in as few dimensions as they span, and the basis `[fewer, k]`, float64, that carries `w` back.

    The lowest point lies in the span of the rows, so that k dimensions and fewer rows need only as many as there are rows.
    """
    if linear.dimensions <= linear.rows:
        return linear, torch.eye(linear.dimensions, dtype=torch.float64, device=linear.gradients.device)
    basis, rest = torch.linalg.qr(linear.gradients.double().T)
    reduced = Linearised(
        outputs=linear.outputs, gradients=rest.T.contiguous(), example=linear.example, weights=linear.weights, examples=linear.examples
    )
    return reduced, basis.T


def _problem(linear: Linearised, example_weights: Tensor, ridge: Tensor, loss: Loss) -> Objectives:
    return Objectives(
        outputs=linear.outputs.double(),
        gradients=linear.gradients.double(),
        shares=example_weights[:, linear.example] * linear.weights.double(),
        ridge=ridge,
        loss=loss,
    )


def _solved(problem: Objectives, solve: Solver, options: RefitOptions, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `w`, steps and whether converged of subsets whose curvature is given; with one step that at `w = 0`."""
    count = len(problem.shares)
    if options.steps == 1:
        w = newton_step(problem, solve, tolerance=options.tolerance)
        return w, torch.ones(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
    return descend(problem, solve, start, steps=options.steps or options.most_steps, tolerance=options.tolerance)


def _one(linear: Linearised, weights: Tensor, options: RefitOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return `w` `[1, k]`, steps and whether converged of one subset, by Newton's method with its own curvature at every step."""
    problem = _problem(linear, weights[None], options.ridges(weights.sum()[None]), options.loss)
    solve = _curvature(problem, problem.outputs[None])
    if options.steps == 1:
        return _solved(problem, solve, options, problem.gradients[:1])
    w = problem.gradients.new_zeros(1, linear.dimensions)
    everyone = torch.zeros(1, dtype=torch.int64, device=w.device)
    zero = problem.gradient(w, problem.outputs[None])
    enough = options.tolerance * float((zero * solve(zero, everyone)).sum().sqrt())
    limit = options.steps or options.most_steps
    taken, size = 0, 0.0
    while True:
        outputs = problem.moved(w)
        gradient = problem.gradient(w, outputs)
        solve = _curvature(problem, outputs)
        size = float((gradient * solve(gradient, everyone)).sum().sqrt())
        if size <= enough or taken == limit:
            break
        w, _, _ = descend(problem, solve, w, steps=1, tolerance=1e-16)
        taken += 1
    return w, torch.tensor([taken]), torch.tensor([size <= enough])


def _curvature(problem: Objectives, outputs: Tensor, *, shared: bool = False) -> Solver:
    """Return what solves with the Hessian of the one objective at these outputs `[1, row]`; `shared`: for other subsets too."""
    bend = problem.shares[0] * row_curvature(outputs[0], problem.loss)
    hessian = (problem.gradients * bend[:, None]).T @ problem.gradients
    hessian.diagonal().add_(problem.ridge)
    factor = factored(hessian)
    return solver_of(factor if shared else factor[None])
