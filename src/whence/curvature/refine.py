"""Solvers that go beyond the fitted curvature: conjugate gradients and an exact inverse, both of the Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from whence.capture.passes import Rows, all_finite, draw_rows, finished, loss_of, raise_not_finite_anywhere
from whence.capture.recorder import Recorder
from whence.curvature.basis import Damping
from whence.curvature.gauss_newton import GaussNewton, Vectors, absolute_damping
from whence.curvature.stored import Preconditioner
from whence.errors import ConfigError
from whence.runtime.memory import free_bytes
from whence.runtime.progress import Stages


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{type(owner).__name__}({name}={value!r}): {name} must be a whole number of 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Invert the damped Gauss-Newton matrix exactly, through the Gram matrix of its columns (Woodbury).

    Attributes:
        max_examples: training rows that make up the matrix, drawn with the seed; None: all. All their columns, rows times
            outputs, are held in memory, and the cube of their number is computed: some ten thousand are the limit.
    """

    max_examples: int | None = None

    name: ClassVar[str] = "exact"

    def __post_init__(self) -> None:
        _positive(self, "max_examples")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for a manifest."""
        return {self.name: vars(self)}


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients:
    """Solve with the damped Gauss-Newton matrix by conjugate gradients, preconditioned by the fitted curvature.

    Attributes:
        iterations: most steps; each is a pass over the rows of the matrix, once per column. Few are better than many: on
            the digits three predicted retraining better than ten, and than the exact inverse that they come to.
        tolerance: stop when every query's residual is this small beside its gradient.
        max_examples: training rows that make up the matrix, drawn with the seed; None: all.
        draws: labels drawn from the model per row; None: all columns of the task, exactly.
    """

    iterations: int = 3
    tolerance: float = 1e-3
    max_examples: int | None = 1000
    draws: int | None = None

    name: ClassVar[str] = "cg"

    def __post_init__(self) -> None:
        _positive(self, "iterations", "max_examples", "draws")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"ConjugateGradients(tolerance={self.tolerance!r}): tolerance must be at least 0 and less than 1.")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for a manifest."""
        return {self.name: vars(self)}


GAUSS_NEWTON_DAMPING = Damping(relative=30.0, scope="model")
"""`"auto"` for both solvers. Most eigenvalues of a whole Gauss-Newton matrix are almost zero, so its mean is far below those
that matter: on the digits network the score is best at 30 to 100 times the mean, and useless at a tenth of it."""

SolverLike = Literal["direct", "cg", "exact"] | Exact | ConjugateGradients
SOLVERS: dict[str, Exact | ConjugateGradients | None] = {"direct": None, "cg": ConjugateGradients(), "exact": Exact()}


def named_solver(solver: SolverLike) -> Exact | ConjugateGradients | None:
    """Return the solver's settings; None for the fitted curvature's own inverse.

    Raises:
        ConfigError: it is not known.
    """
    if isinstance(solver, Exact | ConjugateGradients):
        return solver
    if solver not in SOLVERS:
        raise ConfigError(
            f"solver={solver!r} is not known; choose {', '.join(map(repr, SOLVERS))}, whence.Exact(...) or whence.ConjugateGradients(...)."
        )
    return SOLVERS[solver]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """A solver with all that it needs: `solve` maps the queries' gradients to `(H + damping)^-1` times them."""

    settings: Exact | ConjugateGradients
    recorder: Recorder
    train: Rows
    preconditioner: Preconditioner
    damping: float | Damping
    seed: int
    stages: Stages

    def solve(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Solve for gradients `[query, group, out, in]` of each layer."""
        settings = self.settings
        indices = [self.train.indices[i] for i in draw_rows(len(self.train), settings.max_examples, seed=self.seed)]
        draws = settings.draws if isinstance(settings, ConjugateGradients) else None
        rows = replace(self.train, indices=indices)
        matrix = GaussNewton(recorder=self.recorder, rows=rows, draws=draws, seed=self.seed)

        def compute() -> Vectors:
            if isinstance(settings, Exact):
                return self._exact(matrix, gradients)
            return self._conjugate_gradients(matrix, settings, gradients)

        def explain() -> None:
            raise_not_finite_anywhere(self.recorder, rows, loss_of(self.recorder.task), "Solve")

        with self.stages.stage("Solve"):
            return finished(self.recorder, rows, compute, all_finite, explain)

    def _exact(self, matrix: GaussNewton, gradients: Mapping[str, Tensor]) -> Vectors:
        """`(U^T U + D)^-1 g = D^-1 g - D^-1 U^T (1 + U D^-1 U^T)^-1 U D^-1 g`."""
        self._check_memory(matrix)
        with self.stages.track(len(matrix.rows), "Columns of the curvature") as advance:
            columns = matrix.columns(advance)
        traces = {name: float(u.double().square().sum()) for name, u in columns.items()}
        damping = absolute_damping(self.damping, traces, {name: u.shape[1] for name, u in columns.items()})
        count = len(next(iter(columns.values())))
        gram = torch.eye(count, dtype=torch.float64, device=self.train.device)
        right: Tensor | float = 0.0
        for name, u in columns.items():
            _add_gram(gram, u, 1 / damping[name])
            if name in gradients:
                right = right + (u @ gradients[name].flatten(1).mT).double() / damping[name]
        if not isinstance(right, Tensor) or not torch.isfinite(gram).all():
            return {name: torch.full_like(gradient, float("nan")) for name, gradient in gradients.items()}
        inner = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).to(self.recorder.sums)
        solved = {name: (gradient.flatten(1) - inner.mT @ columns[name]) / damping[name] for name, gradient in gradients.items()}
        return {name: values.view_as(gradients[name]) for name, values in solved.items()}

    def _check_memory(self, matrix: GaussNewton) -> None:
        """Refuse what will not fit before it is begun."""
        _, objectives = next(matrix.batches())
        count = len(objectives) * len(matrix.rows)
        width = sum(layer.parameters for layer in self.recorder.taken)
        # Columns twice (while their parts are joined, a layer at a time, somewhat less) and two Gram matrices in float64.
        needed = count * width * torch.finfo(self.recorder.sums).bits // 8 * 3 // 2 + 2 * 8 * count**2
        free = free_bytes(self.train.device)
        if needed > free:
            raise ConfigError(
                f"solver='exact' needs {needed / 2**30:.1f} GiB for {count:,} columns ({len(matrix.rows):,} rows x {len(objectives)}) "
                f"of {width:,} parameters; {free / 2**30:.1f} GiB are free. Use whence.Exact(max_examples=...) or solver='cg'."
            )

    def _conjugate_gradients(self, matrix: GaussNewton, settings: ConjugateGradients, gradients: Mapping[str, Tensor]) -> Vectors:
        """Solve for all queries at once, each with steps of its own."""
        with self.stages.track((settings.iterations + 1) * len(matrix.rows), "Conjugate gradients") as advance:
            taken = {layer.name: layer.parameters for layer in self.recorder.taken}
            traces = matrix.traces(advance) if isinstance(self.damping, Damping) else dict.fromkeys(taken, 0.0)
            if not all(map(math.isfinite, traces.values())):
                return {name: torch.full_like(gradient, math.nan) for name, gradient in gradients.items()}
            damping = absolute_damping(self.damping, traces, taken)
            live = {name: gradient for name, gradient in gradients.items() if damping[name] < float("inf")}
            if not live:  # no column reaches any layer
                return {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
            x = {name: torch.zeros_like(gradient) for name, gradient in live.items()}
            r, whole = dict(live), _dots(live, live)
            z = self._preconditioned(r)
            p, rz = z, _dots(r, z)
            for _ in range(settings.iterations):
                hp = {name: product.add_(p[name], alpha=damping[name]) for name, product in matrix.product(p, advance).items()}
                step = rz / _dots(p, hp).clamp(min=torch.finfo(rz.dtype).tiny)
                x = {name: x[name] + _times(step, p[name]) for name in x}
                r = {name: r[name] - _times(step, hp[name]) for name in r}
                if bool((_dots(r, r) <= settings.tolerance**2 * whole).all()):
                    break
                z = self._preconditioned(r)
                before, rz = rz, _dots(r, z)
                turn = rz / before.clamp(min=torch.finfo(rz.dtype).tiny)
                p = {name: z[name] + _times(turn, p[name]) for name in p}
        return {name: x[name] if name in x else torch.zeros_like(gradient) for name, gradient in gradients.items()}

    def _preconditioned(self, vectors: Mapping[str, Tensor]) -> Vectors:
        return {name: self.preconditioner.apply(name, values) for name, values in vectors.items()}


GRAM_BLOCK = 2048
"""Rows of a Gram matrix at a time."""


def _add_gram(gram: Tensor, u: Tensor, factor: float) -> None:
    """Add `factor * u u^T`, whose upper blocks are the lower ones turned."""
    for start in range(0, len(u), GRAM_BLOCK):
        rows = slice(start, start + GRAM_BLOCK)
        block = (u[rows] @ u[: start + GRAM_BLOCK].mT).double().mul_(factor)
        gram[rows, : start + GRAM_BLOCK] += block
        gram[:start, rows] += block[:, :start].mT


def _dots(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of every vector, `[vector]`, in float64."""
    return torch.stack([(one[name].flatten(1) * other[name].flatten(1)).sum(1, dtype=torch.float64) for name in one]).sum(0)


def _times(factors: Tensor, vectors: Tensor) -> Tensor:
    return factors.to(vectors).view(-1, 1, 1, 1) * vectors
