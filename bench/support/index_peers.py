"""Projected gradients as the peers use them, on our rows: plain gradients, and a curvature made of their projections.

LogIX (Choe et al., 2024): random directions on both sides of each layer, and each layer's own Fisher matrix of projected
gradients. TRAK (Park et al., 2023) as others run it on a loss: one sketch of everything, and the Gram matrix of all its numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.index.dense import DenseRows

DAMPING = 0.1
"""Of the mean eigenvalue, as ours."""


def projected_scores(attributor: Attributor, train: object, queries: object, *, style: str, keep: float, dtype: str) -> dict[str, object]:
    """Return `values` `[query, row]` and `bytes_per_row`; `style`: `"logix"` or `"trak"`."""
    projection = {"logix": "kronecker", "trak": "sjlt"}[style]
    index = attributor.index(train, strategy="identity", projection=projection, keep=keep, dtype=dtype, name="peer", overwrite=True)
    made, held = attributor.index_queries(queries, None, index.settings)
    assert isinstance(made, DenseRows)
    stored = index._stored
    rows = torch.cat([made.numbers(stored.store.view(name)) for name, _ in stored._shards()])
    sizes = [part.size for part in made.parts.values()] if style == "logix" else [rows.shape[1]]
    parts = zip(rows.split(sizes, dim=1), held.split(sizes, dim=1), strict=True)
    return {"values": torch.stack([_inverted(z.double(), q.double()) for z, q in parts]).sum(0), "bytes_per_row": index.row_bytes}


def _inverted(rows: Tensor, queries: Tensor) -> Tensor:
    """`q (Z^T Z / N + d)^-1 z` for every query and row, through the rows' Gram matrix, which is smaller."""
    n, numbers = rows.shape
    gram = rows @ rows.T / n
    damping = DAMPING * gram.trace() / numbers
    cross = queries @ rows.T
    inner = torch.linalg.solve(gram + damping * torch.eye(n, dtype=gram.dtype), gram)
    return (cross - cross @ inner) / damping
