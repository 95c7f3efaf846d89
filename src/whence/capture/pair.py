"""The pair (a, g) of one layer and batch, and every way to contract it.

Axes, in words: `example`, `position` (a token, a patch, a re-use of the layer), `group`, `in` (features of the
input, with a column of ones at the end when the bias is tracked), `out`. The gradient of an example's loss is

    G[group, out, in] = sum over positions of g[position, group, out] * a[position, group, in]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from whence.capture import contract
from whence.capture.contract import Sides, Sizes


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Orthogonal eigenvectors in columns: `inputs` `[group, in, in]`, `outputs` `[group, out, out]`; None: identity."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def sides(self) -> Sides:
        """Which sides there are."""
        return Sides(inputs=self.inputs is not None, outputs=self.outputs is not None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Basis:
        """Return the basis on a device, in a type; itself if it is there."""
        if all(q is None or (q.device == device and q.dtype == dtype) for q in (self.inputs, self.outputs)):
            return self
        inputs = None if self.inputs is None else self.inputs.to(device, dtype)
        outputs = None if self.outputs is None else self.outputs.to(device, dtype)
        return Basis(inputs=inputs, outputs=outputs)

    def rotate(self, gradient: Tensor) -> Tensor:
        """`Q_out^T G Q_in` for gradients `[..., group, out, in]`."""
        if self.outputs is not None:
            gradient = self.outputs.mT @ gradient
        return gradient if self.inputs is None else _times(gradient, self.inputs)

    def rotate_back(self, gradient: Tensor) -> Tensor:
        """`Q_out G Q_in^T`, the inverse of `rotate`."""
        if self.outputs is not None:
            gradient = self.outputs @ gradient
        return gradient if self.inputs is None else _times(gradient, self.inputs.mT)


IDENTITY = Basis()


@dataclass
class SharedInputs:
    """Inputs that several layers read (query, key and value projections): they are rotated once where bases are equal."""

    readers: int = 0
    basis: Tensor | None = None
    rotated: Tensor | None = None

    def rotate(self, basis: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the last reader got for the same eigenvectors, or compute it; the last of all leaves nothing behind."""
        rotated = self.rotated if self.rotated is not None and self.basis is basis else compute(basis)
        self.readers -= 1
        self.basis, self.rotated = (basis, rotated) if self.readers > 0 else (None, None)
        return rotated


class LayerGradient(Protocol):
    """What a batch gave for one layer: its per-example gradients, in whatever form they are cheapest to hold."""

    @property
    def sizes(self) -> Sizes:
        """Sizes for the cost model."""
        ...

    def gradients(self, basis: Basis, budget: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield gradients in a basis, `[chunk, group, out, in]`; each may be overwritten by the consumer."""
        ...

    def sum_of_squares(self, basis: Basis, budget: int) -> Tensor:
        """Return the sum over examples of squared rotated gradients, `[group, out, in]`."""
        ...

    def weighted_squares(self, basis: Basis, weights: Tensor, budget: int) -> Tensor:
        """Return per example the sum of its squared rotated gradient times `weights` `[group, out, in]`: `[example]`."""
        ...

    def norms(self, budget: int) -> Tensor:
        """Return the squared norm of every example's gradient, per group: `[example, group]`."""
        ...

    def covariances(self, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over real positions of `a a^T`, of `g g^T` (diagonals of a side without a basis), and their number."""
        ...

    def merged(self) -> LayerGradient:
        """Return the sum over examples as one example's gradient."""
        ...

    def take(self, rows: slice) -> LayerGradient:
        """Return some of the examples."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Inputs `a` `[example, group, position, in]` without the column of ones, output gradients `g` alike.

    `bias` asks for that column; `mask` `[example, position]` marks real positions (for covariances only); `places`
    `[example, position]` numbers each position's token, -1 where there is none; `shared` is the same object in the
    pairs of all layers that read these inputs.
    """

    a: Tensor
    g: Tensor
    bias: bool
    mask: Tensor | None = None
    places: Tensor | None = None
    shared: SharedInputs | None = None

    @property
    def sizes(self) -> Sizes:
        """Sizes for the cost model."""
        examples, groups, positions, inputs = self.a.shape
        return Sizes(
            examples=examples,
            positions=positions,
            groups=groups,
            inputs=inputs + self.bias,
            outputs=self.g.shape[-1],
            itemsize=self.g.element_size(),
        )

    def inputs(self) -> Tensor:
        """Return the inputs with their column of ones, `[example, group, position, in]`."""
        if not self.bias:
            return self.a
        return torch.cat([self.a, self.a.new_ones(*self.a.shape[:-1], 1)], dim=-1)

    def rotated(self, basis: Basis) -> Pair:
        """Return the pair in a basis; the ones become a part of the rotated inputs."""
        g = self.g if basis.outputs is None else _times(self.g, basis.outputs)
        if basis.inputs is None:
            return replace(self, a=self.inputs(), g=g, bias=False, shared=None)
        shared = self.shared or SharedInputs()
        return replace(self, a=shared.rotate(basis.inputs, self._rotated_inputs), g=g, bias=False, shared=None)

    def _rotated_inputs(self, q: Tensor) -> Tensor:
        # A column of ones times the last row of Q is an offset: no copy of the inputs is made to append it.
        return _times(self.a, q[:, :-1], q[:, -1]) if self.bias else _times(self.a, q)

    def live(self) -> Pair:
        """Return the pair without positions at which no example has a gradient; they add nothing to `G`.

        A classifier that reads one token leaves most of its last block without any, and padding often has none.
        """
        # On a GPU the look would make the host wait. Where both ends have a gradient, nothing is expected between.
        if self.g.shape[2] == 1 or self.g.device.type != "cpu":
            return self
        if self.g[:, :, 0].any() and self.g[:, :, -1].any():
            return self
        places = self.g.abs().amax((0, 1, 3)).nonzero().flatten()
        places = places if len(places) else places.new_zeros(1)
        kept = None if self.places is None else self.places[:, places]
        return replace(self, a=self.a[:, :, places], g=self.g[:, :, places], mask=None, places=kept, shared=None)

    def chunks(self, size: int) -> Iterator[tuple[slice, Pair]]:
        """Yield the pair a few examples at a time."""
        if size >= len(self.a):
            yield slice(0, len(self.a)), self
            return
        for start in range(0, len(self.a), size):
            rows = slice(start, start + size)
            yield rows, self.take(rows)

    def take(self, rows: slice) -> Pair:
        """Return some of the examples."""
        mask, places = (None if t is None else t[rows] for t in (self.mask, self.places))
        return replace(self, a=self.a[rows], g=self.g[rows], mask=mask, places=places, shared=None)

    def merged(self) -> Pair:
        """Return the sum over examples as one example's gradient: all positions in a row."""
        a, g = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (self.a, self.g))
        return Pair(a=a, g=g, bias=self.bias)

    def formed(self) -> Tensor:
        """Return the gradients `[example, group, out, in]`."""
        if self.g.shape[-1] == 1 and self.g.shape[1] > 1:  # a normalisation: products this small are faster one by one
            return (self.inputs() * self.g).sum(2).unsqueeze(2)
        return self.g.mT @ self.inputs()

    def gradients(self, basis: Basis, budget: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield gradients in a basis, `[chunk, group, out, in]`, in the cheapest order within the budget.

        Each yielded tensor may be overwritten by the consumer.
        """
        pair = self.live()
        choice = contract.gradients(pair.sizes, basis.sides, budget)
        if choice.order == "form":
            for rows, part in pair.chunks(choice.chunk):
                yield rows, basis.rotate(part.formed())
            return
        # Rotated in larger chunks than formed: a product wants many rows, a gradient wants to stay in the cache.
        for outer, many in pair.chunks(contract.rotation_chunk(pair.sizes, budget)):
            for inner, part in many.rotated(basis).chunks(choice.chunk):
                start = outer.start + inner.start
                yield slice(start, start + len(part.g)), part.formed()

    def sum_of_squares(self, basis: Basis, budget: int) -> Tensor:
        """Return the sum over examples of squared rotated gradients, `[group, out, in]`."""
        pair = self.live()
        sizes = pair.sizes
        choice = contract.squares(sizes, basis.sides, budget)
        if choice.order == "outer":
            a, g = pair._rotated_squares(basis)
            return g.mT @ a
        total = pair.g.new_zeros(sizes.groups, sizes.outputs, sizes.inputs)
        for _, gradient in pair.gradients(basis, budget):
            total += gradient.square_().sum(0)
        return total

    def weighted_squares(self, basis: Basis, weights: Tensor, budget: int) -> Tensor:
        """Return per example the sum of its squared rotated gradient times `weights` `[group, out, in]`: `[example]`."""
        pair = self.live()
        choice = contract.squares(pair.sizes, basis.sides, budget)
        if choice.order == "outer":
            a, g = pair._rotated_squares(basis)
            return ((g @ weights) * a).sum((0, 2))
        # Not a product with the flattened weights: that adds half a million numbers one by one, and loses digits.
        return torch.cat([gradient.square_().mul_(weights).sum((1, 2, 3)) for _, gradient in pair.gradients(basis, budget)])

    def norms(self, budget: int) -> Tensor:
        """Return the squared norm of every example's gradient, per group: `[example, group]`."""
        pair = self.live()
        choice = contract.squares(pair.sizes, IDENTITY.sides, budget, uniform=True)
        if choice.order == "gram":
            return torch.cat([part._gram_norms() for _, part in pair.chunks(choice.chunk)])
        if choice.order == "outer":
            a, g = pair._rotated_squares(IDENTITY)
            return (g.sum(-1) * a.sum(-1)).mT
        return torch.cat([gradient.square_().sum((2, 3)) for _, gradient in pair.gradients(IDENTITY, budget)])

    def _rotated_squares(self, basis: Basis) -> tuple[Tensor, Tensor]:
        """Squares of the rotated pair at its one position, `[group, example, in]` and `[group, example, out]`."""
        pair = self.rotated(basis)
        return pair.a[:, :, 0].square().transpose(0, 1), pair.g[:, :, 0].square().transpose(0, 1)

    def _gram_norms(self) -> Tensor:
        inputs = self.a @ self.a.mT + float(self.bias)
        return (inputs * (self.g @ self.g.mT)).sum((2, 3))

    def covariances(self, sides: Sides) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over real positions of `a a^T` `[group, in, in]`, of `g g^T` `[group, out, out]`, and their number.

        Of a side without a basis only the diagonal is summed: `[group, in]` or `[group, out]`.
        """
        a, g = self.inputs(), self.g
        count = self.g.new_tensor(a.shape[0] * a.shape[2])
        if self.mask is not None:
            real = self.mask.to(a)[:, None, :, None]
            a, g, count = a * real, g * real, self.mask.to(a).sum()
        a, g = (x.transpose(0, 1).flatten(1, 2) for x in (a, g))
        return _second_moment(a, sides.inputs), _second_moment(g, sides.outputs), count


def _second_moment(x: Tensor, whole: bool) -> Tensor:
    """`[group, row, f]` -> sums over rows, `[group, f, f]` or the diagonal `[group, f]`."""
    return x.mT @ x if whole else x.square().sum(1)


def _times(x: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
    """`[example, group, row, f] x [group, f, h] -> [example, group, row, h]`, plus `offset` `[group, h]`."""
    if len(matrix) > 1:
        product = torch.einsum("egrf,gfh->egrh", x, matrix)
        return product if offset is None else product + offset[:, None]
    # One group: a single large product runs at several times the speed of a small one per example.
    flat = x.flatten(0, -2)
    product = flat @ matrix[0] if offset is None else torch.addmm(offset[0], flat, matrix[0])
    return product.view(*x.shape[:-1], matrix.shape[-1])
