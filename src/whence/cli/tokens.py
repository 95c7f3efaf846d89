"""The tokens that listed scores come from, on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.index.index import Index
    from whence.recipes.base import Recipe
    from whence.scores.tokens import TokenScores, TokenSide

SHOWN = 5
"""Tokens of a side under a row."""
QUERIES = 8
"""Queries that are explained at a time: each with the rows that are listed for any of them, of which only its own are looked at."""


def mark_tokens(found: Recipe, index: Index, rows: list[Any], entries: list[dict[str, Any]], *, together: bool) -> None:
    """Put into each listed row the strongest tokens of its score: `{"train": [...], "query": [...]}`, the latter of single queries."""
    from whence.scores.tokens import TokenScores

    if together:
        scores, ids = _explained(index, rows, entries)
        _mark(found, index, TokenScores(**{side: getattr(scores, side).mean(0, keepdim=True) for side in vars(scores)}), ids, entries, [])
        return
    for first in range(0, len(entries), QUERIES):
        some, asked = entries[first : first + QUERIES], rows[first : first + QUERIES]
        scores, ids = _explained(index, asked, some)
        _mark(found, index, scores, ids, some, asked)


def _explained(index: Index, rows: list[Any], entries: list[dict[str, Any]]) -> tuple[TokenScores, dict[int, int]]:
    """Return the scores by token of what is listed for some queries, and the place in them of each example id."""
    ids = list(dict.fromkeys(row["train"] for entry in entries for row in _listed(entry)))
    return index.explain(rows, ids), {example: place for place, example in enumerate(ids)}


def _mark(found: Recipe, index: Index, scores: TokenScores, ids: dict[int, int], entries: list[dict[str, Any]], asked: list[Any]) -> None:
    """Put the tokens into the rows of some entries; `asked`: the row of each one's query, none where they are explained as one."""
    texts = {example: _texts(found, index.row(example)) for example in ids}
    for number, entry in enumerate(entries):
        own = _texts(found, asked[number]) if asked else []
        for row in _listed(entry):
            place = ids[row["train"]]
            row["tokens"] = {"train": _strongest(scores, number, place, "rows", texts[row["train"]])}
            if asked:
                row["tokens"]["query"] = _strongest(scores, number, place, "queries", own)


def _listed(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for side in ("proponents", "opponents") for row in entry.get(side, [])]


def _texts(found: Recipe, row: Any) -> list[str]:
    return [] if found.tokens is None else [str(token).strip() for token in found.tokens(row)]


def _strongest(scores: TokenScores, query: int, row: int, side: TokenSide, texts: list[str]) -> list[dict[str, Any]]:
    """Return number, text (None where it is not known) and part of the strongest tokens."""
    found = scores.strongest(query, row, side=side, k=SHOWN)
    return [{"token": token, "text": texts[token] if token < len(texts) else None, "part": part} for token, part in found]
