"""Rows that are a few products of two vectors: the leading singular triplets of a gradient, wherever in the model they are.

A gradient of a few tokens is a sum of a few outer products, and most of what scores see of it is in fewer still. Each row gets the
same bytes; which layers they go to is chosen for the row, by singular value squared over cost, in the coordinates in which rows and
queries share the curvature's weights (`balance.py`), of the leading coordinates alone where that lets more triplets in (`cut.py`).
LoRIF (2601.21929) keeps a fixed rank of projected gradients.

Where a row may have few triplets of a layer, a random range finder with two power steps makes them out of its T positions, at a
cost of few products with T (in + out); else they come whole from dense decompositions of T^2 (in + out) + T^3, or of the gradient.

A shard holds, for layer number l, `l/left` `[triplet, out]`, `l/right` `[triplet, in]`, `l/scale` `[triplet]` and `l/row`
`[triplet]`, the place of the example that a triplet is of; `out` and `in` are the coordinates kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis, LayerGradient, Pair
from whence.index.balance import Balance
from whence.index.cut import Cut, make_cut
from whence.index.encoding import Dtype, decode, encode, vector_bytes
from whence.index.meeting import StoredTriplets, meet
from whence.index.projection import RowSettings, Tensors

_SPARE = 8
"""Directions beyond those wanted that a range finder looks along."""
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
    """So many queries, and the `matrices` `[query, out, in]` of the layers that one of them reaches."""

    queries: int
    matrices: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class FactorRows:
    """A projection whose rows are singular triplets."""

    balances: Mapping[str, Balance]
    shapes: Mapping[str, tuple[int, int, int]]
    cuts: Mapping[str, Cut]
    settings: RowSettings

    @classmethod
    def make(
        cls,
        balances: Mapping[str, Balance],
        energies: Mapping[str, Tensor | None],
        shapes: Mapping[str, tuple[int, int, int]],
        settings: RowSettings,
    ) -> FactorRows:
        """Cut each layer to the share of the coordinates that the settings say."""
        cuts = {name: make_cut(shape, balances[name].rows, energies.get(name), settings.coordinates or 1) for name, shape in shapes.items()}
        return cls(balances=balances, shapes=shapes, cuts=cuts, settings=settings)

    @cached_property
    def bases(self) -> dict[str, Basis]:
        """What turns training gradients into the coordinates that are kept, by layer."""
        return {name: cut.basis(self.balances[name].rows) for name, cut in self.cuts.items()}

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
        return sum(vector_bytes(side, self.settings.number_type) for side in self.cuts[layer].sizes) + _OVERHEAD

    def most(self, layer: str) -> int:
        """Triplets that a row may have of one layer: as many as its bytes hold, but four times and one more than an even share at most."""
        # What more a layer could use is worth little, and every candidate costs time.
        even = self.budget / sum(map(self.cost, self.shapes))
        return min(*self.cuts[layer].sizes, 1 + math.ceil(4 * even), max(1, self.budget // self.cost(layer)))

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

    def at(self, rows: Tensors, places: Tensor) -> dict[str, Tensor]:
        """Return the rows at some places; their triplets count rows anew."""
        found: dict[str, Tensor] = {}
        for number in range(len(self.shapes)):
            own = rows[f"{number}/row"]
            starts, ends = (torch.searchsorted(own, places.to(own.dtype), right=right) for right in (False, True))
            counts = ends - starts
            chosen = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts) + torch.arange(int(counts.sum()))
            found |= {f"{number}/{key}": rows[f"{number}/{key}"][chosen] for key in ("left", "right", "scale")}
            found[f"{number}/row"] = torch.repeat_interleave(torch.arange(len(places), dtype=own.dtype), counts)
        return found

    def hold(self, queries: int) -> HeldMatrices:
        """Return the queries without any matrix."""
        return HeldMatrices(queries=queries, matrices={})

    def fill(self, held: HeldMatrices, layer: str, first: int, values: Tensor) -> None:
        """Take a layer's part of some queries."""
        # Whole matrices, in memory as large as the queries of `scores` need: a row's triplets are not known beforehand.
        cut = self.cuts[layer]
        if layer not in held.matrices:
            held.matrices[layer] = torch.zeros(held.queries, *cut.sizes)
        held.matrices[layer][first : first + len(values)] = cut.of(values)

    def scores(self, rows: Tensors, held: HeldMatrices, examples: int) -> Tensor:
        """Return products of rows with queries."""
        result = torch.zeros(examples, held.queries)
        for number, name in enumerate(self.shapes):
            if name in held.matrices:
                meet(StoredTriplets.of(rows, number, self.settings.number_type), held.matrices[name], result)
        return result


@dataclass(frozen=True, kw_only=True)
class FactorBatch:
    """A batch of such rows."""

    projection: FactorRows
    examples: int
    found: dict[str, Triplets]

    def add(self, layer: str, gradient: LayerGradient) -> None:
        """Take in a layer's gradients."""
        projection, most = self.projection, self.projection.most(layer)
        basis, budget = projection.bases[layer], working_set(projection.balances[layer].like.device.type)
        pair = gradient.live() if isinstance(gradient, Pair) else gradient
        if isinstance(pair, Pair) and pair.sizes.groups == 1 and pair.sizes.positions < min(pair.sizes.inputs, pair.sizes.outputs):
            rotated = pair.rotated(basis)
            self.found[layer] = _of_pair(rotated.g[:, 0], rotated.inputs()[:, 0], most)
            return
        sizes = projection.cuts[layer].sizes
        formed = [_of_matrix(part.reshape(len(part), *sizes), most) for _, part in pair.gradients(basis, budget)]
        left, right, values = (torch.cat(parts) for parts in zip(*((t.left, t.right, t.values) for t in formed), strict=True))
        self.found[layer] = Triplets(left=left, right=right, values=values)

    def worth(self) -> Tensor:
        """Return the energy that each row's bytes would keep, rounding counted, float64 `[example]`."""
        dtype, worth = self.projection.settings.number_type, torch.zeros(self.examples, dtype=torch.float64)
        for name, kept in self._chosen().items():
            triplets = self.found[name]
            lost = _rounded(triplets.left[kept], dtype) + _rounded(triplets.right[kept], dtype)
            energy = triplets.values[kept].double().square() * (1 - lost)
            worth.index_add_(0, kept.nonzero()[:, 0], energy.cpu())
        return worth

    def close(self) -> dict[str, Tensor]:
        """Choose each row's triplets and return them."""
        chosen, dtype = self._chosen(), self.projection.settings.number_type
        tensors: dict[str, Tensor] = {}
        for number, (name, cut) in enumerate(self.projection.cuts.items()):
            outputs, inputs = cut.sizes
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


def _rounded(vectors: Tensor, dtype: Dtype) -> Tensor:
    """Return the share of each unit vector's energy that its type loses, float64 `[vector]`."""
    values, scale = encode(vectors, dtype)
    return (decode(values, dtype, vectors.shape[-1]) * scale.unsqueeze(-1) - vectors).double().square().sum(-1)


def _of_pair(g: Tensor, a: Tensor, most: int) -> Triplets:
    """Return the leading triplets of `g^T a`, of `[example, position, out]` and `[example, position, in]`."""
    g, a = _finite(g), _finite(a)
    rank = most + _SPARE
    if 2 * rank < g.shape[1] and rank < min(g.shape[2], a.shape[2]):
        drawn = torch.randn(a.shape[2], rank, generator=torch.Generator().manual_seed(0)).to(a)
        outputs = torch.linalg.qr(g.mT @ (a @ drawn)).Q
        for _ in range(2):
            inputs = torch.linalg.qr(a.mT @ (g @ outputs)).Q
            outputs = torch.linalg.qr(g.mT @ (a @ inputs)).Q
        q_in, r_in = torch.linalg.qr(a.mT @ (g @ outputs))
        u, values, vh = torch.linalg.svd(_finite(r_in.mT))
        return Triplets(left=(outputs @ u[..., :most]).mT, right=vh[:, :most] @ q_in.mT, values=values[:, :most])
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
