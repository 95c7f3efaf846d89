"""Outputs and projected gradients on disk.

A store of kind `linearised` has shards `rows-000000000`, named by the place of their first example, of so many whole examples:
`outputs` and `gradients` of their rows, `counts` `[example]` (rows of each), `labels` `[row]` (place of the label a row is of on the
output's axis; the first where labels are averaged) and `reached` `[layer]`. With `projection="pca"` also `basis`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from whence.errors import StorageError
from whence.refit.linear import Linearised
from whence.storage.shards import ShardStore

KIND = "linearised"
OUTPUTS, GRADIENTS, COUNTS, LABELS, BASIS = "outputs", "gradients", "counts", "labels", "basis"

EXAMPLES = 64
"""Examples of a shard; a kill loses at most the work on one."""


def shard_names(examples: int) -> dict[str, range]:
    """Return the shards' names, with the places of their examples."""
    return {f"rows-{first:09d}": range(first, min(first + EXAMPLES, examples)) for first in range(0, examples, EXAMPLES)}


def shares(counts: Tensor) -> Tensor:
    """Return every row's share in its example's loss, float32 `[row]`, given how many rows each example has."""
    return (1 / counts.float()).repeat_interleave(counts)


@dataclass(frozen=True, kw_only=True)
class StoredLinearised(Linearised):
    """Outputs to first order as they were measured, read into memory.

    Attributes:
        folder: where they are stored.
        labels: int32 `[row]`, place of the label that a row is of on the output's axis: for a causal model the token before it.
        basis: float32 `[wide, k]`, the directions of `projection="pca"` among the random ones; else None.
        settings: model, task, layers, rows and projection that they were measured with.
    """

    folder: Path
    labels: Tensor
    basis: Tensor | None
    settings: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read what is stored in a folder.

        Raises:
            StorageError: there is nothing of the kind, or it is unfinished or damaged.
        """
        store = ShardStore.open(folder, kind=KIND)
        if not store.complete:
            raise StorageError(f"{store.folder}: these gradients are unfinished. Run the command that measures them again; it continues.")
        parts = [store.read(name) for name in sorted(name for name in store.names if name.startswith("rows-"))]
        counts = torch.cat([part[COUNTS] for part in parts]).long()
        return cls(
            outputs=torch.cat([part[OUTPUTS] for part in parts]),
            gradients=torch.cat([part[GRADIENTS] for part in parts]),
            example=torch.arange(len(counts)).repeat_interleave(counts),
            weights=shares(counts),
            examples=len(counts),
            folder=store.folder,
            labels=torch.cat([part[LABELS] for part in parts]),
            basis=store.read(BASIS)[BASIS] if BASIS in store.names else None,
            settings=store.settings,
        )
