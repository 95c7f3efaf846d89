"""A decision on which training rows go: what was decided, why, and its summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whence.runtime import notebook

# Why a row goes or stays; one that goes because of another row is "copy of row N".
BY_SCORE, BELOW, CLASS_LIMIT, NO_ROOM = "score", "", "class limit", "copies do not fit"
KEPT = (BELOW, CLASS_LIMIT, NO_ROOM)


def falling(scores: Tensor) -> Tensor:
    """Return the numbers of the rows by falling score, int64 `[train]`; of equal scores the first row comes first."""
    return torch.argsort(scores, descending=True, stable=True)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which rows go and which stay, and why.

    Attributes:
        scores: float64 `[train]`; the rows with the highest go.
        dropped, kept: numbers of the rows, rising.
        reasons: one per row. Of dropped rows: `score`, or `copy of row N`, which goes with that row. Of kept rows: empty,
            or what saved a row whose score was high enough: `class limit`, or `copies do not fit` (a group of copies that
            is larger than the number of rows that were still to go).
        classes: the class of every row, int64 `[train]`, if it was given.
        settings: what was asked for, JSON.
    """

    scores: Tensor
    dropped: tuple[int, ...]
    kept: tuple[int, ...]
    reasons: tuple[str, ...]
    classes: Tensor | None
    settings: dict[str, Any]

    @property
    def cut(self) -> float | None:
        """The lowest score of a dropped row that went by its score; None if no row was dropped."""
        return min((float(self.scores[row]) for row in self.dropped if self.reasons[row] == BY_SCORE), default=None)

    @property
    def ranks(self) -> Tensor:
        """The place of every row by falling score, from 1, int64 `[train]`; of equal scores the first row comes first."""
        ranks = torch.empty(len(self.scores), dtype=torch.int64)
        ranks[falling(self.scores)] = torch.arange(1, len(self.scores) + 1)
        return ranks

    def per_class(self) -> list[dict[str, int]]:
        """Return class, rows and dropped rows of every class, by rising class; nothing if no classes were given."""
        if self.classes is None:
            return []
        labels = self.classes.tolist()
        rows, dropped = Counter(labels), Counter(labels[row] for row in self.dropped)
        return [{"class": label, "rows": rows[label], "dropped": dropped[label]} for label in sorted(rows)]

    def describe(self, rows: Sequence[int], ids: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """Return number, id (if there are ids `[train]`), score, rank, class and reason of some rows, highest score first."""
        ranks = self.ranks.tolist()
        return [
            {"row": row}
            | ({} if ids is None else {"id": ids[row]})
            | {"score": float(self.scores[row]), "rank": ranks[row]}
            | ({} if self.classes is None else {"class": int(self.classes[row])})
            | {"reason": self.reasons[row]}
            for row in sorted(rows, key=lambda row: ranks[row])
        ]

    @property
    def spared(self) -> tuple[int, ...]:
        """Kept rows whose score was high enough to go, rising; `reasons` says what saved them."""
        return tuple(row for row in self.kept if self.reasons[row])

    def lines(self) -> list[str]:
        """Return a summary for people: how many rows go, where the cut lies, how many of each class, and what was spared."""
        total, gone = len(self.scores), len(self.dropped)
        lines = [f"dropped {gone:,} of {total:,} rows ({gone / total:.1%}), {len(self.kept):,} kept"]
        if (cut := self.cut) is not None:
            below = [float(self.scores[row]) for row in self.kept if not self.reasons[row]]
            tied = sum(value == cut for value in below)
            lines.append(f"cut at a score of {cut:.4g}" + (f"; highest below it {max(below):.4g}" if below else ""))
            lines += [f"{tied:,} kept rows have the score of the cut: among equal scores, the first rows go"] if tied else []
        copies = sum(self.reasons[row] != BY_SCORE for row in self.dropped)
        lines += [f"{copies:,} of the dropped rows are copies that go with another row"] if copies else []
        lines += [
            f"{count:,} rows were kept in spite of their score: {reason}"
            for reason, count in sorted(Counter(self.reasons[row] for row in self.spared).items())
        ]
        if self.classes is not None:
            lines.append(f"{'class':>7} {'rows':>9} {'dropped':>9} {'share':>7}")
            lines += [
                f"{one['class']:>7} {one['rows']:>9,} {one['dropped']:>9,} {one['dropped'] / one['rows']:>7.1%}" for one in self.per_class()
            ]
        return lines

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the summary, and the dropped rows with the highest scores."""
        first, *others = self.lines() if self.classes is None else replace(self, classes=None).lines()
        per_class = [f"class {one['class']}: {one['dropped']:,} of {one['rows']:,}" for one in self.per_class()]
        told = "; ".join([first, *others, *per_class])
        entries = self.describe(self.dropped)[:10]
        heads = list(entries[0]) if entries else ["row"]
        lines = [[f"{value:.4g}" if isinstance(value, float) else value for value in entry.values()] for entry in entries]
        more = f"and {len(self.dropped) - 10:,} more" if len(self.dropped) > 10 else ""
        return notebook.table(told, heads, lines, more=more)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values; the rows themselves are given by `describe`."""
        return {
            "rows": len(self.scores),
            "dropped": len(self.dropped),
            "kept": len(self.kept),
            "cut": self.cut,
            "spared": dict(Counter(self.reasons[row] for row in self.spared)),
            "per_class": self.per_class(),
            "settings": self.settings,
        }
