"""Triplets and queries: both ways give the products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whence.index import meeting
from whence.index.encoding import Dtype, encode
from whence.index.meeting import StoredTriplets, meet

OUT, IN = 7, 10


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(rows: list[int], dtype: Dtype) -> tuple[StoredTriplets, Tensor]:
    """Return triplets of these rows, and what they stand for `[row, out, in]`."""
    left, right, values = drawn(len(rows), OUT, seed=1), drawn(len(rows), IN, seed=2), drawn(len(rows), seed=3)
    (l8, ls), (r8, rs) = encode(left, dtype), encode(right, dtype)
    triplets = StoredTriplets(left=l8, right=r8, scale=ls * rs * values, row=torch.tensor(rows, dtype=torch.int32), dtype=dtype)
    dense = torch.zeros(9, OUT, IN)
    dense.index_add_(0, torch.tensor(rows, dtype=torch.int64), values[:, None, None] * left[:, :, None] * right[:, None, :])
    return triplets, dense


@pytest.mark.parametrize("chunk", [1, 100, 2**19])
@pytest.mark.parametrize("way", ["_one_by_one", "_row_by_row", "meet"])
@pytest.mark.parametrize("queries", [1, 5])
def test_products_are_those_of_matrices(queries: int, way: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "CHUNK_NUMBERS", chunk)
    triplets, dense = stored([0, 0, 0, 2, 2, 3, 6, 6, 6, 6], "float32")  # rows 1, 4, 5 and the last two have none
    matrices = drawn(queries, OUT, IN, seed=4)
    found = torch.ones(9, queries)
    further = (7,) if way == "_row_by_row" else ()
    getattr(meeting, way)(triplets, matrices, found, *further)
    torch.testing.assert_close(found - 1, torch.einsum("roi,qoi->rq", dense, matrices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.03), ("int4", 0.3)])
def test_rounded_numbers_are_near(dtype: Dtype, tolerance: float) -> None:
    triplets, dense = stored([0, 0, 1, 1, 1, 4, 4], dtype)
    for queries in (1, 6):
        matrices, found = drawn(queries, OUT, IN, seed=5), torch.zeros(9, queries)
        meet(triplets, matrices, found)
        expected = torch.einsum("roi,qoi->rq", dense, matrices)
        assert (found - expected).norm() < tolerance * expected.norm()


def test_a_layer_without_triplets_adds_nothing() -> None:
    triplets, _ = stored([], "int8")
    found = torch.zeros(9, 3)
    meet(triplets, drawn(3, OUT, IN, seed=6), found)
    assert not found.any()


@pytest.mark.parametrize(
    ("rows", "queries", "way"), [([0, 1, 2], 5, "_one_by_one"), ([0] * 9, 5, "_row_by_row"), ([0] * 9, 1, "_one_by_one")]
)
def test_the_cheaper_way_is_taken(rows: list[int], queries: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_one_by_one", "_row_by_row"):
        monkeypatch.setattr(meeting, name, lambda *given, name=name: taken.append(name))
    meet(stored(rows, "int8")[0], drawn(queries, OUT, IN, seed=7), torch.zeros(9, queries))
    assert taken == [way]
