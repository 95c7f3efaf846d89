"""What an index answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whence.errors import ConfigError
from whence.index.search import Best
from whence.runtime import notebook
from whence.scores.groups import Agreement

_SHOWN_TEXT = 120


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Rows that queries' behaviour comes from: `proponents` pushed the measurement down, `opponents` up; best first.

    Attributes:
        proponents, opponents: ids and scores, `[query, k]`; one query where several were explained together.
        exact: the scores are those of `Attributor.scores`, not the index's own.
        agreement: how much queries that were explained together agree; None where each was explained for itself.
        text: text of the row with an example id, None where there is none; for notebooks.
    """

    proponents: Best
    opponents: Best
    exact: bool
    agreement: Agreement | None = None
    text: Callable[[int], str | None] | None = None

    def top(self, query: int = 0) -> list[tuple[int, float]]:
        """Return (example id, score) of a query's strongest proponents."""
        return _pairs(self.proponents, query)

    def bottom(self, query: int = 0) -> list[tuple[int, float]]:
        """Return (example id, score) of a query's strongest opponents."""
        return _pairs(self.opponents, query)

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the first queries and the five rows at each end of theirs, with their texts if known."""
        queries = len(self.proponents.ids)
        lines = []
        for query in range(min(5, queries)):
            for side, found in (("proponent", self.top(query)), ("opponent", self.bottom(query))):
                lines += [(query, side, row, f"{score:+.3g}", self._shown(row)) for row, score in found[:5]]
        what = "exact scores" if self.exact else "the index's own scores"
        if self.agreement is not None:
            correlation = self.agreement.correlation
            told = "" if correlation is None else f", mean correlation {correlation:+.2f}"
            what = f"{self.agreement.queries:,} queries together{told}; {what}"
        return notebook.table(
            f"Rows that the behaviour comes from ({what})",
            ("query", "side", "row", "score", "text"),
            lines,
            more=f"and {queries - 5:,} more queries" if queries > 5 else "",
        )

    def _shown(self, row: int) -> str:
        found = " ".join(((self.text and self.text(row)) or "").split())
        return found if len(found) <= _SHOWN_TEXT else f"{found[: _SHOWN_TEXT - 3]}..."


def _pairs(found: Best, query: int) -> list[tuple[int, float]]:
    if not -len(found.ids) <= query < len(found.ids):
        raise ConfigError(f"query={query} does not exist: there are {len(found.ids)} queries, numbered 0 to {len(found.ids) - 1}.")
    return list(zip(found.ids[query].tolist(), found.values[query].tolist(), strict=True))
