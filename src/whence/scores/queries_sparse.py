"""Queries of an embedding: their preconditioned gradients, too, are zero but for the columns of their own tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from whence.capture.pair import Basis, LayerGradient, Pair
from whence.capture.sparse import Entries, SparsePair


@dataclass(kw_only=True)
class SparseQueries:
    """Entries of all queries, sorted by token, so that a training batch meets only those of its own tokens."""

    basis: Basis
    weights: Tensor | None
    queries: int
    budget: int
    parts: list[Entries] = field(default_factory=list)
    held: Entries | None = None

    def fill(self, first: int, gradient: LayerGradient) -> None:
        """Rotate the features, weigh them and rotate them back."""
        assert isinstance(gradient, SparsePair)
        found, values = gradient.entries, gradient.rotated(self.basis)
        if self.weights is not None:
            values = values * self.weights[0].mT[found.tokens]
        if self.basis.outputs is not None:
            values = values @ self.basis.outputs[0].mT
        self.parts.append(Entries(examples=found.examples + first, tokens=found.tokens, values=values))

    def ready(self) -> None:
        """Sort what came in by token."""
        joined = [torch.cat([getattr(part, name) for part in self.parts]) for name in ("examples", "tokens", "values")]
        order = joined[1].argsort(stable=True)
        self.held = Entries(examples=joined[0][order], tokens=joined[1][order], values=joined[2][order])
        self.parts.clear()

    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return all(bool(torch.isfinite(part.values).all()) for part in [*self.parts, *([self.held] if self.held else [])])

    def scores(self, gradient: LayerGradient) -> Tensor:
        """Sum the products of columns of equal tokens."""
        assert isinstance(gradient, SparsePair)
        return self._matched(gradient.entries, len(gradient.ids))

    def position_scores(self, gradient: Pair | SparsePair) -> Tensor:
        """The same for every position, `[example, position, query]`."""
        assert isinstance(gradient, SparsePair)
        return self._matched(gradient.positions(), gradient.ids.numel()).unflatten(0, gradient.ids.shape)

    def _matched(self, train: Entries, rows: int) -> Tensor:
        """Return `[row, query]`: for every pair of entries with one token, the product of their values."""
        held = self.held
        assert held is not None, "ready() comes before scores"
        first = torch.searchsorted(held.tokens, train.tokens)
        count = torch.searchsorted(held.tokens, train.tokens, right=True) - first
        mine = torch.arange(len(count), device=count.device).repeat_interleave(count)
        theirs = torch.arange(len(mine), device=count.device) - (count.cumsum(0) - count - first).repeat_interleave(count)
        total = train.values.new_zeros(rows * self.queries)
        chunk = max(1, self.budget // (2 * train.values.shape[1] * train.values.element_size()))
        for one, other in zip(mine.split(chunk), theirs.split(chunk), strict=True):
            products = (train.values[one] * held.values[other]).sum(1)
            total.index_add_(0, train.examples[one] * self.queries + held.examples[other], products)
        return total.view(rows, self.queries)
