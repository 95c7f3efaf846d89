"""Products of triplets with queries, whichever way is cheaper.

A triplet meets one query at the cost of a matrix: `left . (M right)`. Rows of several triplets that meet several queries are put
together first, each a matrix of the coordinates that are kept, at the cost of the triplets alone; then all queries are one product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.index.encoding import Dtype, decode

CHUNK_NUMBERS = 2**19
"""Numbers that are worked on at a time: 2 MiB, which stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class StoredTriplets:
    """One layer's triplets of a shard as they are stored, in the order of their rows, which `row` `[triplet]` numbers."""

    left: Tensor
    right: Tensor
    scale: Tensor
    row: Tensor
    dtype: Dtype

    @classmethod
    def of(cls, rows: Mapping[str, Tensor], layer: int, dtype: Dtype) -> StoredTriplets:
        """Return those of the layer of a number."""
        return cls(**{key: rows[f"{layer}/{key}"] for key in ("left", "right", "scale", "row")}, dtype=dtype)

    def some(self, part: slice) -> StoredTriplets:
        """Return some of them."""
        return StoredTriplets(left=self.left[part], right=self.right[part], scale=self.scale[part], row=self.row[part], dtype=self.dtype)

    def sides(self, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        """Return `[triplet, out]` and, with the scales, `[triplet, in]`, in float32."""
        right = decode(self.right, self.dtype, inputs) * self.scale[:, None]  # not in place: float32 is not copied
        return decode(self.left, self.dtype, outputs), right


def meet(triplets: StoredTriplets, matrices: Tensor, result: Tensor) -> None:
    """Add products of triplets with queries `[query, out, in]` to scores `[row, query]`."""
    count, queries = len(triplets.row), len(matrices)
    rows = int(triplets.row[-1]) + 1 if count else 0
    # Multiplications for each number of a matrix: every triplet with every query, or triplets once and then rows with queries.
    if count + rows * queries < count * queries:
        _row_by_row(triplets, matrices, result, rows)
    else:
        _one_by_one(triplets, matrices, result)


def _one_by_one(triplets: StoredTriplets, matrices: Tensor, result: Tensor) -> None:
    queries, outputs, inputs = matrices.shape
    wide = matrices.permute(2, 0, 1).reshape(inputs, queries * outputs)
    step = max(1, CHUNK_NUMBERS // max(inputs, queries * outputs))
    for start in range(0, len(triplets.row), step):
        some = triplets.some(slice(start, start + step))
        left, right = some.sides(outputs, inputs)
        products = (right @ wide).view(len(left), queries, outputs)
        result.index_add_(0, some.row, torch.einsum("kqo,ko->kq", products, left))


def _row_by_row(triplets: StoredTriplets, matrices: Tensor, result: Tensor, rows: int) -> None:
    queries, outputs, inputs = matrices.shape
    flat = matrices.reshape(queries, outputs * inputs).mT
    ends = torch.searchsorted(triplets.row, torch.arange(rows + 1, dtype=triplets.row.dtype))
    step = max(1, CHUNK_NUMBERS // (outputs * inputs))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        some = triplets.some(slice(int(ends[first]), int(ends[last])))
        counts = ends[first + 1 : last + 1] - ends[first:last]
        most = int(counts.max())
        if not most:
            continue
        left, right = some.sides(outputs, inputs)
        own = some.row.long() - first
        place = torch.arange(len(own)) - (ends[first:last] - ends[first])[own]
        wide_left, wide_right = torch.zeros(last - first, most, outputs), torch.zeros(last - first, most, inputs)
        wide_left[own, place], wide_right[own, place] = left, right
        result[first:last] += torch.bmm(wide_left.mT, wide_right).flatten(1) @ flat


def rows_together(one: StoredTriplets, two: StoredTriplets, sizes: tuple[int, int], result: Tensor) -> None:
    """Add products of rows that are triplets `(out, in)` with others to `[row, other row]`."""
    if not len(one.row) or not len(two.row):
        return
    (left, right), (left_two, right_two) = one.sides(*sizes), two.sides(*sizes)
    found = (left @ left_two.mT).mul_(right @ right_two.mT)
    for_rows = torch.zeros(result.shape[0], len(two.row)).index_add_(0, one.row, found)
    result.index_add_(1, two.row, for_rows)
