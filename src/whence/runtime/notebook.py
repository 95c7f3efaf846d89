"""Small pieces of HTML by which results show themselves in notebooks; whatever they are given is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence


def text(value: object) -> str:
    """Return a value as text of a page: escaped, and what no encoding can carry replaced."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def paragraph(value: object) -> str:
    """Return a paragraph."""
    return f"<p>{text(value)}</p>"


def table(caption: object, heads: Sequence[object], rows: Sequence[Sequence[object]], *, more: str = "") -> str:
    """Return a table whose first cells head their rows; `more` is a last line over all columns."""
    top = "".join(f"<th scope='col'>{text(head)}</th>" for head in heads)
    lines = [f"<tr><th scope='row'>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>" for first, *rest in rows]
    lines += [f"<tr><td colspan='{len(heads)}'>{text(more)}</td></tr>"] if more else []
    return f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def marked(tokens: Sequence[str], parts: Sequence[float], *, largest: float | None = None) -> str:
    """Return tokens with their parts of a score as colours: red pushed the score up, blue down, the stronger the darker.

    Args:
        tokens: their text in order.
        parts: one number for each; a token without one is left plain.
        largest: the size that has the full colour; None: the largest here.
    """
    most = max(map(abs, parts), default=0.0) if largest is None else largest
    spans = []
    for place, token in enumerate(tokens):
        part = float(parts[place]) if place < len(parts) else 0.0
        # The root: one strong token would leave all others pale.
        share = min(1.0, abs(part) / most) ** 0.5 if most > 0 else 0.0
        colour = "214,39,40" if part > 0 else "31,119,180"
        spans.append(f"<span style='background:rgba({colour},{0.75 * share:.2f})' title='{part:+.3g}'>{text(token)}</span>")
    return f"<span style='white-space:pre-wrap'>{''.join(spans)}</span>"


def ranked(rows: Sequence[tuple[object, float]]) -> str:
    """Return (name, score) pairs in a line, not escaped yet."""
    return ", ".join(f"{name} ({score:+.3g})" for name, score in rows)
