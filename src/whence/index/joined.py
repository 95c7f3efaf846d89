"""Several checkpoints in one index: an index of each, whose rows stand beside each other.

A score is the mean over the checkpoints of the products of their rows with their queries, each with its checkpoint's own
curvature: checkpoints are put beside each other, never averaged. What is not in the index of every checkpoint does not exist
for readers: an append or a deletion that was broken off between two of them is not there, until the same call has finished it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import StorageError
from whence.index.fidelity import Fidelity
from whence.index.names import row_shards
from whence.index.projection import Held, Projection
from whence.index.stored import Part, StoredIndex

CHECKPOINTS = "checkpoints"
"""Where the settings of an index of several checkpoints keep those of each."""


@dataclass(frozen=True, kw_only=True)
class JoinedIndex:
    """Indexes of the same rows at several checkpoints, read as one; everything as of `StoredIndex`."""

    indexes: Sequence[StoredIndex]

    @classmethod
    def open(cls, folders: Sequence[Path]) -> JoinedIndex:
        """Open an index of every checkpoint for reading.

        Raises:
            StorageError: one is missing, unfinished or damaged, or they are not of the same rows.
        """
        found = [StoredIndex.open(folder) for folder in folders]
        first, *others = found
        whole = min(len(one.parts) for one in found)
        gone = first.deleted
        for one in others:
            gone = gone[torch.isin(gone, one.deleted)]
            _check_alike(first, one, whole)
        return cls(indexes=[replace(one, first=whole, gone=gone) for one in found])

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the first checkpoint, and those of every one under `"checkpoints"`."""
        return {**self.indexes[0].settings, CHECKPOINTS: [one.settings for one in self.indexes]}

    @property
    def parts(self) -> list[Part]:
        """The parts that every checkpoint has."""
        return self.indexes[0].parts

    @property
    def ids(self) -> Tensor:
        """Example ids."""
        return self.indexes[0].ids

    @cached_property
    def norms(self) -> Tensor:
        """Self-influence, the mean over the checkpoints."""
        return torch.stack([one.norms for one in self.indexes]).mean(0)

    @property
    def row_bytes(self) -> float:
        """Bytes on disk per row, those of all checkpoints together."""
        return sum(one.row_bytes for one in self.indexes)

    @property
    def fidelity(self) -> Fidelity | None:
        """Means over the checkpoints of how near each one's scores come to its own exact ones; `least` is the least of all."""
        found = [kept for one in self.indexes if (kept := one.fidelity) is not None]
        if len(found) < len(self.indexes):
            return None
        return replace(
            found[0],
            spearman=sum(one.spearman for one in found) / len(found),
            least=min(one.least for one in found),
            recall=sum(one.recall for one in found) / len(found),
        )

    def blocks(self, projection: Projection, held: Held) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and scores as `StoredIndex.blocks`; `held` is a list of every checkpoint's projection and queries."""
        parts = [one.blocks(*own) for one, own in zip(self.indexes, held, strict=True)]
        for blocks in zip(*parts, strict=True):
            yield blocks[0][0], torch.stack([scores for _, scores in blocks]).mean(0)

    def verify(self) -> None:
        """Read every shard of every checkpoint; as `StoredIndex.verify`."""
        for one in self.indexes:
            one.verify()

    def delete(self, gone: Tensor) -> None:
        """Note in every store that rows are not to be found; they are there until the last one says so."""
        for one in self.indexes:
            one.delete(gone)


def open_stored(folders: Sequence[Path]) -> StoredIndex | JoinedIndex:
    """Open the index in a folder, or that in the folders of several checkpoints; errors as of both."""
    return StoredIndex.open(folders[0]) if len(folders) == 1 else JoinedIndex.open(folders)


def _check_alike(one: StoredIndex, other: StoredIndex, whole: int) -> None:
    """Refuse indexes that are not of the same rows, or made otherwise."""
    same: dict[str, Callable[[StoredIndex], Any]] = {
        "rows": lambda index: [(part.fingerprint, part.ids.tolist()) for part in index.parts[:whole]],
        "curvature": lambda index: [index.settings[name] for name in ("strategy", "spectrum")],
        "what is kept of a row": _kept,
        "shards": lambda index: [sorted(row_shards(index.store, number)) for number in range(whole)],
    }
    differing = [what for what, of in same.items() if of(one) != of(other)]
    if differing:
        raise StorageError(
            f"{one.store.folder} and {other.store.folder} are not one index: they differ in {', '.join(differing)}. "
            "A call that replaces an index may have been broken off: run it again with overwrite, it continues."
        )


def _kept(index: StoredIndex) -> list[Any]:
    rows = index.settings["rows"]
    # Factors are spent at each checkpoint as is best there (whence.index.pilot).
    own = ("dtype", "coordinates") if rows["projection"] == "factors" else ()
    return [index.settings["indexed"], {name: value for name, value in rows.items() if name not in own}]
