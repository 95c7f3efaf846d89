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
        groups: what group each row is in: a vector of numbers, or a list of anything that can be a key of a dict. What reads the same,
            such as 1 and "1", or all that is NaN, is one group.
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
    numbers: dict[str, int] = {}
    try:
        places = torch.tensor([numbers.setdefault(_name(one), len(numbers)) for one in given])
    except TypeError as error:
        raise ConfigError(f"groups: {error}; give names or numbers, one for each row.") from None
    counts = places.bincount(minlength=len(numbers))
    sums = torch.zeros(len(values), len(numbers), dtype=torch.float64)
    means, deviations = sums.new_zeros(len(values), 1), sums.new_zeros(len(values), 1)
    for query, own in enumerate(values.detach()):  # one at a time: all in float64 would be twice as much as the scores
        wide = own.cpu().double()
        sums[query].index_add_(0, places, wide)
        means[query], deviation = wide.mean(), wide.std()
        # Equal scores differ by rounding alone, which is no noise to compare with.
        deviations[query] = deviation if deviation > 1e-12 * wide.abs().max() else 0.0
    # Of n rows drawn from N without replacement the sum has the variance n (1 - n / N) S^2, S^2 with N - 1 in its divisor.
    spread = (counts.double() * (1 - counts.double() / rows)).clamp(min=0).sqrt()
    return GroupScores(
        names=tuple(numbers),
        counts=counts,
        sums=sums,
        expected=means * counts,
        noise=deviations * spread,
        query_rows=query_rows,
    )


def _name(one: Any) -> str:
    hash(one)  # a list, which is no name, is refused
    return str(one)


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


class Together:
    """Queries that are explained as one. Their scores come in a few queries at a time, and are not kept.

    Args:
        ids: example ids of the rows, `[row]`.
        k: how many proponents of each query count, and at most how many are common.
    """

    def __init__(self, ids: Tensor, k: int) -> None:
        self.ids, self.k = ids, k
        self.queries = self._varied = 0
        self._sum, self._directions = (torch.zeros(len(ids), dtype=torch.float64) for _ in range(2))
        self._seen = torch.zeros(len(ids), dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Take in scores `[query, row]`."""
        for own in values:
            wide = own.double()
            self._sum += wide
            away = wide - wide.mean()
            length = float(away.norm())
            if length > 0:
                self._directions += away / length
                self._varied += 1
            self._seen[_strongest(own, self.k)] += 1
            self.queries += 1

    @property
    def mean(self) -> Tensor:
        """Mean of the scores, float64 `[1, row]`."""
        return (self._sum / self.queries).unsqueeze(0)

    def agreement(self) -> Agreement:
        """Return how much the queries agree.

        Rows that are among one query's strongest only are left out of `common`, unless there is only one query.
        """
        count, correlation = self._varied, None
        if count > 1:
            # The sum over all pairs is the square of the sum, less each with itself.
            total = float(self._directions.square().sum())
            correlation = max(-1.0, min(1.0, (total - count) / (count * (count - 1))))
        order = self._seen.argsort(descending=True, stable=True)[: self.k].tolist()
        shares = [(int(self.ids[place]), int(self._seen[place])) for place in order]
        common = [(example, seen / self.queries) for example, seen in shares if seen >= min(2, self.queries) and seen]
        return Agreement(queries=self.queries, correlation=correlation, common=common)


def _strongest(values: Tensor, k: int) -> Tensor:
    """Return the places of the `k` largest numbers; of equal ones the first."""
    if k >= len(values):
        return torch.arange(len(values))
    # Not the whole is sorted: only what is as large as the last of them.
    among = (values >= values.topk(k).values[-1]).nonzero().squeeze(1)
    return among[values[among].argsort(descending=True, stable=True)[:k]]
