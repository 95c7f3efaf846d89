"""Every order of every contraction against one einsum over formed gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whence.capture import contract
from whence.capture.contract import Choice, Sides
from whence.capture.pair import IDENTITY, Basis, Pair
from whence.capture.regroup import Regrouping
from whence.errors import LayerError
from whence.scores.queries import DenseQueries
from whence.scores.queries_pairs import PairQueries

SHAPES = [(5, 1, 6, 3, 4), (5, 2, 6, 3, 4), (7, 1, 1, 4, 3), (7, 3, 1, 2, 5)]  # example, group, position, in, out


def make(shape: tuple[int, int, int, int, int], *, bias: bool, seed: int = 0) -> Pair:
    examples, groups, positions, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(examples, groups, positions, inputs, generator=generator, dtype=torch.float64)
    g = torch.randn(examples, groups, positions, outputs, generator=generator, dtype=torch.float64)
    return Pair(a=a, g=g, bias=bias)


def rotation(pair: Pair) -> Basis:
    sizes, generator = pair.sizes, torch.Generator().manual_seed(7)
    sides = [
        torch.linalg.qr(torch.randn(sizes.groups, n, n, generator=generator, dtype=torch.float64)).Q for n in (sizes.inputs, sizes.outputs)
    ]
    return Basis(inputs=sides[0], outputs=sides[1])


def gradients(pair: Pair, basis: Basis) -> Tensor:
    a = torch.cat([pair.a, torch.ones_like(pair.a[..., :1])], dim=-1) if pair.bias else pair.a
    formed = torch.einsum("bgto,bgti->bgoi", pair.g, a)
    if basis.inputs is None or basis.outputs is None:
        return formed
    return torch.einsum("gpo,bgpq,gqi->bgoi", basis.outputs, formed, basis.inputs)


def force(monkeypatch: pytest.MonkeyPatch, name: str, order: str, chunk: int) -> None:
    choose: Callable[..., Choice] = lambda *_: Choice(order=order, flops=0, chunk=chunk)  # type: ignore[arg-type]  # noqa: E731

    def forced(*args: Any, **_: Any) -> Choice:
        return choose(*args)

    monkeypatch.setattr(contract, name, forced)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(("order", "chunk"), [("rotate", 2), ("form", 3), ("form", 100), ("outer", 2)])
def test_squares(monkeypatch: pytest.MonkeyPatch, order: str, chunk: int, rotated: bool, shape: Any, bias: bool) -> None:
    if order == "outer" and shape[2] > 1:
        return  # an order for one position
    pair = make(shape, bias=bias)
    basis = rotation(pair) if rotated else IDENTITY
    expected = gradients(pair, basis).square()
    force(monkeypatch, "squares", order, chunk)
    force(monkeypatch, "gradients", order, chunk)
    weights = torch.rand(expected.shape[1:], dtype=torch.float64)
    torch.testing.assert_close(pair.sum_of_squares(basis, 1), expected.sum(0))
    torch.testing.assert_close(pair.weighted_squares(basis, weights, 1), (expected * weights).sum((1, 2, 3)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ["gram", "form", "outer"])
def test_norms(monkeypatch: pytest.MonkeyPatch, order: str, shape: Any, bias: bool) -> None:
    if order == "outer" and shape[2] > 1:
        return
    pair = make(shape, bias=bias)
    force(monkeypatch, "squares", order, 2)
    torch.testing.assert_close(pair.norms(1), gradients(pair, IDENTITY).square().sum((2, 3)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("order", "chunk"), [("form", 1), ("form", 3), ("form", 100), ("factor", 2)])
@pytest.mark.parametrize("rotated", [True, False])
def test_dense_queries(monkeypatch: pytest.MonkeyPatch, rotated: bool, order: str, chunk: int, shape: Any) -> None:
    if order == "factor" and shape[2] > 1:
        return
    train, query = make(shape, bias=True), make((4, *shape[1:]), bias=True, seed=1)
    basis = rotation(train)
    weights = torch.rand(shape[1], shape[4], shape[3] + 1, dtype=torch.float64)
    queries = DenseQueries(
        values=torch.zeros(4, shape[1], shape[4], shape[3] + 1, dtype=torch.float64),
        basis=basis,
        weights=weights,
        rotated=rotated,
        budget=1,
    )
    queries.fill(0, query)
    force(monkeypatch, "pairwise", order, chunk)
    expected = torch.einsum("bgoi,goi,qgoi->bq", gradients(train, basis), weights, gradients(query, basis))
    torch.testing.assert_close(queries.scores(train), expected)


def test_queries_kept_as_pairs_grow_to_the_longest() -> None:
    train, short, long = (
        make((5, 2, 6, 3, 4), bias=True),
        make((2, 2, 3, 3, 4), bias=True, seed=1),
        make((3, 2, 9, 3, 4), bias=True, seed=2),
    )
    queries = PairQueries.empty(5, short)
    queries.fill(0, short)
    queries.fill(2, long)
    wanted = torch.cat([gradients(short, IDENTITY), gradients(long, IDENTITY)])
    torch.testing.assert_close(queries.scores(train), torch.einsum("bgoi,qgoi->bq", gradients(train, IDENTITY), wanted))


def test_covariances_count_real_positions_only() -> None:
    pair = make((3, 2, 4, 3, 2), bias=True)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    masked = Pair(a=pair.a, g=pair.g, bias=True, mask=mask)
    inputs, outputs, count = masked.covariances(Sides(inputs=True, outputs=True))
    a = torch.cat([pair.a, torch.ones_like(pair.a[..., :1])], dim=-1)
    torch.testing.assert_close(inputs, torch.einsum("bt,bgti,bgtj->gij", mask.double(), a, a))
    torch.testing.assert_close(outputs, torch.einsum("bt,bgto,bgtp->gop", mask.double(), pair.g, pair.g))
    assert count == 8
    thin = masked.covariances(Sides(inputs=False, outputs=False))
    torch.testing.assert_close(thin[0], inputs.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(thin[1], outputs.diagonal(dim1=1, dim2=2))


def test_regrouping_takes_positions_to_their_examples() -> None:
    ids = torch.tensor([[0, 0, 2], [2, -1, 1]])
    grouped = Regrouping(ids, 3)
    x = torch.arange(1.0, 7.0).view(2, 3, 1, 1)
    assert grouped.gather(x).flatten(1).tolist() == [[1.0, 2.0], [6.0, 0.0], [3.0, 4.0]]
    assert grouped.mask(3).tolist() == [[True, True], [True, False], [True, True]]


def test_regrouping_refuses_ids_past_the_losses() -> None:
    with pytest.raises(LayerError, match="example_ids gave 3, but the loss has 2 examples"):
        Regrouping(torch.tensor([0, 3]), 2)
    with pytest.raises(LayerError, match="integers"):
        Regrouping(torch.tensor([0.0, 1.0]), 2)
