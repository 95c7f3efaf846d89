"""Queries without preconditioning, held as pairs: fewer numbers than a gradient when positions are few."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.capture.pair import IDENTITY, LayerGradient, Pair
from whence.capture.sparse import SparsePair


@dataclass(kw_only=True)
class PairQueries:
    """Inputs `a` `[query, group, position, in]` and output gradients `g` alike."""

    a: Tensor
    g: Tensor

    @classmethod
    def empty(cls, queries: int, pair: Pair) -> PairQueries:
        """Make room for queries like those of `pair`."""
        a = pair.inputs()
        return cls(a=a.new_zeros(queries, *a.shape[1:]), g=pair.g.new_zeros(queries, *pair.g.shape[1:]))

    def fill(self, first: int, gradient: LayerGradient) -> None:
        """Keep the pair; positions are filled up with zeros to the longest query's."""
        assert isinstance(gradient, Pair)
        pair = gradient.live()
        a, g = pair.inputs(), pair.g
        missing = a.shape[2] - self.a.shape[2]
        if missing > 0:
            self.a, self.g = F.pad(self.a, (0, 0, 0, missing)), F.pad(self.g, (0, 0, 0, missing))
        self.a[first : first + len(a), :, : a.shape[2]] = a
        self.g[first : first + len(g), :, : g.shape[2]] = g

    def ready(self) -> None:
        """Nothing is left to do."""

    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(torch.isfinite(self.a).all() and torch.isfinite(self.g).all())

    def scores(self, gradient: LayerGradient) -> Tensor:
        """Gram form: sum over both sides' positions of `(a . a')(g . g')`."""
        if not isinstance(gradient, Pair):
            queries = torch.cat([part for _, part in Pair(a=self.a, g=self.g, bias=False).gradients(IDENTITY, 2**30)])
            return torch.cat([part.flatten(1) @ queries.flatten(1).mT for _, part in gradient.gradients(IDENTITY, 2**30)])
        return self.position_scores(gradient.live()).sum(1)

    def position_scores(self, gradient: Pair | SparsePair) -> Tensor:
        """The same without the sum over the training row's positions, `[example, position, query]`."""
        assert isinstance(gradient, Pair)
        total = gradient.g.new_zeros(len(gradient.g), gradient.g.shape[2], len(self.g))
        inputs = gradient.inputs()
        for group in range(gradient.g.shape[1]):
            products = _products(inputs[:, group], self.a[:, group]) * _products(gradient.g[:, group], self.g[:, group])
            total += products.sum(3)
        return total


def _products(train: Tensor, query: Tensor) -> Tensor:
    """`[example, position, f]` x `[query, position', f]` -> `[example, position, query, position']`."""
    flat = train.flatten(0, 1) @ query.flatten(0, 1).mT
    return flat.view(*train.shape[:2], *query.shape[:2])
