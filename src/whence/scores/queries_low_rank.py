"""Queries whose preconditioned gradients are kept at a low rank: less memory where many queries stay resident."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.capture import contract
from whence.capture.pair import IDENTITY, Basis, LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.scores.queries import DenseQueries, Holding, formed


@dataclass(kw_only=True)
class LowRankQueries:
    """`left` `[query, group, out, rank]` times `right` `[query, group, rank, in]`, the best approximation of that rank."""

    left: Tensor
    right: Tensor
    dense: DenseQueries

    @classmethod
    def empty(
        cls, holding: Holding, like: Tensor, shape: tuple[int, int, int], *, basis: Basis, weights: Tensor | None, rotated: bool
    ) -> LowRankQueries:
        """Make room for the queries of a layer whose gradients have a shape `[group, out, in]`."""
        groups, outputs, inputs = shape
        assert holding.rank is not None
        # Used a batch at a time, and never with room for all queries.
        dense = DenseQueries(values=like.new_zeros(0, *shape), basis=basis, weights=weights, rotated=rotated, budget=holding.budget)
        return cls(
            left=like.new_zeros(holding.kept, groups, outputs, holding.rank),
            right=like.new_zeros(holding.kept, groups, holding.rank, inputs),
            dense=dense,
        )

    def fill(self, first: int, gradient: LayerGradient) -> None:
        """Precondition a batch and keep its leading singular vectors."""
        examples = gradient.sizes.examples
        self.dense.values = self.left.new_zeros(examples, *self.left.shape[1:3], self.right.shape[3])
        self.dense.fill(0, gradient)
        values, self.dense.values = self.dense.values, self.left.new_zeros(0)
        self.left[first : first + examples], self.right[first : first + examples] = _truncated(values, self.left.shape[-1])

    def ready(self) -> None:
        """Nothing is left to do."""

    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(torch.isfinite(self.left).all() and torch.isfinite(self.right).all())

    def scores(self, gradient: LayerGradient) -> Tensor:
        """Choose by cost between products with each factor and products of formed gradients with queries written out in parts."""
        basis = self.dense.basis if self.dense.rotated else IDENTITY
        if not isinstance(gradient, Pair):
            values = (self.left @ self.right).flatten(1)
            return torch.cat([part.flatten(1) @ values.mT for _, part in gradient.gradients(basis, self.dense.budget)])
        pair = gradient.live()
        pair = pair.rotated(basis) if self.dense.rotated else pair
        choice = contract.low_rank(pair.sizes, len(self.left), self.left.shape[-1], self.dense.budget)
        if choice.order == "factor":
            return self._factored(pair, choice.chunk).sum(1)
        return formed(pair.inputs(), pair.g, choice.chunk, self._rows, len(self.left))

    def _rows(self, groups: slice | int, rows: slice) -> Tensor:
        return (self.left[:, groups][..., rows, :] @ self.right[:, groups]).flatten(1)

    def position_scores(self, gradient: Pair | SparsePair) -> Tensor:
        """`(g_t^T L)(R a_t)` for every position t."""
        assert isinstance(gradient, Pair)
        pair = gradient.rotated(self.dense.basis) if self.dense.rotated else gradient
        return self._factored(pair, contract.low_rank(pair.sizes, len(self.left), self.left.shape[-1], self.dense.budget).chunk)

    def _factored(self, pair: Pair, chunk: int) -> Tensor:
        """`[example, position, query]`, `chunk` queries at a time."""
        a, parts = pair.inputs(), []
        for start in range(0, len(self.left), chunk):
            some = slice(start, start + chunk)
            left = torch.einsum("egto,qgor->egtqr", pair.g, self.left[some])
            right = torch.einsum("egti,qgri->egtqr", a, self.right[some])
            parts.append((left * right).sum((1, 4)))
        return torch.cat(parts, dim=2)


def _truncated(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors `[..., out, rank]` and `[..., rank, in]` of the best approximation, through the smaller side's Gram matrix."""
    wide = values.double()
    turned = wide.shape[-2] > wide.shape[-1]
    wide = wide.mT if turned else wide
    leading = torch.linalg.eigh(wide @ wide.mT)[1][..., -rank:]
    left, right = leading.to(values), (leading.mT @ wide).to(values)
    return (right.mT, left.mT) if turned else (left, right)
