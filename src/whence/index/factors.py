"""Rows that are a few products of two vectors: the leading singular triplets of a gradient, wherever in the model they are.

A gradient of a few tokens is a sum of a few outer products, and most of what scores see of it is in fewer still. Each row gets the
same bytes; which layers they go to is chosen for the row, by singular value squared over cost, in the coordinates in which rows and
queries share the curvature's weights (`balance.py`). LoRIF (2601.21929) keeps a fixed rank of projected gradients; here nothing
is projected before.

Triplets come whole and exact from dense decompositions: of T positions at a cost of T^2 (in + out) + T^3 for every layer and row,
where T is below both sides, and else of the gradient itself. For long rows this is most of the time.

A shard holds, for layer number l, `l/left` `[triplet, out]`, `l/right` `[triplet, in]`, `l/scale` `[triplet]` and `l/row`
`[triplet]`, the place of the example that a triplet is of. Layers with groups count as one matrix `[group, out * in]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import LayerGradient, Pair
from whence.index.balance import Balance
from whence.index.encoding import decode, encode, vector_bytes
from whence.index.projection import RowSettings, Tensors
from whence.index.sides import Sides, two_sides

_CHUNK_NUMBERS = 2**19
"""Numbers that are decoded at a time when rows meet queries: 2 MiB, which stay in the processor's cache."""
_OVERHEAD = 8
"""Bytes of a triplet beside its vectors: its scale and its row."""


@dataclass(frozen=True, kw_only=True)
class Triplets:
    """`left` `[example, rank, out]`, `right` `[example, rank, in]` of length one, `values` `[example, rank]`, falling."""

    left: Tensor
    right: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class HeldMatrices:
    """So many queries while they come in, and the `matrices` `[query, out, in]` of the layers that one of them reaches."""

    queries: int
    matrices: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class HeldSides:
    """So many queries, and their matrices as products, of the layers that one of them reaches."""

    queries: int
    sides: dict[str, Sides]


@dataclass(frozen=True, kw_only=True)
class FactorRows:
    """A projection whose rows are singular triplets."""

    balances: Mapping[str, Balance]
    shapes: Mapping[str, tuple[int, int, int]]
    settings: RowSettings

    @property
    def budget(self) -> int:
        """Bytes of a row."""
        return int(4 * sum(map(math.prod, self.shapes.values())) * self.settings.keep)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at most."""
        return self.budget

    def cost(self, layer: str) -> int:
        """Bytes of one triplet of a layer."""
        return sum(vector_bytes(side, self.settings.dtype) for side in _matrix(self.shapes[layer])) + _OVERHEAD

    def most(self, layer: str) -> int:
        """Triplets that a row may have of one layer: as many as its bytes hold, but four times and one more than an even share at most."""
        # What more a layer could use is worth little, and every candidate costs time.
        even = self.budget / sum(map(self.cost, self.shapes))
        return min(*_matrix(self.shapes[layer]), 1 + math.ceil(4 * even), max(1, self.budget // self.cost(layer)))

    def batch(self, examples: int) -> FactorBatch:
        """Begin a batch."""
        return FactorBatch(projection=self, examples=examples, found={})

    def join(self, parts: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Return parts as one; the places of rows go on counting."""
        firsts = torch.tensor([0, *examples[:-1]], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        joined = {}
        for key in parts[0]:
            places = key.endswith("/row")
            joined[key] = torch.cat([part[key] + first if places else part[key] for part, first in zip(parts, firsts, strict=True)])
        return joined

    def hold(self, queries: int) -> HeldMatrices:
        """Return the queries without any matrix."""
        return HeldMatrices(queries=queries, matrices={})

    def fill(self, held: HeldMatrices, layer: str, first: int, values: Tensor) -> None:
        """Take a layer's part of some queries."""
        # Whole matrices, in memory as large as the queries of `scores` need: a row's triplets are not known beforehand.
        if layer not in held.matrices:
            held.matrices[layer] = torch.zeros(held.queries, *_matrix(self.shapes[layer]))
        held.matrices[layer][first : first + len(values)] = values.reshape(len(values), *_matrix(self.shapes[layer]))

    def settle(self, held: HeldMatrices) -> HeldSides:
        """Return the queries as products of few vectors, layer by layer."""
        return HeldSides(queries=held.queries, sides={name: two_sides(held.matrices.pop(name)) for name in list(held.matrices)})

    def scores(self, rows: Tensors, held: HeldSides, examples: int) -> Tensor:
        """Return products of rows with queries."""
        result = torch.zeros(examples, held.queries)
        for number, name in enumerate(self.shapes):
            if name in held.sides:
                triplets = {key: rows[f"{number}/{key}"] for key in ("left", "right", "scale", "row")}
                self._meet(triplets, held.sides[name], result)
        return result

    def _meet(self, triplets: Tensors, sides: Sides, result: Tensor) -> None:
        """Add a layer's products to scores `[row, query]`."""
        outputs, inputs = sides.outputs.shape[-1], sides.inputs.shape[-1]
        left, right = sides.outputs.flatten(0, 1).mT, sides.inputs.flatten(0, 1).mT
        queries, rank, _ = sides.outputs.shape
        step = max(1, _CHUNK_NUMBERS // max(inputs, outputs, queries * rank))
        for start in range(0, len(triplets["row"]), step):
            some = slice(start, start + step)
            products = decode(triplets["right"][some], self.settings.dtype, inputs) @ right
            products *= decode(triplets["left"][some], self.settings.dtype, outputs) @ left
            scores = products.unflatten(1, (queries, rank)).sum(2) if rank > 1 else products
            scores *= triplets["scale"][some, None]
            result.index_add_(0, triplets["row"][some], scores)


@dataclass(frozen=True, kw_only=True)
class FactorBatch:
    """A batch of such rows."""

    projection: FactorRows
    examples: int
    found: dict[str, Triplets]

    def add(self, layer: str, gradient: LayerGradient) -> None:
        """Take in a layer's gradients."""
        balance, most = self.projection.balances[layer], self.projection.most(layer)
        basis, budget = balance.rows, working_set(balance.like.device.type)
        pair = gradient.live() if isinstance(gradient, Pair) else gradient
        if isinstance(pair, Pair) and pair.sizes.groups == 1 and pair.sizes.positions < min(pair.sizes.inputs, pair.sizes.outputs):
            rotated = pair.rotated(basis)
            self.found[layer] = _of_pair(rotated.g[:, 0], rotated.inputs()[:, 0], most)
            return
        shape = _matrix(self.projection.shapes[layer])
        formed = [_of_matrix(part.reshape(len(part), *shape), most) for _, part in pair.gradients(basis, budget)]
        left, right, values = (torch.cat(parts) for parts in zip(*((t.left, t.right, t.values) for t in formed), strict=True))
        self.found[layer] = Triplets(left=left, right=right, values=values)

    def close(self) -> dict[str, Tensor]:
        """Choose each row's triplets and return them."""
        chosen, dtype = self._chosen(), self.projection.settings.dtype
        tensors: dict[str, Tensor] = {}
        for number, (name, shape) in enumerate(self.projection.shapes.items()):
            outputs, inputs = _matrix(shape)
            nothing = Triplets(left=torch.zeros(0, 0, outputs), right=torch.zeros(0, 0, inputs), values=torch.zeros(0, 0))
            triplets = self.found.get(name, nothing)
            kept = chosen.get(name, torch.zeros(0, 0, dtype=torch.bool))
            left, s_left = encode(triplets.left[kept], dtype)
            right, s_right = encode(triplets.right[kept], dtype)
            scale = (s_left * s_right * triplets.values[kept]).float()
            own = {"left": left, "right": right, "scale": scale, "row": kept.nonzero()[:, 0].int()}
            tensors |= {f"{number}/{key}": values.cpu() for key, values in own.items()}
        return tensors

    def _chosen(self) -> dict[str, Tensor]:
        """Return which triplets `[example, rank]` of each layer fit into the rows."""
        if not self.found:
            return {}
        costs = torch.cat([torch.full(t.values.shape[1:], self.projection.cost(name)) for name, t in self.found.items()])
        worth = torch.cat([t.values.double().square().cpu() / self.projection.cost(name) for name, t in self.found.items()], dim=1)
        order = torch.sort(worth, dim=1, descending=True, stable=True).indices
        costs = costs[order]
        fits = torch.zeros_like(worth, dtype=torch.bool)
        for _ in range(2):  # the second time for those that are cheaper than the first that did not fit
            left = self.projection.budget - (costs * fits).sum(1, keepdim=True)
            wanted = ~fits & (costs <= left)
            fits |= wanted & ((costs * wanted).cumsum(1) <= left)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, order, fits) & (worth > 0)
        ranks = [t.values.shape[1] for t in self.found.values()]
        return dict(zip(self.found, kept.split(ranks, dim=1), strict=True))


def _matrix(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the shape of the one matrix that a layer's gradient counts as."""
    groups, outputs, inputs = shape
    return (outputs, inputs) if groups == 1 else (groups, outputs * inputs)


def _of_pair(g: Tensor, a: Tensor, most: int) -> Triplets:
    """Return the leading triplets of `g^T a`, of `[example, position, out]` and `[example, position, in]`."""
    q_out, r_out = torch.linalg.qr(g.mT)
    q_in, r_in = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(_finite(r_out @ r_in.mT))
    most = min(most, values.shape[1])
    return Triplets(left=(q_out @ u[..., :most]).mT, right=vh[:, :most] @ q_in.mT, values=values[:, :most])


def _of_matrix(matrix: Tensor, most: int) -> Triplets:
    """Return the leading triplets of matrices `[example, out, in]`."""
    u, values, vh = torch.linalg.svd(_finite(matrix), full_matrices=False)
    return Triplets(left=u[..., :most].mT, right=vh[:, :most], values=values[:, :most])


def _finite(matrix: Tensor) -> Tensor:
    """Return matrices without what no decomposition takes; the rows' norms tell of NaN and infinity."""
    return matrix.nan_to_num(0.0, 0.0, 0.0)
