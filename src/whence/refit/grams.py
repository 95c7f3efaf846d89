"""Curvature of thousands of subsets of groups: sums of the groups' Gram matrices, factored some subsets at a time.

A group's Gram matrix is `sum of weight * loss''(f) z z^T` over its rows: the curvature of its loss where the outputs are f. Subset `s` of M
has the sum `sum over groups of s[g] Gram[g] + lambda I`: one product `[subsets, groups] @ [groups, k^2]`, 2 M G k^2 operations,
and M k^3 / 3 for the Cholesky factors. Both in float32: the factors shape steps whose gradients are exact (`descent`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from whence.errors import NumericalError
from whence.refit.descent import Solver
from whence.refit.linear import Linearised, Loss, row_curvature

_BYTES = 2**29
"""What the Gram matrices of all groups may take; where they are more, a subset's rows are multiplied anew."""
_BLOCK = 2**27
"""What the factors of the subsets at work may take."""


class Grams:
    """Gram matrices of groups, or the rows they are made of where the matrices would be too many to hold.

    Args:
        linear: outputs and gradients of the training rows.
        groups: int64 `[example]`.
        count: how many groups.
        loss: whose curvature.
        outputs: where, `[row]`; `linear.outputs` are those at `w = 0`.
    """

    def __init__(self, linear: Linearised, groups: Tensor, count: int, loss: Loss, outputs: Tensor) -> None:
        self.dimensions, self.count = linear.dimensions, count
        self._row_groups = groups[linear.example]
        bend = linear.weights.double() * row_curvature(outputs.double(), loss)
        self._rows = (linear.gradients.double() * bend.sqrt()[:, None]).float()
        self.held = 4 * count * self.dimensions**2 <= _BYTES
        self._grams = self._all_grams() if self.held else None

    def _all_grams(self) -> Tensor:
        grams = self._rows.new_zeros(self.count, self.dimensions, self.dimensions)
        order = self._row_groups.argsort(stable=True)
        sizes = self._row_groups.bincount(minlength=self.count).tolist()
        for group, part in enumerate(order.split(sizes)):
            rows = self._rows[part]
            torch.mm(rows.T, rows, out=grams[group])
        return grams.reshape(self.count, -1)

    @property
    def block(self) -> int:
        """How many subsets are worked at together."""
        return max(1, min(256, _BLOCK // (8 * self.dimensions**2)))

    def sums(self, members: Tensor) -> Tensor:
        """Return the subsets' Gram matrices without lambda, float32 `[subset, k, k]`; `members` are weights `[subset, group]`."""
        if self._grams is not None:
            return (members.float() @ self._grams).view(-1, self.dimensions, self.dimensions)
        found = self._rows.new_empty(len(members), self.dimensions, self.dimensions)
        for place, own in enumerate(members.float()):
            shares = own[self._row_groups]
            rows = self._rows[shares > 0] * shares[shares > 0].sqrt()[:, None]
            torch.mm(rows.T, rows, out=found[place])
        return found

    def solver(self, members: Tensor, ridge: Tensor) -> Solver:
        """Return what solves with the curvature of the subsets, `members` `[subset, group]` and lambda `[subset]`.

        Raises:
            NumericalError: a curvature cannot be factored.
        """
        curvature = self.sums(members)
        curvature.diagonal(dim1=1, dim2=2).add_(ridge.float()[:, None])
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if failed.any():
            # Lambda is below float32's rounding of the sum. A larger one shapes worse steps towards the same point.
            wide = self.sums(members).double()
            diagonal = wide.diagonal(dim1=1, dim2=2)
            diagonal.add_(ridge.double()[:, None] + 1e-6 * (failed > 0)[:, None] * diagonal.sum(1, keepdim=True))
            factor = factored(wide)
        return solver_of(factor)


def factored(curvature: Tensor) -> Tensor:
    """Return Cholesky factors, `[..., k, k]`.

    Raises:
        NumericalError: a matrix is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(curvature)
    if failed.any():
        raise NumericalError("a subset's curvature is not positive definite in float64: give a larger ridge, or fewer dimensions.")
    return factor


def solver_of(factor: Tensor) -> Solver:
    """Return what solves with Cholesky factors, `[subset, k, k]` or one `[k, k]` for all subsets."""
    if factor.dim() == 2:
        inverse = torch.cholesky_inverse(factor)
        return lambda gradient, _: (gradient.to(inverse) @ inverse).to(gradient)

    everyone = torch.arange(len(factor), device=factor.device)

    def solve(gradient: Tensor, active: Tensor) -> Tensor:
        # Not cholesky_solve: on the CPU it takes one batch entry at a time and is six times slower.
        if 2 * len(active) > len(factor) > len(active):  # zeros are cheaper than a copy of most factors
            return solve(torch.zeros(len(factor), factor.shape[1]).to(gradient).index_copy_(0, active, gradient), everyone)[active]
        own = factor if len(active) == len(factor) else factor[active]
        half = torch.linalg.solve_triangular(own, gradient.to(own)[:, :, None], upper=False)
        return torch.linalg.solve_triangular(own.mT, half, upper=True)[:, :, 0].to(gradient)

    return solve
