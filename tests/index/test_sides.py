"""Queries taken apart into products of few vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whence.index.sides import LEFT_OUT, RANK, Sides, two_sides


def product(sides: Sides) -> Tensor:
    return sides.outputs.mT @ sides.inputs


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_matrices_of_low_rank_are_whole() -> None:
    matrices = drawn(3, 96, 5) @ drawn(3, 5, 64)
    sides = two_sides(matrices)
    assert sides.outputs.shape == (3, RANK, 96)
    torch.testing.assert_close(product(sides), matrices)


def test_what_is_left_out_is_within_its_bound() -> None:
    matrices = drawn(2, 300, 300) * (0.8 ** torch.arange(300))
    sides = two_sides(matrices)
    assert RANK < sides.outputs.shape[1] < 150
    left = (product(sides) - matrices).square().sum((1, 2)) / matrices.square().sum((1, 2))
    assert (left <= LEFT_OUT).all()
    assert (left > 0).all()


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 50), (50, 1)])
def test_matrices_of_full_rank_stay_whole(shape: tuple[int, int]) -> None:
    matrices = drawn(2, *shape)
    torch.testing.assert_close(product(two_sides(matrices)), matrices)


def test_nothing_comes_of_nothing() -> None:
    assert not product(two_sides(torch.zeros(2, 40, 40))).any()
