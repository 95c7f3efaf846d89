"""The leading directions of the training rows' gradients, found among more random ones.

Rows are measured in four times as many random directions, one shard after the other. The basis is made of the leading eigenvectors of their
second moment about zero, in which every example counts once, whatever its number of tokens. Then each shard is written
again in that basis and its wide form is removed. A process killed anywhere goes on from what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from whence.refit.stored import BASIS, COUNTS, GRADIENTS, shares
from whence.storage.shards import ShardStore

SHARE = "share"


def wide_name(name: str) -> str:
    """Return under which name a shard is kept until the basis is known."""
    return f"wide-{name}"


def settle(store: ShardStore, names: Iterable[str], dimension: int) -> None:
    """Find the basis from the wide shards, and write every shard in it."""
    names = list(names)
    if BASIS not in store.names:
        store.write(BASIS, basis_of((store.read(wide_name(name)) for name in names), dimension))
    basis = store.read(BASIS)[BASIS]
    for name in names:
        if name not in store.names:
            wide = store.read(wide_name(name))
            store.write(name, {**wide, GRADIENTS: in_basis(wide[GRADIENTS], basis)})
        if wide_name(name) in store.names:
            store.remove(wide_name(name))


def in_basis(gradients: Tensor, basis: Tensor) -> Tensor:
    """Return wide gradients `[row, wide]` in a basis `[wide, k]`."""
    return (gradients.double() @ basis.double()).float()


def basis_of(shards: Iterable[Mapping[str, Tensor]], dimension: int) -> dict[str, Tensor]:
    """Return the basis, float32 `[wide, k]` with orthogonal unit columns, and the share of the second moment's trace that it keeps.

    There are no more directions than rows.
    """
    moment, rows = torch.zeros((), dtype=torch.float64), 0
    for shard in shards:
        wide = shard[GRADIENTS].double()
        moment = moment + (wide * shares(shard[COUNTS]).double().unsqueeze(1)).T @ wide
        rows += len(wide)
    values, vectors = torch.linalg.eigh(moment)
    kept = min(dimension, rows, len(values))
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    # An eigenvector's sign is nobody's choice: its largest entry is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    share = values.clamp(min=0).sum() / moment.trace().clamp(min=torch.finfo(torch.float64).tiny)
    return {BASIS: (vectors * largest.sign()).float(), SHARE: share}
