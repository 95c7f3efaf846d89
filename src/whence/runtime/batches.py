"""From rows of a data set to batches on a device."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import default_collate

from whence.errors import ConfigError, DataError

_SHOWN_IDS = 32


@dataclass
class Batch:
    """Some rows, collated.

    Attributes:
        data: what the collate function made of the rows.
        ids: each row's index in the data set, in the batch's order.
        single: makes the batch of one row, by its place in this batch; None if the rows are not at hand.
    """

    data: Any
    ids: list[int]
    single: Callable[[int], Batch] | None = None


def check_dataset(dataset: Any, what: str) -> int:
    """Return the number of rows of a data set.

    Args:
        dataset: what the user gave.
        what: its part in the run, for the message, such as `"training"`.

    Raises:
        DataError: it has no `__len__` or `__getitem__`, is a mapping, or is empty.
    """
    form = "Give a sequence of rows: a torch map-style data set, one split of a Hugging Face data set, or a list."
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(repr, list(dataset)[:5]))
        raise DataError(f"the {what} data set is a {type(dataset).__name__} with the keys {keys}, not a sequence of rows. {form}")
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if missing:
        raise DataError(f"the {what} data set, a {type(dataset).__name__}, has no {' and no '.join(missing)}. {form}")
    try:
        count = len(dataset)
    except Exception as error:
        raise DataError(f"the length of the {what} data set, a {type(dataset).__name__}, is not known: {error}. {form}") from error
    if count == 0:
        raise DataError(f"the {what} data set is empty: it has 0 rows and needs at least 1. Check its path, split and filters.")
    return count


def check_rows(rows: Sequence[int] | None, count: int, name: str) -> list[int]:
    """Return the chosen rows of a data set of `count`; None chooses all.

    Raises:
        ConfigError: none is chosen, or one is no index of the data set.
    """
    if rows is None:
        return list(range(count))
    if hasattr(rows, "tolist"):  # tensors and arrays
        rows = rows.tolist()
    if not isinstance(rows, Iterable) or any(isinstance(row, bool) for row in rows):
        raise ConfigError(f"{name} must be a list of row indices, not {rows!r:.60}; of a mask, give the indices that are true.")
    try:
        chosen = [operator.index(row) for row in rows]
    except TypeError:
        raise ConfigError(f"{name} must be whole numbers, the indices of rows; {list(rows)[:5]!r} are not all.") from None
    wrong = [row for row in chosen if not 0 <= row < count]
    if wrong or not chosen:
        problem = f"{wrong[0]} is no row" if wrong else "it names no row"
        raise ConfigError(f"{name}: {problem} of a data set of {count} rows, numbered 0 to {count - 1}.")
    return chosen


def row_blocks(n: int, block: int) -> list[range]:
    """Return `range(0, block), range(block, 2 * block), ...` up to `n`; the last may be short.

    The bounds depend on `n` and `block` only, never on a batch size, so that sums per block can be repeated exactly.

    Raises:
        ConfigError: `block` is less than 1.
    """
    if block < 1:
        raise ConfigError(f"block={block} rows is not possible; give at least 1.")
    return [range(start, min(start + block, n)) for start in range(0, n, block)]


def iterate_batches(
    dataset: Any,
    indices: Sequence[int],
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None = None,
    device: torch.device | str,
) -> Iterator[Batch]:
    """Return an iterator over batches of `dataset[i] for i in indices`, in that order; the last may be short.

    Args:
        dataset: anything whose `dataset[i]` is row i.
        indices: the rows to take.
        batch_size: rows per batch, at least 1.
        collate: from a list of rows to a batch; None is `torch.utils.data.default_collate`.
        device: where `to_device` moves the batch.

    Raises:
        ConfigError: `batch_size` is less than 1 (at the call).
        DataError: a row cannot be read or rows cannot be collated (when their batch is reached).
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not possible; give at least 1.")
    join = default_collate if collate is None else collate
    blocks = row_blocks(len(indices), batch_size)
    return (_batch(dataset, [int(indices[place]) for place in block], join, torch.device(device)) for block in blocks)


def _batch(dataset: Any, ids: list[int], collate: Callable[[list[Any]], Any], device: torch.device) -> Batch:
    rows = []
    for identity in ids:
        try:
            rows.append(dataset[identity])
        except Exception as error:
            raise DataError(f"row {identity} cannot be read: {type(error).__name__}: {error}. Mend or drop the row.") from error

    def join_one(row: Any) -> Any:
        return collate([row])

    try:
        data = collate(rows)
    except Exception as error:
        more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
        raise DataError(
            f"{getattr(collate, '__name__', type(collate).__name__)} cannot make one batch of the examples "
            f"{ids[:_SHOWN_IDS]}{more}: {type(error).__name__}: {error}. "
            "Give rows of one shape and type, or a collate function that pads or converts them."
        ) from error
    return Batch(to_device(data, device), ids, lambda place: Batch(to_device(join_one(rows[place]), device), [ids[place]]))


def to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with all tensors on `device` (not blocking).

    Goes into dicts, other mappings, lists, tuples and named tuples, and calls `.to` where an object has one (such as Hugging
    Face's BatchEncoding, which moves in place). Anything else is passed on as it is.
    """
    if isinstance(value, torch.Tensor):
        # A row that requires a gradient would be left with one after the backward pass.
        return value.detach().to(device, non_blocking=True)
    if callable(getattr(value, "to", None)):
        return value.to(device, non_blocking=True)
    if isinstance(value, MutableMapping):
        moved = copy.copy(value)  # keeps the type, and the collated batch itself as it was
        for key, item in value.items():
            moved[key] = to_device(item, device)
        return moved
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
