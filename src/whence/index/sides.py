"""Queries as products of few vectors, so that a row's triplets meet them at the cost of vectors and not of matrices.

A query of few tokens has a gradient of low rank; the curvature's weights spoil that only a little. A random range finder
with one power step (Halko, Martinsson and Tropp, 2011) takes a matrix apart at the cost of four products with a thin one; the
energy that it leaves is known exactly, and while it is too much the rank is doubled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 8
LEFT_OUT = 1e-4
"""Share of a query's energy in a layer that may be left out: scores move by a hundredth of what chance would make of them."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One layer's queries: the sum over `rank` of `outputs` `[query, rank, out]` times `inputs` `[query, rank, in]`."""

    outputs: Tensor
    inputs: Tensor


def two_sides(matrices: Tensor, left_out: float = LEFT_OUT) -> Sides:
    """Return matrices `[query, out, in]` as products, whole if that is not dearer."""
    _, outputs, inputs = matrices.shape
    energy, rank = matrices.square().sum((1, 2), dtype=torch.float64), RANK
    # Two thin products for each triplet, against one whole and its meeting with the other side.
    while rank * (outputs + inputs) < outputs * inputs:
        found = _range(matrices, rank)
        if bool((found.inputs.square().sum((1, 2), dtype=torch.float64) >= (1 - left_out) * energy).all()):
            return found
        rank *= 2
    if outputs <= inputs:
        unit = torch.eye(outputs, dtype=matrices.dtype, device=matrices.device)
        return Sides(outputs=unit.expand(len(matrices), -1, -1), inputs=matrices)
    unit = torch.eye(inputs, dtype=matrices.dtype, device=matrices.device)
    return Sides(outputs=matrices.mT, inputs=unit.expand(len(matrices), -1, -1))


def _range(matrices: Tensor, rank: int) -> Sides:
    _, _, inputs = matrices.shape
    drawn = torch.randn(inputs, rank, generator=torch.Generator().manual_seed(0)).to(matrices) / math.sqrt(rank)
    once = torch.linalg.qr(matrices @ drawn).Q
    basis = torch.linalg.qr(matrices @ (matrices.mT @ once)).Q
    return Sides(outputs=basis.mT, inputs=basis.mT @ matrices)
