"""Influence of whole groups of training rows: by source, author, label or cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.runtime import notebook
from whence.storage.run import write_table_atomic


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """Scores added up over groups of training rows, float64 on the CPU; signs as of `Scores`.

    A group that is only big has a large sum too. `noise` says how large sums of that many rows drawn at random are, and `z` how
    many times that the group's sum is away from what such rows have on average. Of 20 groups about one goes beyond 2 by chance.

    Attributes:
        names: what the rows of each group have in common, as text.
        counts: rows of each group, int64 `[group]`.
        sums: `[query, group]`; they sum to each query's sum over all rows.
        expected: sum of as many rows at the mean of all, `[query, group]`.
        noise: standard deviation of the sum of as many rows drawn without replacement, `[query, group]`.
        query_rows: the queries' indices in their data set.
    """

    names: tuple[str, ...]
    counts: Tensor
    sums: Tensor
    expected: Tensor
    noise: Tensor
    query_rows: Sequence[int] | None = None

    @property
    def means(self) -> Tensor:
        """Mean score of a group's rows, `[query, group]`."""
        return self.sums / self.counts

    @property
    def z(self) -> Tensor:
        """`(sums - expected) / noise`, `[query, group]`; 0 where there is no noise: all rows in one group, or scores all equal."""
        away = (self.sums - self.expected) / self.noise
        return torch.where(self.noise > 0, away, torch.zeros_like(away))

    def top(self, query: int = 0, k: int = 10) -> list[dict[str, Any]]:
        """Return the groups with the largest sums, as `{"group", "sum", "mean", "rows", "noise", "z"}`, largest first.

        Raises:
            ConfigError: there is no such query, or `k` is less than 1.
        """
        return self._ranked(query, k, descending=True)

    def bottom(self, query: int = 0, k: int = 10) -> list[dict[str, Any]]:
        """Return the groups with the lowest sums, lowest first; as `top`."""
        return self._ranked(query, k, descending=False)

    def _ranked(self, query: int, k: int, *, descending: bool) -> list[dict[str, Any]]:
        queries = len(self.sums)
        if not -queries <= query < queries or k < 1:
            raise ConfigError(f"query={query}, k={k}: there are {queries} queries, numbered from 0, and k is 1 or more.")
        order = self.sums[query].argsort(descending=descending, stable=True)[:k].tolist()
        means, z = self.means, self.z
        return [
            {
                "group": self.names[group],
                "sum": float(self.sums[query, group]),
                "mean": float(means[query, group]),
                "rows": int(self.counts[group]),
                "noise": float(self.noise[query, group]),
                "z": float(z[query, group]),
            }
            for group in order
        ]

    def to_parquet(self, path: str | Path) -> None:
        """Write all groups of every query: query, group, sum, mean, rows, noise, z; largest sum first."""
        rows = [
            {"query": query if self.query_rows is None else self.query_rows[query], **entry}
            for query in range(len(self.sums))
            for entry in self.top(query, len(self.names))
        ]
        write_table_atomic(Path(path), pa.Table.from_pylist(rows))

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: the first queries and the five groups at each end of theirs."""
        queries, groups = self.sums.shape
        lines = []
        for query in range(min(5, queries)):
            found = self.top(query, groups)
            for entry in found if groups <= 10 else [*found[:5], *found[-5:]]:
                name = query if self.query_rows is None else self.query_rows[query]
                lines.append(
                    (name, entry["group"], *(f"{entry[key]:+.3g}" for key in ("sum", "mean")), entry["rows"], f"{entry['z']:+.1f}")
                )
        return notebook.table(
            f"Influence of {groups:,} groups of {int(self.counts.sum()):,} training rows on {queries:,} queries",
            ("query", "group", "sum", "mean", "rows", "z"),
            lines,
            more=f"and {queries - 5:,} more queries" if queries > 5 else "",
        )


def group_scores(values: Tensor, groups: Any, *, query_rows: Sequence[int] | None = None) -> GroupScores:
    """Add scores up over groups of rows.

    Args:
        values: scores `[query, row]`, of two rows or more.
        groups: what group each row is in: a vector of numbers, or a list of anything that can be a key of a dict.
        query_rows: the queries' indices in their data set.

    Raises:
        ConfigError: sizes do not fit, or an entry cannot name a group.
    """
    given = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    rows = values.shape[1]
    if len(given) != rows:
        raise ConfigError(f"groups has {len(given)} entries for {rows} training rows; give one for each.")
    if rows < 2:
        raise ConfigError(f"groups of {rows} training rows cannot be told from chance; give 2 rows or more.")
    numbers: dict[Any, int] = {}
    try:
        places = torch.tensor([numbers.setdefault(one, len(numbers)) for one in given])
    except TypeError as error:
        raise ConfigError(f"groups: {error}; give names or numbers, one for each row.") from None
    wide = values.detach().cpu().double()
    counts = places.bincount(minlength=len(numbers))
    sums = wide.new_zeros(len(wide), len(numbers)).index_add_(1, places, wide)
    # Of n rows drawn from N without replacement the sum has the variance n (1 - n / N) S^2, S^2 with N - 1 in its divisor.
    spread = (counts.double() * (1 - counts.double() / rows)).clamp(min=0).sqrt()
    deviation = wide.std(1, keepdim=True)
    # Equal scores differ by rounding alone, which is no noise to compare with.
    deviation = torch.where(deviation > 1e-12 * wide.abs().amax(1, keepdim=True), deviation, 0.0)
    return GroupScores(
        names=tuple(map(str, numbers)),
        counts=counts,
        sums=sums,
        expected=wide.mean(1, keepdim=True) * counts,
        noise=deviation * spread,
        query_rows=query_rows,
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How much queries that are explained together agree.

    Attributes:
        queries: how many they are.
        correlation: mean correlation of the scores of all rows, over pairs of queries, -1 to 1; None for fewer than two.
        common: (example id, share of the queries among whose `k` strongest proponents it is), largest share first.
    """

    queries: int
    correlation: float | None
    common: list[tuple[int, float]]


def agreement(values: Tensor, ids: Tensor, k: int) -> Agreement:
    """Return how much the queries of scores `[query, row]` agree; `ids` `[row]` name the rows.

    Rows that are among one query's strongest only are left out of `common`, unless there is only one query.
    """
    queries, rows = values.shape
    wide = values.double() - values.double().mean(1, keepdim=True)
    lengths = wide.norm(dim=1)
    known = lengths > 0
    count = int(known.sum())
    correlation = None
    if count > 1:
        # The sum over all pairs is the square of the sum, less each with itself.
        total = (wide[known] / lengths[known].unsqueeze(1)).sum(0).square().sum()
        correlation = max(-1.0, min(1.0, float(total - count) / (count * (count - 1))))
    best = values.sort(dim=1, descending=True, stable=True)[1][:, : min(k, rows)]
    seen = best.flatten().bincount(minlength=rows)
    order = seen.argsort(descending=True, stable=True)[:k]
    least = min(2, queries)
    common = [(int(ids[place]), int(seen[place]) / queries) for place in order.tolist() if int(seen[place]) >= least]
    return Agreement(queries=queries, correlation=correlation, common=common)
