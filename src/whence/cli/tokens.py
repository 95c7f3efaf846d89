"""The tokens that listed scores come from, on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.index.index import Index
    from whence.recipes.base import Recipe
    from whence.scores.tokens import TokenScores, TokenSide

SHOWN = 5
"""Tokens of a side under a row."""


def mark_tokens(found: Recipe, index: Index, rows: list[Any], entries: list[dict[str, Any]], *, together: bool) -> None:
    """Put into each listed row the strongest tokens of its score: `{"train": [...], "query": [...]}`, the latter of single queries."""
    from whence.scores.tokens import TokenScores

    ids = list(dict.fromkeys(row["train"] for entry in entries for row in _listed(entry)))
    scores = index.explain(rows, ids)
    if together:
        means = {name: getattr(scores, name).mean(0, keepdim=True) for name in ("values", "rows", "queries")}
        scores = TokenScores(**means)
    texts = {example: _texts(found, index.row(example)) for example in ids}
    for number, entry in enumerate(entries):
        asked = [] if together else _texts(found, rows[number])
        for row in _listed(entry):
            place = ids.index(row["train"])
            row["tokens"] = {"train": _strongest(scores, number, place, "rows", texts[row["train"]])}
            if not together:
                row["tokens"]["query"] = _strongest(scores, number, place, "queries", asked)


def _listed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for side in ("proponents", "opponents") for row in entry.get(side, [])]


def _texts(found: Recipe, row: Any) -> list[str]:
    return [] if found.tokens is None else [str(token).strip() for token in found.tokens(row)]


def _strongest(scores: TokenScores, query: int, row: int, side: TokenSide, texts: list[str]) -> list[dict[str, Any]]:
    """Return number, text (None where it is not known) and part of the strongest tokens."""
    found = scores.strongest(query, row, side=side, k=SHOWN)
    return [{"token": token, "text": texts[token] if token < len(texts) else None, "part": part} for token, part in found]
