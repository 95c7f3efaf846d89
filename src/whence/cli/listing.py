"""How rows that speak for a query are listed, for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.recipes.base import Recipe


_SIDES = {"train": "because of", "query": "in the query"}


def text_of(found: Recipe, row: Any) -> str | None:
    """Return what people read of a row."""
    return found.describe(row) if found.describe else None


def row_entry(found: Recipe, train: int, value: float, row_of: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Return a training row in a list; without a text if it is not at hand."""
    row = found.train[train] if row_of is None else row_of(train)
    return {"train": train, "score": value, "text": None if row is None else text_of(found, row)}


def query_entry(
    found: Recipe,
    query: int | None,
    text: str | None,
    sides: dict[str, list[tuple[int, float]]],
    row_of: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Return a query with its (row, score) on each side; `row_of` gives a row by its id, None where it is not at hand."""
    lists = {side: [row_entry(found, train, value, row_of) for train, value in rows] for side, rows in sides.items()}
    return {"query": query, "text": text, **lists}


def query_lines(entry: dict[str, Any]) -> list[str]:
    """Return a query's entry as lines."""
    lines = head_lines(entry)
    for side in ("proponents", "opponents"):
        if side in entry:
            lines += [f"  {side}", *row_lines(entry[side], indent=4)]
    return lines


def head_lines(entry: dict[str, Any]) -> list[str]:
    """Return what a query is called, its text, and how much several that are explained together agree."""
    usual = "query" if entry["query"] is None else f"query {entry['query']}"
    lines = _with_text(entry.get("head", usual), entry["text"], indent=2, separator=": ")
    agreed = entry.get("agreement")
    if agreed is not None and agreed["correlation"] is not None:
        lines.append(f"  mean correlation between them {agreed['correlation']:+.2f}")
        common = ", ".join(f"{one['train']} ({one['share']:.0%})" for one in agreed["common"])
        lines += [f"  in the lists of several: {common}"] if common else ["  no row is in the lists of several"]
    return lines


def row_lines(rows: Sequence[dict[str, Any]], *, indent: int = 2) -> list[str]:
    """Return training rows as lines."""
    lines = []
    for rank, row in enumerate(rows, start=1):
        head = f"{'':{indent}}{rank:>3}  train {row['train']:>7}  {row['score']:>+11.4e}"
        lines += _with_text(head, row["text"], indent=indent + 5)
        if "tokens" in row:
            told = [f"{name}: {_parts(row['tokens'][side])}" for side, name in _SIDES.items() if side in row["tokens"]]
            lines.append(f"{'':{indent + 5}}{' | '.join(told)}")
    return lines


def _parts(tokens: Sequence[dict[str, Any]]) -> str:
    """Return tokens with their parts of the score; one without a text by its number."""
    named = [(f"#{one['token']}" if one["text"] is None else one["text"], one["part"]) for one in tokens]
    return ", ".join(f"{name} {part:+.2g}" for name, part in named) or "no token"


def _with_text(head: str, text: str | None, *, indent: int, separator: str = "  ") -> list[str]:
    """Put a line of text behind a heading; several go below it."""
    parts = (text or "").splitlines()
    if len(parts) <= 1:
        return [f"{head}{separator}{parts[0]}" if parts else head]
    return [head, *(f"{'':{indent}}{part}".rstrip() for part in parts)]
