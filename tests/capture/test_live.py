"""Positions without a gradient are not worked on, and nothing changes."""

import torch

from whence.capture.contract import Sides
from whence.capture.pair import IDENTITY, Pair


def pair_with(zero: list[int]) -> Pair:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    g = torch.randn(3, 2, 5, 6, generator=generator, dtype=torch.float64)
    g[:, :, zero] = 0
    return Pair(a=a, g=g, bias=True)


def test_positions_without_a_gradient_are_dropped() -> None:
    assert pair_with([]).live().sizes.positions == 5
    assert pair_with([1, 2, 3, 4]).live().sizes.positions == 1
    assert pair_with([0, 2]).live().sizes.positions == 3
    assert pair_with([0, 1, 2, 3, 4]).live().sizes.positions == 1
    for least in (1e-300, float("nan")):
        one = pair_with([0, 2, 4])
        one.g[1, 0, 2, 3] = least
        assert one.live().sizes.positions == 3


def test_results_are_the_same_without_them() -> None:
    pair = pair_with([1, 3, 4])
    gradient = torch.einsum("bgto,bgti->bgoi", pair.g, pair.inputs())
    torch.testing.assert_close(pair.sum_of_squares(IDENTITY, 2**20), gradient.square().sum(0))
    torch.testing.assert_close(pair.norms(2**20), gradient.square().sum((2, 3)))
    torch.testing.assert_close(torch.cat([part for _, part in pair.gradients(IDENTITY, 2**20)]), gradient)


def test_covariances_keep_them() -> None:
    assert pair_with([1, 3, 4]).covariances(Sides(inputs=True, outputs=True))[2] == 15
