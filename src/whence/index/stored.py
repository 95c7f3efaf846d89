"""An index on disk: its parts, its rows, and which of them are deleted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import StorageError
from whence.index.fidelity import Fidelity
from whence.index.names import DELETED, FIDELITY, FINGERPRINT, IDS, NORM, about, done, row_shards
from whence.index.projection import Held, Projection
from whence.storage.shards import ShardStore


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part is of: example `ids`, int64 `[row]`, and the 64 hex digits over the rows' content."""

    ids: Tensor
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StoredIndex:
    """The whole parts of an index; one that is being appended, or was broken off, is not there.

    Attributes:
        store: the shards.
        first: only so many parts count; None: all that are whole. gone: these ids are deleted; None: those that the store says.
    """

    store: ShardStore
    first: int | None = None
    gone: Tensor | None = None

    @classmethod
    def open(cls, folder: Path | str) -> StoredIndex:
        """Open an index for reading.

        Raises:
            StorageError: there is none, or it is unfinished or damaged.
        """
        return cls.of(ShardStore.open(folder, kind="index"))

    @classmethod
    def of(cls, store: ShardStore) -> StoredIndex:
        """Return the index in a store.

        Raises:
            StorageError: it is unfinished.
        """
        if done(0) not in store.names:
            raise StorageError(f"{store.folder}: this index is unfinished. Run the command that makes it again; it continues.")
        return cls(store=store)

    @property
    def settings(self) -> dict[str, Any]:
        """Model, curvature and rows that the index was made with."""
        return self.store.settings

    @cached_property
    def parts(self) -> list[Part]:
        """The parts, in their order."""
        count = sum(name.endswith("/done") for name in self.store.names)
        return [read_part(self.store, number) for number in range(count)][: self.first]

    @cached_property
    def deleted(self) -> Tensor:
        """Example ids that are not to be found, int64."""
        if self.gone is not None:
            return self.gone
        return self.store.read(DELETED)[IDS] if DELETED in self.store.names else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def ids(self) -> Tensor:
        """Example ids of the rows that are there, int64 `[row]`, in the order of `blocks`."""
        ids = torch.cat([part.ids for part in self.parts])
        return ids[self._alive(ids)]

    @cached_property
    def norms(self) -> Tensor:
        """Self-influence of these rows, float32 `[row]`."""
        return torch.cat([self.store.view(name)[NORM][self._alive(ids)] for name, ids in self.shards()])

    @property
    def row_bytes(self) -> float:
        """Bytes on disk per row, everything counted."""
        files = sum(path.stat().st_size for path in self.store.folder.iterdir() if path.suffix in (".safetensors", ".faiss"))
        return files / sum(len(part.ids) for part in self.parts)

    @property
    def fidelity(self) -> Fidelity | None:
        """How near the first part's scores come to exact ones; None where that was not looked at."""
        if FIDELITY not in self.store.names:
            return None
        found: dict[str, Any] = {key: value.item() for key, value in self.store.read(FIDELITY).items()}
        return Fidelity(**found)

    def keep_fidelity(self, found: Fidelity) -> None:
        """Write it beside the rows."""
        self.store.write(
            FIDELITY,
            {
                key: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
                for key, value in vars(found).items()
            },
        )

    def blocks(self, projection: Projection, held: Held) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids `[row]` and scores `[row, query]`, shard by shard, without what is deleted."""
        for name, ids in self.shards():
            alive = self._alive(ids)
            scores = projection.scores(self.store.view(name), held, len(ids))
            yield (ids, scores) if bool(alive.all()) else (ids[alive], scores[alive])

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            StorageError: one is missing or altered.
        """
        for name in self.store.names:
            self.store.read(name)

    def delete(self, gone: Tensor) -> None:
        """Note in the store that rows with these ids, int64, are not to be found."""
        with ShardStore(self.store.folder, kind="index", settings=self.settings) as store:
            present = StoredIndex.of(store).deleted  # another process may have written since this object was made
            both, complete, result = torch.cat([present, gone]).unique(), store.complete, store.result
            if len(both) == len(present):
                return
            store.write(DELETED, {IDS: both})
            if complete:
                store.finish(result)

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every shard of rows with the ids of all its rows, deleted ones too."""
        for number, part in enumerate(self.parts):
            names = sorted(row_shards(self.store, number))
            firsts = [int(name.rsplit("-", 1)[1]) for name in names]
            yield from zip(names, part.ids.tensor_split(firsts[1:]), strict=True)

    @property
    def alive(self) -> Tensor:
        """The places, among all rows on disk, of those that are not deleted, int64, ascending."""
        return self._alive(torch.cat([part.ids for part in self.parts])).nonzero().squeeze(1)

    def _alive(self, ids: Tensor) -> Tensor:
        return ~torch.isin(ids, self.deleted)


def read_part(store: ShardStore, number: int) -> Part:
    """Return what a part is of, whole or not."""
    begun = store.read(about(number))
    return Part(ids=begun[IDS], fingerprint=bytes(begun[FINGERPRINT].tolist()).hex())


def by_shard(sizes: Iterable[tuple[str, int]], places: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Yield, of each shard that has any of some places, its name, where it begins, and which of its rows they are.

    Args:
        sizes: every shard's name and number of rows, in their order.
        places: among the rows of all shards, int64, ascending.
    """
    first = 0
    for name, count in sizes:
        here = places[(places >= first) & (places < first + count)] - first
        if len(here):
            yield name, first, here
        first += count
