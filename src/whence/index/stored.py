"""An index on disk: its parts, its rows, and which of them are deleted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, StorageError
from whence.index.projection import Held, Projection
from whence.index.writer import FINGERPRINT, IDS, NORM, about
from whence.storage.shards import ShardStore

DELETED = "deleted"


@dataclass(frozen=True, kw_only=True)
class StoredIndex:
    """A finished index, open for reading."""

    store: ShardStore

    @classmethod
    def open(cls, folder: Path | str) -> StoredIndex:
        """Open an index.

        Raises:
            StorageError: there is none, or it is unfinished or damaged.
        """
        store = ShardStore.open(folder, kind="index")
        if not store.complete:
            raise StorageError(f"{folder}: this index is unfinished. Run the command that makes it again; it continues.")
        return cls(store=store)

    @property
    def settings(self) -> dict[str, Any]:
        """Model, curvature and rows that the index was made with."""
        return self.store.settings

    @cached_property
    def deleted(self) -> Tensor:
        """Example ids that are not to be found, int64."""
        return deleted(self.store)

    @cached_property
    def ids(self) -> Tensor:
        """Example ids of the rows that are there, int64 `[row]`, in the order of `blocks`."""
        return torch.cat([ids for _, ids in self._shards()])

    @cached_property
    def norms(self) -> Tensor:
        """Self-influence of these rows, float32 `[row]`."""
        norms = torch.cat([self.store.view(name)[NORM] for name, _ in self._named()])
        return norms[self._alive(torch.cat([ids for _, ids in self._named()]))]

    @property
    def row_bytes(self) -> float:
        """Bytes on disk per row, everything counted."""
        files = sum(path.stat().st_size for path in self.store.folder.iterdir() if path.suffix == ".safetensors")
        return files / max(1, sum(len(ids) for _, ids in self._named()))

    def blocks(self, projection: Projection, held: Held) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids `[row]` and scores `[row, query]`, shard by shard, without what is deleted."""
        for name, ids in self._named():
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

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        for name, ids in self._named():
            yield name, ids[self._alive(ids)]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every shard of rows with the ids of all its rows."""
        for part in range(parts(self.store)):
            ids, first = self.store.view(about(part))[IDS], 0
            for name in sorted(name for name in self.store.names if name.startswith(f"part-{part:04d}/rows-")):
                first = int(name.rsplit("-", 1)[1])
                yield name, ids[first : first + len(self.store.view(name)[NORM])]

    def _alive(self, ids: Tensor) -> Tensor:
        return ~torch.isin(ids, self.deleted)


def parts(store: ShardStore) -> int:
    """Return the number of parts."""
    return sum(name.endswith("/about") for name in store.names)


def deleted(store: ShardStore) -> Tensor:
    """Return the ids that are deleted."""
    return store.read(DELETED)[IDS] if DELETED in store.names else torch.zeros(0, dtype=torch.int64)


def claim_part(store: ShardStore, ids: Sequence[int], fingerprint: str, *, append: bool, replace: bool) -> int:
    """Return the number of the part for rows with these ids: one that was begun with them, or a new one; `replace` drops others.

    Raises:
        ConfigError: ids repeat, or some are in the index already; or the index is of other data and `append` is not said.
    """
    wanted = torch.tensor(list(ids), dtype=torch.int64)
    if len(wanted.unique()) < len(wanted):
        raise ConfigError("ids repeat: give every row of an index an id of its own.")
    mark = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
    number = parts(store)
    for part in range(number):
        begun = store.read(about(part))
        if torch.equal(begun[IDS], wanted) and torch.equal(begun[FINGERPRINT], mark):
            return part
    if number and not append and replace:
        for name in store.names:
            store.remove(name)
        number = 0
    if number and not append:
        raise ConfigError(
            f"{store.folder} indexes other rows. Append these to it, or call with overwrite=True to replace it, "
            "or with name='...' to keep both."
        )
    gone = deleted(store)
    for part in range(number):
        there = store.read(about(part))[IDS]
        both = wanted[torch.isin(wanted, there[~torch.isin(there, gone)])]
        if len(both):
            raise ConfigError(f"id {int(both[0])} and {len(both) - 1} more are in the index already; delete them first, or give other ids.")
        if len(again := wanted[torch.isin(wanted, there)]):
            raise ConfigError(f"id {int(again[0])} was deleted from the index and cannot be used again; give other ids.")
    store.write(about(number), {IDS: wanted, FINGERPRINT: mark})
    return number
