"""Gradients of an embedding: only the rows of an example's own tokens are not zero, and only those are held.

In the internal layout `in` counts tokens and `out` features. The inputs' covariance is diagonal (one-hot inputs), so
an embedding never has eigenvectors on that side; rotation touches features alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whence.capture.contract import Sides, Sizes
from whence.capture.pair import Basis, Pair


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The nonzero columns of gradients: column `tokens[n]` of example `examples[n]` is `values[n]` `[out]`."""

    examples: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class SparsePair:
    """Ids `[example, position]` (-1: none) and output gradients `g` `[example, 1, position, out]`.

    `mask` and `places` as of a `Pair`; `plain`: output gradients before scaling, for covariances, if `g` is scaled.
    """

    ids: Tensor
    g: Tensor
    vocabulary: int
    mask: Tensor | None = None
    places: Tensor | None = None
    plain: Tensor | None = None

    @property
    def sizes(self) -> Sizes:
        """Sizes for the cost model, which counts the gradient as if it were dense."""
        examples, _, positions, outputs = self.g.shape
        size = self.g.element_size()
        return Sizes(examples=examples, positions=positions, groups=1, inputs=self.vocabulary, outputs=outputs, itemsize=size)

    @cached_property
    def entries(self) -> Entries:
        """One entry per example and token, summed over positions."""
        there = self.ids >= 0
        owner = torch.arange(len(self.ids), device=self.ids.device).unsqueeze(1).expand_as(self.ids)
        keys, places = (owner * self.vocabulary + self.ids)[there].unique(return_inverse=True)
        values = self.g.new_zeros(len(keys), self.g.shape[-1]).index_add_(0, places, self.g[:, 0][there])
        return Entries(examples=keys // self.vocabulary, tokens=keys % self.vocabulary, values=values)

    def positions(self) -> Entries:
        """One entry per position; `examples` are flattened places `[example, position]`."""
        there = (self.ids >= 0).flatten().nonzero().flatten()
        return Entries(examples=there, tokens=self.ids.flatten()[there], values=self.g[:, 0].flatten(0, 1)[there])

    def rotated(self, basis: Basis) -> Tensor:
        """Return the entries' values in a basis, `[entry, out]`."""
        assert basis.inputs is None, "an embedding has no eigenvectors on the side of its tokens"
        return self.entries.values if basis.outputs is None else self.entries.values @ basis.outputs[0]

    def gradients(self, basis: Basis, budget: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield dense gradients in a basis, `[chunk, 1, out, in]`; for consumers that cannot do with entries."""
        found, values = self.entries, self.rotated(basis)
        sizes = self.sizes
        chunk = max(1, budget // (sizes.weights * sizes.itemsize))
        for start in range(0, len(self.ids), chunk):
            rows = slice(start, min(start + chunk, len(self.ids)))
            own = (found.examples >= rows.start) & (found.examples < rows.stop)
            dense = self.g.new_zeros(rows.stop - rows.start, self.vocabulary, sizes.outputs)
            dense[found.examples[own] - rows.start, found.tokens[own]] = values[own]
            yield rows, dense.mT.unsqueeze(1)

    def sum_of_squares(self, basis: Basis, budget: int) -> Tensor:
        """Return the sum over examples of squared rotated gradients, `[1, out, in]`."""
        total = self.g.new_zeros(self.vocabulary, self.g.shape[-1])
        return total.index_add_(0, self.entries.tokens, self.rotated(basis).square()).mT.unsqueeze(0)

    def weighted_squares(self, basis: Basis, weights: Tensor, budget: int) -> Tensor:
        """Return per example the sum of its squared rotated gradient times `weights` `[1, out, in]`: `[example]`."""
        return self._by_example((self.rotated(basis).square() * weights[0].mT[self.entries.tokens]).sum(1))

    def norms(self, budget: int) -> Tensor:
        """Return the squared norm of every example's gradient: `[example, 1]`."""
        return self._by_example(self.entries.values.square().sum(1)).unsqueeze(1)

    def _by_example(self, values: Tensor) -> Tensor:
        return self.g.new_zeros(len(self.ids)).index_add_(0, self.entries.examples, values)

    def covariances(self, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
        """Return how often each token stands at a real position `[1, in]`, the sum of `g g^T`, and the number of positions."""
        real = self.ids >= 0 if self.mask is None else (self.ids >= 0) & self.mask.bool()
        counts = torch.bincount(self.ids[real], minlength=self.vocabulary).to(self.g)
        g = (self.g if self.plain is None else self.plain)[:, 0][real]
        outputs = g.mT @ g if sides.outputs else g.square().sum(0)
        return counts.unsqueeze(0), outputs.unsqueeze(0), counts.sum()

    def merged(self) -> SparsePair:
        """Return the sum over examples as one example's gradient."""
        return SparsePair(self.ids.reshape(1, -1), self.g.transpose(0, 1).flatten(1, 2).unsqueeze(0), self.vocabulary)

    def take(self, rows: slice) -> SparsePair:
        """Return some of the examples."""
        mask, places, plain = (None if t is None else t[rows] for t in (self.mask, self.places, self.plain))
        return SparsePair(self.ids[rows], self.g[rows], self.vocabulary, mask, places, plain)

    def dense(self) -> Pair:
        """Return the same with one-hot inputs written out; for an embedding that is also the output head."""
        there = self.ids >= 0
        a = self.g.new_zeros(*self.ids.shape, self.vocabulary)
        a[there] = torch.nn.functional.one_hot(self.ids[there], self.vocabulary).to(a)
        mask = there if self.mask is None else there & self.mask.bool()
        return Pair(a=a.unsqueeze(1), g=self.g * there[:, None, :, None], bias=False, mask=None if mask.all() else mask, places=self.places)
