"""Queries, preconditioned and resident, ready to meet every training batch once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.capture import contract
from whence.capture.pair import IDENTITY, Basis, Pair


class Resident(Protocol):
    """One layer's queries."""

    def fill(self, first: int, pair: Pair) -> None:
        """Take in the (a, g) of the measurement of queries `first`, `first + 1`, ..."""
        ...

    def scores(self, pair: Pair) -> Tensor:
        """Return the products with a training batch, `[example, query]`."""
        ...


@dataclass(kw_only=True)
class DenseQueries:
    """Preconditioned gradients `values` `[query, group, out, in]`, rotated back or left in the eigenbasis."""

    values: Tensor
    basis: Basis
    weights: Tensor | None
    rotated: bool
    budget: int

    def fill(self, first: int, pair: Pair) -> None:
        """Rotate the gradients, weigh them and, unless they stay rotated, rotate them back."""
        for rows, gradient in pair.gradients(self.basis, self.budget):
            if self.weights is not None:
                gradient *= self.weights
            gradient = gradient if self.rotated else self.basis.rotate_back(gradient)
            start = first + (rows.start or 0)
            self.values[start : start + len(gradient)] = gradient

    def scores(self, pair: Pair) -> Tensor:
        """Choose by cost between products with formed gradients and products of the inputs with the queries."""
        if pair.transform is not None:
            gradient = pair.formed()
            gradient = self.basis.rotate(gradient) if self.rotated else gradient
            return gradient.flatten(1) @ self.values.flatten(1).mT
        pair = pair.live()
        pair = pair.rotated(self.basis) if self.rotated else pair
        choice = contract.pairwise(pair.sizes, len(self.values), self.budget)
        a = pair.inputs()
        return self._factored(a, pair.g, choice.chunk) if choice.order == "factor" else self._formed(a, pair.g, choice.chunk)

    def _formed(self, a: Tensor, g: Tensor, chunk: int) -> Tensor:
        """Form gradients a few rows of the weight at a time and multiply them while they are in the cache."""
        examples, groups, _, outputs = g.shape
        total = g.new_zeros(examples, len(self.values))
        for group in range(groups):
            for start in range(0, outputs, chunk):
                rows = slice(start, start + chunk)
                gradient = g[:, group, :, rows].mT @ a[:, group]
                total.addmm_(gradient.flatten(1), self.values[:, group, rows].flatten(1).mT)
        return total

    def _factored(self, a: Tensor, g: Tensor, chunk: int) -> Tensor:
        """One position: `g^T (P a)` for `chunk` queries at a time."""
        parts = []
        for start in range(0, len(self.values), chunk):
            values = self.values[start : start + chunk]
            # [group, example, in] x [group, in, query * out] -> [group, example, query, out]
            products = a[:, :, 0].transpose(0, 1) @ values.transpose(0, 1).flatten(1, 2).mT
            products = products.unflatten(-1, (len(values), -1))
            parts.append(torch.einsum("geqo,ego->eq", products, g[:, :, 0]))
        return torch.cat(parts, dim=1)


@dataclass(kw_only=True)
class PairQueries:
    """Queries without preconditioning, held as pairs: fewer numbers than a gradient when positions are few."""

    a: Tensor
    g: Tensor

    @classmethod
    def empty(cls, queries: int, pair: Pair) -> PairQueries:
        """Make room for queries like those of `pair`."""
        a = pair.inputs()
        return cls(a=a.new_zeros(queries, *a.shape[1:]), g=pair.g.new_zeros(queries, *pair.g.shape[1:]))

    def fill(self, first: int, pair: Pair) -> None:
        """Keep the pair; positions are filled up with zeros to the longest query's."""
        pair = pair.live()
        a, g = pair.inputs(), pair.g
        missing = a.shape[2] - self.a.shape[2]
        if missing > 0:
            self.a, self.g = F.pad(self.a, (0, 0, 0, missing)), F.pad(self.g, (0, 0, 0, missing))
        self.a[first : first + len(a), :, : a.shape[2]] = a
        self.g[first : first + len(g), :, : g.shape[2]] = g

    def scores(self, pair: Pair) -> Tensor:
        """Gram form: sum over both sides' positions of `(a . a')(g . g')`."""
        pair = pair.live()
        total = pair.g.new_zeros(len(pair.g), len(self.g))
        inputs = pair.inputs()
        for group in range(pair.g.shape[1]):
            products = _products(inputs[:, group], self.a[:, group]) * _products(pair.g[:, group], self.g[:, group])
            total += products.sum((1, 3))
        return total


def _products(train: Tensor, query: Tensor) -> Tensor:
    """`[example, position, f]` x `[query, position', f]` -> `[example, position, query, position']`."""
    flat = train.flatten(0, 1) @ query.flatten(0, 1).mT
    return flat.view(*train.shape[:2], *query.shape[:2])


def make_resident(pair: Pair, basis: Basis, weights: Tensor | None, *, queries: int, train: int, budget: int) -> Resident:
    """Choose how to hold one layer's queries, by the sizes of the first query batch and the number of training rows."""
    pair = pair.live()
    sizes = pair.sizes
    if weights is None and pair.transform is None and contract.keep_pairs(sizes, IDENTITY.sides):
        return PairQueries.empty(queries, pair)
    return DenseQueries(
        values=pair.g.new_zeros(queries, sizes.groups, sizes.outputs, sizes.inputs),
        basis=basis,
        weights=weights,
        rotated=contract.stay_rotated(replace(sizes, examples=train), basis.sides, queries),
        budget=budget,
    )
