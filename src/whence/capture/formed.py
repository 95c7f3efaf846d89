"""Gradients that are formed already: transformed by the task, or taken by autograd from batches of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from whence.capture.contract import Sides, Sizes
from whence.capture.pair import Basis, Pair


@dataclass(frozen=True, kw_only=True)
class Formed:
    """Gradients `[example, group, out, in]`, and the pair they were made of if there was one (for covariances)."""

    gradient: Tensor
    pair: Pair | None = None

    @property
    def sizes(self) -> Sizes:
        """Sizes for the cost model, as of one position."""
        examples, groups, outputs, inputs = self.gradient.shape
        size = self.gradient.element_size()
        return Sizes(examples=examples, positions=1, groups=groups, inputs=inputs, outputs=outputs, itemsize=size)

    def gradients(self, basis: Basis, budget: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield all gradients in a basis, `[example, group, out, in]`, once."""
        rotated = basis.rotate(self.gradient)
        yield slice(None), rotated.clone() if rotated is self.gradient else rotated

    def sum_of_squares(self, basis: Basis, budget: int) -> Tensor:
        """Return the sum over examples of squared rotated gradients, `[group, out, in]`."""
        return basis.rotate(self.gradient).square().sum(0)

    def weighted_squares(self, basis: Basis, weights: Tensor, budget: int) -> Tensor:
        """Return per example the sum of its squared rotated gradient times `weights` `[group, out, in]`: `[example]`."""
        return (basis.rotate(self.gradient).square() * weights).sum((1, 2, 3))

    def norms(self, budget: int) -> Tensor:
        """Return the squared norm of every example's gradient, per group: `[example, group]`."""
        return self.gradient.square().sum((2, 3))

    def covariances(self, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of the pair; gradients without one have no sides to take covariances of."""
        assert self.pair is not None, "a layer without a handler has no Kronecker factors"
        return self.pair.covariances(sides)

    def merged(self) -> Formed:
        """Return the sum over examples as one example's gradient."""
        return Formed(gradient=self.gradient.sum(0, keepdim=True))

    def take(self, rows: slice) -> Formed:
        """Return some of the examples."""
        return Formed(gradient=self.gradient[rows], pair=None if self.pair is None else self.pair.take(rows))
