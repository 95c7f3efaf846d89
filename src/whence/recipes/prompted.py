"""What the families of prompts and answers share: only the answer's tokens are trained, the prompt's are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whence.errors import DataError
from whence.recipes.base import Options
from whence.recipes.family import check_length
from whence.recipes.language_models import LanguageModels, refuse_labels
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings, PresetName
from whence.tasks.likelihoods import IGNORE

_GROUPS = ("skill", "_task_name", "task_name", "task", "source", "dataset", "category")
"""Columns that say which source, task or skill a row is of, if none is named; the first that there is."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and what is to be said after it.

    Attributes:
        prompt: text that is read.
        answer: text that is trained.
        stem: text between the two that is read as the model's own words, such as "The answer is".
        more: columns that an encoded row gets besides, for people and programs.
    """

    prompt: str
    answer: str
    stem: str = ""
    more: Row | None = None


class Prompted(LanguageModels, ABC):
    """A family of prompts and answers; what of a family is not here, its own says (`whence.recipes.family.Family`).

    Models are decoders, which read the prompt before the answer, or have an encoder for the prompt (T5).
    """

    layer_sets: ClassVar[dict[str, list[str]]] = {}
    joins_rows: ClassVar[bool] = False
    makes_rows: ClassVar[bool] = False
    architectures: ClassVar[tuple[str, ...]] = ("gpt2", "llama", "gpt_neo", "t5")
    start: ClassVar[PresetName | None] = None

    @abstractmethod
    def pair(self, row: Row, number: int, data: DataSettings) -> Pair:
        """Return prompt and answer of a raw row. Raises DataError: it has none."""

    @abstractmethod
    def options(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> Options | None:
        """Return the answers that raw rows choose from; None: they are free to say anything."""

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give each row's prompt and answer."""
        return (pair.prompt + pair.answer for pair in self.pairs(rows, data))

    def pairs(self, rows: Sequence[Row], data: DataSettings) -> Iterator[Pair]:
        """Give each row's prompt and answer, apart."""
        return (self.pair(row, number, data) for number, row in enumerate(rows))

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return `input_ids`, `labels`, which are -100 on the prompt, and the text."""
        check_length(config, data.max_length)
        return [encode_pair(tokenizer, config, pair, int(data.max_length or 256)) for pair in self.pairs(rows, data)]


def settled_prompts(data: DataSettings, *, task: str, max_length: int) -> DataSettings:
    """Fill in what is not said of rows with a prompt and an answer: the loss of the answer.

    Raises:
        ConfigError: a setting that such rows have no use for.
    """
    refuse_labels(data, "an answer is none")
    return data.over(replace(DataSettings(), task=task, max_length=max_length, measurement="loss"))


def row_groups(train: Sequence[Row], queries: Sequence[Row], column: str | None) -> tuple[list[str], list[str]] | None:
    """Return the source, task or skill of every raw training row and query.

    Where no column is named, it is the first of the usual names that all rows have; None: there is no such column.

    Raises:
        DataError: a row has no such column as is named.
    """
    both = {"training": train, "query": queries}
    if column is None:
        column = next((name for name in _GROUPS if all(row.get(name) is not None for rows in both.values() for row in rows)), None)
    if column is None:
        return None
    for kind, rows in both.items():
        for number, row in enumerate(rows):
            if row.get(column) is None:
                held = ", ".join(name for name in map(str, row) if row[name] is not None)
                raise DataError(f"{kind} row {number} has no {column!r}, which says the group; it has {held}. Name one with --group.")
    return [str(row[column]) for row in train], [str(row[column]) for row in queries]


def encode_pair(tokenizer: Any, config: Any, pair: Pair, length: int, *, ends: bool = True) -> Row:
    """Return a row as the model takes it: the prompt is read, the answer trained, with the tokenizer's end behind it.

    What is longer than `length` loses the beginning of its prompt, so that at least half of the length is left to the answer,
    whose end goes beyond that. A decoder reads prompt, stem and answer in one; of a model with an encoder, the encoder reads
    the prompt and the decoder says the rest, each within `length`.
    """
    prompt, stem, answer = (_tokens(tokenizer, text) for text in (pair.prompt, pair.stem, pair.answer))
    end = [tokenizer.eos_token_id] if ends else []
    answer = [*answer, *end]
    row: Row
    if getattr(config, "is_encoder_decoder", False):
        said = [*stem, *answer][:length]
        labels = ([IGNORE] * len(stem) + answer)[:length]
        row = {"input_ids": [*prompt[-(length - 1) :], tokenizer.eos_token_id], "labels": labels}
        if stem:  # transformers would make what the decoder reads of the labels, which the stem has none of
            row["decoder_input_ids"] = [config.decoder_start_token_id, *said[:-1]]
    else:
        begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
        read = [*prompt, *stem]
        room = length - len(begin)
        answer = answer[: max(room - len(read), room // 2)]
        read = [*begin, *read[max(0, len(read) + len(answer) - room) :]]
        row = {"input_ids": [*read, *answer], "labels": [IGNORE] * len(read) + answer}
    return {**row, "text": f"{pair.prompt}{pair.stem}{pair.answer}", **(pair.more or {})}


def _tokens(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return found
