"""Queries, preconditioned and resident, ready to meet every training batch once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whence.capture import contract
from whence.capture.pair import IDENTITY, Basis, LayerGradient, Pair
from whence.capture.sparse import SparsePair


class Resident(Protocol):
    """One layer's queries."""

    def fill(self, first: int, gradient: LayerGradient) -> None:
        """Add the measurement's gradients of queries `first`, `first + 1`, ..."""
        ...

    def ready(self) -> None:
        """Be told that all queries are in."""
        ...

    def scores(self, gradient: LayerGradient) -> Tensor:
        """Return the products with a training batch, `[example, query]`."""
        ...

    def position_scores(self, gradient: Pair | SparsePair) -> Tensor:
        """Return the products with every position of a training batch, `[example, position, query]`."""
        ...

    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        ...


@dataclass(kw_only=True)
class DenseQueries:
    """Preconditioned gradients `values` `[query, group, out, in]`, rotated back or left in the eigenbasis."""

    values: Tensor
    basis: Basis
    weights: Tensor | None
    rotated: bool
    budget: int

    def fill(self, first: int, gradient: LayerGradient) -> None:
        """Rotate the gradients, weigh them and, unless they stay rotated, rotate them back."""
        for rows, part in gradient.gradients(self.basis, self.budget):
            if self.weights is not None:
                part *= self.weights
            part = part if self.rotated else self.basis.rotate_back(part)
            start = first + (rows.start or 0)
            self.values[start : start + len(part)] += part

    def ready(self) -> None:
        """Nothing is left to do."""

    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(torch.isfinite(self.values).all())

    def scores(self, gradient: LayerGradient) -> Tensor:
        """Choose by cost between products with formed gradients and products of the inputs with the queries."""
        if not isinstance(gradient, Pair):
            basis = self.basis if self.rotated else IDENTITY
            parts = [part.flatten(1) @ self.values.flatten(1).mT for _, part in gradient.gradients(basis, self.budget)]
            return torch.cat(parts)
        pair = gradient.live()
        pair = pair.rotated(self.basis) if self.rotated else pair
        choice = contract.pairwise(pair.sizes, len(self.values), self.budget)
        a = pair.inputs()
        if choice.order == "factor":
            return factored(a, pair.g, self.values, choice.chunk)
        return formed(a, pair.g, choice.chunk, lambda group, rows: self.values[:, group, rows].flatten(1), len(self.values))

    def position_scores(self, gradient: Pair | SparsePair) -> Tensor:
        """`g_t^T P a_t` for every position t."""
        assert isinstance(gradient, Pair), "an embedding's queries are sparse"
        pair = gradient.rotated(self.basis) if self.rotated else gradient
        a, g = pair.inputs(), pair.g
        columns = []
        for values in self.values:
            columns.append((torch.einsum("egti,goi->egto", a, values) * g).sum((1, 3)))
        return torch.stack(columns, dim=-1)


class _Rows(Protocol):
    def __call__(self, groups: slice | int, rows: slice, /) -> Tensor: ...


def formed(a: Tensor, g: Tensor, chunk: int, queries_of: _Rows, queries: int) -> Tensor:
    """Form gradients a few rows of the weight at a time and multiply them while they are in the cache.

    `queries_of(group or groups, rows)` returns those rows of all queries, `[query, flattened]`.
    """
    examples, groups, _, outputs = g.shape
    total = g.new_zeros(examples, queries)
    if groups > 1 and chunk >= outputs:  # many small groups: several at a time
        several = chunk // outputs
        for start in range(0, groups, several):
            part = slice(start, start + several)
            gradient = Pair(a=a[:, part], g=g[:, part], bias=False).formed()
            total.addmm_(gradient.flatten(1), queries_of(part, slice(None)).mT)
        return total
    for group in range(groups):
        for start in range(0, outputs, chunk):
            rows = slice(start, start + chunk)
            gradient = g[:, group, :, rows].mT @ a[:, group]
            total.addmm_(gradient.flatten(1), queries_of(group, rows).mT)
    return total


def factored(a: Tensor, g: Tensor, values: Tensor, chunk: int) -> Tensor:
    """One position: `g^T (P a)` for `chunk` queries at a time."""
    parts = []
    for start in range(0, len(values), chunk):
        some = values[start : start + chunk]
        # [group, example, in] x [group, in, query * out] -> [group, example, query, out]
        products = a[:, :, 0].transpose(0, 1) @ some.transpose(0, 1).flatten(1, 2).mT
        products = products.unflatten(-1, (len(some), -1))
        parts.append(torch.einsum("geqo,ego->eq", products, g[:, :, 0]))
    return torch.cat(parts, dim=1)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What is known before the first query: how many there are, over how many training rows, and what is asked.

    `rank`: keep each query's gradient at that rank; `summed`: add all queries into one; `dense`: keep whole gradients in
    the parameters' own basis, for a solver.
    """

    queries: int
    train: int
    budget: int
    rank: int | None = None
    summed: bool = False
    dense: bool = False

    @property
    def kept(self) -> int:
        """Queries that are held."""
        return 1 if self.summed else self.queries
