"""An index, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.index.projection import Projection
from whence.index.search import Best, both_ends
from whence.index.stored import DELETED, StoredIndex
from whence.index.writer import IDS
from whence.storage.shards import ShardStore


class Bench(Protocol):
    """What an index needs of the model: gradients of queries, and exact scores of a few rows."""

    def index_queries(
        self, queries: Any, query_rows: Sequence[int] | None, settings: Mapping[str, Any]
    ) -> tuple[Projection, dict[str, Tensor]]:
        """Return the index's projection, and the queries' P of each layer."""
        ...

    def index_exact(self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any]) -> Tensor:
        """Return exact scores `[query, row]` of rows."""
        ...

    def index_append(self, folder: Path, rows: Any, ids: Sequence[int]) -> None:
        """Add rows to an index."""
        ...


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


def _by_id(ids: Sequence[int] | None) -> Mapping[int, int] | None:
    """Return the places of example ids; None where ids are places."""
    return None if ids is None else {int(example): place for place, example in enumerate(ids)}


class Index:
    """One small row per training example; new queries need no pass over the training data.

    Args:
        bench: an `Attributor` of the model that the index is of.
        folder: where the index is.
        train: the rows, for exact scores of the best.
        places: example ids of these rows, if they are not their places.
    """

    def __init__(self, bench: Bench, folder: Path | str, *, train: Any = None, places: Sequence[int] | None = None) -> None:
        self.folder = Path(folder)
        self._rows: list[tuple[Any, Mapping[int, int] | None]] = [] if train is None else [(train, _by_id(places))]
        self._bench = bench
        self._stored = StoredIndex.open(folder)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._stored.ids)

    @property
    def settings(self) -> dict[str, Any]:
        """Model, curvature and rows that the index was made with."""
        return self._stored.settings

    @property
    def ids(self) -> Tensor:
        """Example ids, int64 `[row]`."""
        return self._stored.ids

    @property
    def self_influence(self) -> Tensor:
        """Each row's influence on its own loss, exact, float32 `[row]`."""
        return self._stored.norms

    @property
    def row_bytes(self) -> float:
        """Bytes on disk per row."""
        return self._stored.row_bytes

    def scores(self, queries: Any, *, query_rows: Sequence[int] | None = None) -> Tensor:
        """Return the index's own scores of all rows, float32 `[query, row]` in the order of `ids`.

        Raises:
            MismatchError: the index is of another model. DataError: a query cannot be used.
        """
        projection, vectors = self._bench.index_queries(queries, query_rows, self.settings)
        held = projection.hold(vectors)
        return torch.cat([scores for _, scores in self._stored.blocks(projection, held)]).T.contiguous()

    def query(self, queries: Any, *, k: int = 10, rescore: float = 0.05, query_rows: Sequence[int] | None = None) -> Answer:
        """Return the rows that pushed each query's measurement down and up most.

        Args:
            queries: rows whose measurement is to be explained.
            k: how many of each.
            rescore: share of the rows, the best by the index at either end, that are scored exactly; 0: none. Needs `train`.
            query_rows: which queries.

        Raises:
            ConfigError: an option cannot be used. MismatchError, DataError: as of `scores`.
        """
        if k < 1 or not 0 <= rescore <= 1:
            raise ConfigError(f"k={k}, rescore={rescore}: give k of 1 or more, and a share from 0 to 1.")
        if rescore and not self._rows:
            raise ConfigError("rescore needs the training rows: open the index with train=..., or say rescore=0.")
        projection, vectors = self._bench.index_queries(queries, query_rows, self.settings)
        candidates = min(len(self), max(k, round(rescore * len(self) / 2)))
        top, bottom = both_ends(self._stored.blocks(projection, projection.hold(vectors)), candidates if rescore else min(k, len(self)))
        if not rescore:
            return Answer(proponents=top, opponents=bottom, exact=False)
        ids = self.ids if rescore == 1 else torch.cat([top.ids, bottom.ids], dim=1).unique()
        rows = [self._row(example) for example in ids.tolist()]
        exact = self._bench.index_exact(queries, query_rows, rows, self.settings)
        blocks = [(ids, exact.T)]
        high, low = both_ends(iter(blocks), min(k, len(ids)))
        return Answer(proponents=high, opponents=low, exact=True)

    def _row(self, example: int) -> Any:
        """Return the row with an example id."""
        for rows, places in self._rows:
            place = example if places is None else places.get(example, -1)
            if 0 <= place < len(rows):
                return rows[place]
        raise ConfigError(f"the index has example {example}, and the training rows at hand do not; give all rows, or say rescore=0.")

    def append(self, train: Any, ids: Sequence[int]) -> None:
        """Add rows.

        Args:
            train: the rows.
            ids: their example ids, none of which the index has.

        Raises:
            ConfigError: an id is there already. Errors of `Attributor.index`.
        """
        self._bench.index_append(self.folder, train, ids)
        self._rows.append((train, _by_id(ids)))
        self._stored = StoredIndex.open(self.folder)

    def delete(self, ids: Sequence[int]) -> None:
        """Delete rows: they are not found any more; their bytes stay on disk.

        Raises:
            ConfigError: an id is not in the index.
        """
        gone = torch.tensor(sorted(set(map(int, ids))), dtype=torch.int64)
        unknown = gone[~torch.isin(gone, self.ids)]
        if len(unknown):
            raise ConfigError(f"id {int(unknown[0])} is not in the index; it has {len(self)} rows.")
        with ShardStore(self.folder, kind="index", settings=self.settings) as store:
            result = store.result
            store.write(DELETED, {IDS: torch.cat([self._stored.deleted, gone]).unique()})
            store.finish(result)
        self._stored = StoredIndex.open(self.folder)

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            StorageError: a file is missing or altered.
        """
        self._stored.verify()
