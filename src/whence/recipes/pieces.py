"""The text of each token, as people read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def pieces(tokenizer: Any, row: Mapping[str, Any]) -> list[str]:
    """Return the text of every token of a row's `input_ids`, with the spaces before words; none for rows of several sequences.

    Joined, they are the row as the model reads it. A letter of which each token is only a part is a replacement character.
    """
    ids = [*row["input_ids"]]
    if ids and isinstance(ids[0], (list, tuple)):
        return []
    ids = [int(number) for number in ids]
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    read = _reader(tokenizer, names)
    special = set(tokenizer.all_special_ids)
    return [f" {name} " if number in special else read(number, name) for number, name in zip(ids, names, strict=True)]


def _reader(tokenizer: Any, names: list[str]) -> Callable[[int, str], str]:
    """Return what gives the text of a token by its number and name; how words are told apart shows in the names of a row."""
    if any("▁" in name for name in names):  # SentencePiece
        return lambda number, name: name.replace("▁", " ")
    if any(name.startswith("Ġ") for name in names):  # tokens of bytes, whose names are no text
        return lambda number, name: str(tokenizer.decode([number]))
    return lambda number, name: name[2:] if name.startswith("##") else f" {name}"
