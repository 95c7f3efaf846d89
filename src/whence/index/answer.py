"""What an index answers."""

from __future__ import annotations

from dataclasses import dataclass

from whence.errors import ConfigError
from whence.index.search import Best


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Rows that queries' behaviour comes from: `proponents` pushed the measurement down, `opponents` up; best first.

    `exact`: the scores are those of `Attributor.scores`, not the index's own.
    """

    proponents: Best
    opponents: Best
    exact: bool

    def top(self, query: int = 0) -> list[tuple[int, float]]:
        """Return (example id, score) of a query's strongest proponents."""
        return _pairs(self.proponents, query)

    def bottom(self, query: int = 0) -> list[tuple[int, float]]:
        """Return (example id, score) of a query's strongest opponents."""
        return _pairs(self.opponents, query)


def _pairs(found: Best, query: int) -> list[tuple[int, float]]:
    if not -len(found.ids) <= query < len(found.ids):
        raise ConfigError(f"query={query} does not exist: there are {len(found.ids)} queries, numbered 0 to {len(found.ids) - 1}.")
    return list(zip(found.ids[query].tolist(), found.values[query].tolist(), strict=True))
