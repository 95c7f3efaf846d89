"""Which part of an index rows are written to, and when the index is finished."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whence.capture.tracking import TrackedLayer
from whence.errors import ConfigError, MismatchError
from whence.index.names import DELETED, FINGERPRINT, IDS, about, coarse_name, done, row_shards
from whence.index.stored import Part, StoredIndex, read_part
from whence.scores.blocks import REACHED
from whence.storage.shards import ShardStore


def checked_ids(ids: Any, rows: int | None = None) -> list[int]:
    """Return example ids as whole numbers; None: every row's place.

    Raises:
        ConfigError: there are more or fewer than `rows`, one repeats, or one is no whole number of zero or more.
    """
    if ids is None and rows is not None:
        return list(range(rows))
    given = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(given, Iterable):
        raise ConfigError(f"ids must be a list of whole numbers, not {ids!r:.60}.")
    found = [_checked_id(place, one) for place, one in enumerate(given)]
    if rows is not None and len(found) != rows:
        raise ConfigError(f"ids has {len(found)} entries for {rows} rows; give one whole number, zero or more, for each.")
    twice = [one for one, count in Counter(found).items() if count > 1]
    if rows is not None and twice:
        raise ConfigError(f"ids repeat, id {twice[0]} for one: give every row of an index an id of its own.")
    return found


def known_ids(ids: Any, present: Tensor) -> list[int]:
    """Return example ids as whole numbers; `present`: those of an index.

    Raises:
        ConfigError: one is not in the index, or is no whole number.
    """
    found = checked_ids(ids)
    asked = torch.tensor(found, dtype=torch.int64)
    unknown = asked[~torch.isin(asked, present)]
    if len(unknown):
        raise ConfigError(f"id {int(unknown[0])} is not in the index; it has {len(present)} rows.")
    return found


def _checked_id(place: int, given: Any) -> int:
    try:
        found = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        found = -1
    if not 0 <= found < 2**63:
        raise ConfigError(f"ids: entry {place} is {given!r}; give whole numbers, zero or more.")
    return found


def claim_first(store: ShardStore, ids: Sequence[int], fingerprint: str, *, overwrite: bool, replaceable: bool) -> int:
    """Return the number of the first part, begun for these rows unless it is there already.

    `overwrite` starts anew where it is of other rows, or where something was appended or deleted since; `replaceable` only the first.

    Raises:
        MismatchError: it is of other rows, and neither is said.
    """
    if about(0) in store.names:
        same = _is_of(read_part(store, 0), ids, fingerprint)
        changed = DELETED in store.names or about(1) in store.names
        if same and not (overwrite and changed):
            return 0
        if not (same or overwrite or replaceable):
            raise MismatchError(
                f"{store.folder} indexes other rows. Append these to it, or call with overwrite=True to replace it, "
                "or with name='...' to keep both."
            )
        store.remove(*store.names)
    return _begin(store, 0, ids, fingerprint)


def claim_more(store: ShardStore, ids: Sequence[int], fingerprint: str, number: int | None = None) -> int:
    """Return the number of a part for more rows: the one that was broken off with these rows, or a new one.

    With `number` the part gets that one; what was appended from there on, and is of other rows, is dropped.

    Raises:
        ConfigError: an id is in the index already, or was. StorageError: the index itself is unfinished.
    """
    stored, wanted = replace(StoredIndex.of(store), first=number), torch.tensor(ids)
    if len(both := wanted[torch.isin(wanted, stored.ids)]):
        raise ConfigError(f"id {int(both[0])} and {len(both) - 1} more are in the index already; delete them first, or give other ids.")
    if len(again := wanted[torch.isin(wanted, stored.deleted)]):
        raise ConfigError(f"id {int(again[0])} was deleted from the index and cannot be used again; give other ids.")
    number = len(stored.parts)
    if about(number) in store.names:
        if _is_of(read_part(store, number), ids, fingerprint):
            return number
        rows = row_shards(store, number)
        store.remove(about(number), *rows, *({done(number), *map(coarse_name, rows)} & set(store.names)))
    return _begin(store, number, ids, fingerprint)


def finish(store: ShardStore, layers: Iterable[TrackedLayer]) -> bool:
    """Mark the store complete and name the layers that no row reached, unless a part was broken off; return whether it is complete."""
    if store.complete:
        return True
    numbers = range(sum(name.endswith("/about") for name in store.names))
    if any(done(number) not in store.names for number in numbers):
        return False
    found = torch.stack([store.view(name)[REACHED] for number in numbers for name in row_shards(store, number)]).amax(0)
    store.finish({"unreached": [layer.name for layer, any_ in zip(layers, found.tolist(), strict=True) if not any_]})
    return True


def _is_of(part: Part, ids: Sequence[int], fingerprint: str) -> bool:
    return part.fingerprint == fingerprint and part.ids.tolist() == list(ids)


def _begin(store: ShardStore, number: int, ids: Sequence[int], fingerprint: str) -> int:
    mark = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
    store.write(about(number), {IDS: torch.tensor(ids), FINGERPRINT: mark})
    return number
