"""The rows of a fine-tune: read, flipped where that is asked for, and encoded; its task and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whence.pretrained.kinds import KINDS, Kind
from whence.pretrained.loading import collator_for
from whence.recipes.family import Family, auto_of
from whence.recipes.labels import flip_labels
from whence.recipes.rows import Row, read_split, split_name
from whence.recipes.settings import DataSettings
from whence.storage.run import fingerprint_rows
from whence.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Split:
    """Raw and encoded rows of one split; blocks of text are their own raw rows.

    Attributes:
        raw, encoded: the rows.
        flipped: which labels were made wrong on purpose.
        name: of queries, how the data set names the split that they are really of; see `whence.recipes.rows.split_name`.
    """

    raw: list[Row]
    encoded: list[Row]
    flipped: Tensor | None = None
    name: str | None = None


def read_splits(family: Family, data: DataSettings, tokenizer: Any, config: Any, seed: int) -> tuple[Split, Split]:
    """Return training rows and queries; `data` is settled."""
    train = encode_train(family, data, tokenizer, config, read_train(family, data), seed)
    return train, read_queries(family, data, tokenizer, config)


def read_train(family: Family, data: DataSettings) -> list[Row]:
    """Return the raw training rows, before any label is flipped."""
    limit = None if family.joins_rows else data.max_train_rows
    return read_split(family.source(data), data.data, "train", limit=limit, file=data.train_file)


def fingerprint_raw(family: Family, data: DataSettings, raw: list[Row]) -> str:
    """Return 64 hex digits over what training takes of raw rows, texts and labels; other columns may change."""
    labels = [] if data.label is None else [str(row.get(data.label)) for row in raw]
    return fingerprint_rows([list(family.texts(raw, data)), labels])


def read_queries(family: Family, data: DataSettings, tokenizer: Any, config: Any) -> Split:
    """Return the queries as the model takes them."""
    raw = read_raw_queries(family, data)
    found = _split(family, data, raw, family.encode(tokenizer, config, raw, data), data.max_query_rows)
    return replace(found, name=split_name(family.source(data), data.data, "validation"))


def read_raw_queries(family: Family, data: DataSettings) -> list[Row]:
    """Return the raw rows that queries are made of."""
    limit = None if family.joins_rows else data.max_query_rows
    return read_split(family.source(data), data.data, "validation", limit=limit)


def encode_train(family: Family, data: DataSettings, tokenizer: Any, config: Any, raw: list[Row], seed: int) -> Split:
    """Return the training rows as the model takes them; the labels that are flipped are keyed by the seed."""
    flipped = None
    if data.flip:
        raw, flipped = _flip(raw, str(data.label), data.flip, seed)
    return replace(_split(family, data, raw, family.encode(tokenizer, config, raw, data), data.max_train_rows), flipped=flipped)


def _split(family: Family, data: DataSettings, raw: list[Row], encoded: list[Row], limit: int | None) -> Split:
    if not family.joins_rows:
        return Split(raw=raw, encoded=encoded)
    encoded = encoded[:limit]
    return Split(raw=[{"text": row["text"]} for row in encoded], encoded=encoded)


def _flip(raw: list[Row], label: str, share: float, seed: int) -> tuple[list[Row], Tensor]:
    values = sorted({row[label] for row in raw})
    numbers = torch.tensor([values.index(row[label]) for row in raw])
    generator = torch.Generator().manual_seed(seed)
    flipped = flip_labels(numbers, share=share, classes=len(values), generator=generator)
    changed = [{**row, label: values[number]} for row, number in zip(raw, flipped.tolist(), strict=True)]
    return changed, flipped != numbers


def task_of(family: Family, data: DataSettings, config: Any = None) -> Task:
    """Return the task of a model with this configuration, or of the family's usual one, with the measurement that is asked for."""
    return _kind(family, config).task(measurement=str(data.measurement))


def collate_of(family: Family, model: Any, tokenizer: Any) -> Callable[[list[Any]], Any]:
    """Return the collate function of a model of the family."""
    return collator_for(model, _kind(family, model.config), tokenizer)


def _kind(family: Family, config: Any) -> Kind:
    return next(kind for kind in KINDS if kind.auto == auto_of(family, config))
