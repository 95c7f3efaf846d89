"""Projected gradients as the peers use them, on our rows: plain gradients, and a curvature made of their projections.

LogIX (Choe et al., 2024): random directions on both sides of each layer, and each layer's own Fisher matrix of projected
gradients. TRAK (Park et al., 2023) as others run it on a loss: one sketch of everything, and the Gram matrix of all its numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whence.index.dense import DenseRows
from whence.index.projection import Kind, Tensors

PROJECTIONS: dict[str, Kind] = {"logix": "kronecker", "trak": "sjlt"}
DAMPING = 0.1
"""Of the mean eigenvalue, as ours."""


def peer_scores(style: str, projection: DenseRows, stored: Tensors, held: Tensor) -> Tensor:
    """Return scores `[row, query]` of projected plain gradients."""
    rows = projection.numbers(stored)
    sizes = [part.size for part in projection.parts.values()] if style == "logix" else [rows.shape[1]]
    parts = zip(rows.split(sizes, dim=1), held.split(sizes, dim=1), strict=True)
    return torch.stack([_inverted(z.double(), q.double()) for z, q in parts]).sum(0).T.float()


def _inverted(rows: Tensor, queries: Tensor) -> Tensor:
    """`q (Z^T Z / N + d)^-1 z` for every query and row, through the rows' Gram matrix, which is smaller."""
    n, numbers = rows.shape
    gram = rows @ rows.T / n
    damping = DAMPING * gram.trace() / numbers
    cross = queries @ rows.T
    inner = torch.linalg.solve(gram + damping * torch.eye(n, dtype=gram.dtype), gram)
    return (cross - cross @ inner) / damping
