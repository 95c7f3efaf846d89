"""The text of each token, as people read it."""

from __future__ import annotations

from collections.abc import Mapping
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
    special = set(tokenizer.all_special_ids)
    of_bytes = any(name.startswith("Ġ") for name in names)  # with spaces of their own
    told = []
    for place, (number, name) in enumerate(zip(ids, names, strict=True)):
        if number in special:
            told.append(f" {name} ")
        else:
            told.append(str(tokenizer.decode([number])) if of_bytes else _word(name, place))
    return told


def _word(name: str, place: int) -> str:
    if name.startswith("##"):  # the middle of a word, in WordPiece
        return name[2:]
    if name.startswith("▁"):  # a space, in SentencePiece
        return f" {name[1:]}"
    return name if place == 0 else f" {name}"
