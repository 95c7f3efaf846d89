"""The text of tokens, as a page marks them: joined, it reads as the row does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from whence.recipes.pieces import pieces

KINDS = {
    "WordPiece": ["[CLS]", "un", "##kind", "word"],
    "SentencePiece": ["[CLS]", "▁un", "kind", "▁word"],
    "bytes": ["[CLS]", "un", "kind", "Ġword"],
}
READ = {
    "WordPiece": [" [CLS] ", " un", "kind", " word"],
    "SentencePiece": [" [CLS] ", " un", "kind", " word"],
    "bytes": [" [CLS] ", "un", "kind", " word"],
}


def tokenizer(names: list[str]) -> Any:
    return SimpleNamespace(
        convert_ids_to_tokens=lambda ids: [names[number] for number in ids],
        decode=lambda ids: "".join(names[number].replace("Ġ", " ") for number in ids),
        all_special_ids=[0],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_read_as_the_row(kind: str) -> None:
    found = pieces(tokenizer(KINDS[kind]), {"input_ids": [0, 1, 2, 3]})
    assert found == READ[kind]
    assert " ".join("".join(found).split()) == "[CLS] unkind word"


def test_rows_of_several_sequences_have_none() -> None:
    assert pieces(tokenizer(KINDS["bytes"]), {"input_ids": [[0, 1], [0, 2]]}) == []
    assert pieces(tokenizer(KINDS["bytes"]), {"input_ids": []}) == []
