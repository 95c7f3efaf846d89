"""The matrix of pairwise scores, and what people ask of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from whence.errors import ConfigError, StorageError
from whence.runtime import notebook
from whence.scores.groups import GroupScores, group_scores
from whence.storage.run import write_table_atomic
from whence.storage.shards import ShardStore

TOTAL, TOKENS = "total", "tokens"
"""Keys of a shard: all layers together, and each training token's part."""


def layer_key(number: int, name: str) -> str:
    """Return the name of a layer's scores in a file; numbered, since files keep their tensors by sorted name."""
    return f"layer/{number:05d}/{name}"


def sum_or_join(parts: list[Tensor], *, summed: bool) -> Tensor:
    """Put the blocks' `[query, row]` together: side by side, or added where each is a sum over its rows."""
    return torch.stack(parts).sum(0) if summed else torch.cat(parts, dim=1)


def padded(parts: list[Tensor], dim: int = 1) -> Tensor:
    """Join `[query, row, token]` of blocks whose longest rows differ."""
    longest = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[2])) for part in parts], dim=dim)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Influence scores, float32 on the CPU (float64 for a float64 model).

    `values[q, t] = <grad measurement_q, (H + damping)^-1 grad loss_t>`, H a mean over examples, losses and measurements
    summed over an example's tokens. Positive: training on t pushed measurement q down where it is a loss (t helped).
    Removing t changes the measurement by about `+values[q, t] / N`.

    Attributes:
        values: `[query, train]`, one row or column where queries or rows were summed.
        per_layer: layer name to `[query, train]`; they sum to `values`. Empty unless asked for.
        per_token: `[query, train, token]`, each training token's part, zero past a row's end; None unless asked for.
        query_rows, train_rows: the rows' indices in their data sets.
        trained_rows: number of rows that the model was trained on, N.
        settings: what the scores were computed with.
    """

    values: Tensor
    per_layer: dict[str, Tensor] = field(default_factory=dict)
    per_token: Tensor | None = None
    query_rows: list[int] | None = None
    train_rows: list[int] | None = None
    trained_rows: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise ConfigError(f"scores have shape {tuple(self.values.shape)}; they must be [query, train].")

    def top(self, query: int = 0, k: int = 10) -> list[tuple[int, float]]:
        """Return the strongest proponents of a query: `(train index, score)`, best first, equals by index."""
        return self._ranked(query, k, descending=True)

    def bottom(self, query: int = 0, k: int = 10) -> list[tuple[int, float]]:
        """Return the strongest opponents of a query: `(train index, score)`, most harmful first."""
        return self._ranked(query, k, descending=False)

    @property
    def per_token_rest(self) -> Tensor:
        """What is not of any training token, `[query, train]`: layers off the token axis, and padding.

        Raises:
            ConfigError: the scores were computed without `per_token=True`.
        """
        if self.per_token is None:
            raise ConfigError("these scores are not by token; compute them with per_token=True.")
        return self.values - self.per_token.sum(-1)

    def removal_effect(self, scale: float | None = None) -> Tensor:
        """Return the predicted change of each measurement if a row were removed, `[query, train]`: `scale * values / N`.

        Args:
            scale: measured over predicted change; by default what `damping="calibrated"` found, else 1.

        Raises:
            ConfigError: the scores are normalised or summed over rows, and so predict no removal of one.
        """
        changed = [f"{key}={self.settings[key]!r}" for key in ("normalize", "aggregate") if self.settings.get(key) not in (None, "queries")]
        if changed:
            raise ConfigError(f"scores with {' and '.join(changed)} do not predict the removal of a row; compute them without.")
        factor = self.settings.get("scale", 1.0) if scale is None else scale
        return factor * self.values / (self.trained_rows or self.values.shape[1])

    @property
    def sums_rows(self) -> bool:
        """Whether the one column is a sum over training rows."""
        return self.settings.get("aggregate") in ("rows", "both")

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: the first queries and the three rows at each end of theirs."""
        queries, train = self.values.shape
        caption = f"Scores of {queries:,} queries and {train:,} training rows, {self.settings.get('strategy', 'given by hand')}"
        if self.sums_rows or not self.values.numel():
            return notebook.paragraph(f"{caption}; no rows to list.")
        lines = [
            (
                query if self.query_rows is None else self.query_rows[query],
                notebook.ranked(self.top(query, 3)),
                notebook.ranked(self.bottom(query, 3)),
            )
            for query in range(min(5, queries))
        ]
        heads = ("query", "strongest proponents: row (score)", "strongest opponents")
        return notebook.table(caption, heads, lines, more=f"and {queries - 5:,} more" if queries > 5 else "")

    def by_group(self, groups: Any) -> GroupScores:
        """Return the influence of groups of training rows on each query: sums, means, and how far they are from chance.

        Args:
            groups: what group each training row is in, such as its source, author or label: a vector of numbers or a list. One for
                every row of the data set, or for every column of these scores.

        Raises:
            ConfigError: the sizes do not fit, or the scores were summed over training rows.
        """
        if self.sums_rows:
            raise ConfigError(f"scores with aggregate={self.settings['aggregate']!r} are of no single rows to group; compute them without.")
        given = groups.tolist() if hasattr(groups, "tolist") else list(groups)
        if self.train_rows is not None and len(given) == self.trained_rows:
            given = [given[row] for row in self.train_rows]
        return group_scores(self.values, given, query_rows=self.query_rows)

    def _ranked(self, query: int, k: int, *, descending: bool) -> list[tuple[int, float]]:
        queries = len(self.values)
        if self.sums_rows:
            raise ConfigError(
                f"these scores were computed with aggregate={self.settings['aggregate']!r}: they are sums over training rows, "
                "and no row can be named. Compute them without."
            )
        if not -queries <= query < queries:
            raise ConfigError(f"query={query} does not exist: there are {queries} queries, numbered 0 to {queries - 1}.")
        if k < 1:
            raise ConfigError(f"k={k} cannot be used; ask for at least one row.")
        values, indices = torch.sort(self.values[query], descending=descending, stable=True)
        rows = indices[:k].tolist() if self.train_rows is None else [self.train_rows[i] for i in indices[:k].tolist()]
        return list(zip(rows, values[:k].tolist(), strict=True))

    def save(self, folder: str | Path) -> None:
        """Write the scores into a folder of their own, replacing scores that are there."""
        layers = {layer_key(number, name): values for number, (name, values) in enumerate(self.per_layer.items())}
        tokens = {} if self.per_token is None else {TOKENS: self.per_token}
        named = {"query rows": self.query_rows, "train rows": self.train_rows, "trained rows": self.trained_rows}
        settings = self.settings | {key: value for key, value in named.items() if value is not None}
        with ShardStore(Path(folder), kind="scores", settings=settings, overwrite=True) as store:
            for name in store.names:
                store.remove(name)
            store.write("rows-000000000", {TOTAL: self.values, **layers, **tokens})
            store.finish({})

    @classmethod
    def load(cls, folder: str | Path) -> Scores:
        """Read scores from a folder, of `save` or of a run.

        Raises:
            StorageError: the folder holds no scores, or they are unfinished or damaged.
        """
        store = ShardStore.open(Path(folder), kind="scores")
        if not store.complete:
            raise StorageError(f"{folder}: these scores are unfinished. Run the command that makes them again; it continues.")
        shards = [store.read(name) for name in sorted(store.names)]
        settings = store.settings
        summed = settings.get("aggregate") in ("rows", "both")
        keys = [key for key in sorted(shards[0]) if key == TOTAL or key.startswith("layer/")]
        joined = {key: sum_or_join([shard[key] for shard in shards], summed=summed) for key in keys}
        # A layer that no row gave a gradient is left out of the coverage, and has no scores.
        silent = set(store.result.get("unreached", ()))
        return cls(
            values=joined[TOTAL],
            per_layer={name: joined[key] for key in keys if key != TOTAL and (name := key.split("/", 2)[2]) not in silent},
            per_token=padded([shard[TOKENS] for shard in shards]) if TOKENS in shards[0] else None,
            query_rows=settings.get("query rows"),
            train_rows=settings.get("train rows"),
            trained_rows=settings.get("trained rows"),
            settings=settings,
        )

    def to_parquet(self, path: str | Path, *, k: int = 100) -> None:
        """Write each query's `k` strongest proponents and opponents: query, side, rank, train, score; rows by index.

        Raises:
            ConfigError: the scores were summed over training rows.
        """
        sides: tuple[Literal["proponent"], Literal["opponent"]] = ("proponent", "opponent")
        rows = [
            {
                "query": query if self.query_rows is None else self.query_rows[query],
                "side": side,
                "rank": rank,
                "train": train,
                "score": score,
            }
            for query in range(len(self.values))
            for side, ranked in zip(sides, (self.top(query, k), self.bottom(query, k)), strict=True)
            for rank, (train, score) in enumerate(ranked, start=1)
        ]
        write_table_atomic(Path(path), pa.Table.from_pylist(rows))
