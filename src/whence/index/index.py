"""An index, and what can be asked of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.index.answer import Answer
from whence.index.bench import Bench
from whence.index.claim import known_ids
from whence.index.coarse import blocks_at, promising
from whence.index.fidelity import Fidelity
from whence.index.joined import open_stored
from whence.index.nearest import Nearest, check_projection, open_nearest, require_faiss, verify_nearest
from whence.index.projection import Held, Projection
from whence.index.rows_at_hand import RowsAtHand
from whence.index.search import both_ends, candidates, check_question, joined
from whence.index.stored import StoredIndex
from whence.index.turns import Result, in_turns
from whence.runtime.batches import check_dataset
from whence.scores.groups import GroupScores, Together, group_scores
from whence.scores.tokens import TokenScores


class Index:
    """One small row per training example; new queries need no pass over the training data.

    Args:
        bench: an `Attributor` of the model that the index is of, or `Checkpoints` of it.
        folder: where the index is; of several checkpoints, the folders of all, in their order (`Checkpoints.index_folders`).
        train: the rows that were indexed, for exact scores of the best; rows that were appended stand behind them.
        describe: text of a row, for people; answers show it in notebooks.

    Attributes:
        folders: where the index of each checkpoint is; mostly it is one. folder: it, or the folder that all of them lie in.

    Raises:
        StorageError: there is no index, it is unfinished or damaged, or the checkpoints' indexes are not of the same rows.
        ConfigError: no folder is given.
    """

    def __init__(
        self,
        bench: Bench,
        folder: Path | str | Sequence[Path | str],
        *,
        train: Any = None,
        describe: Callable[[Any], str] | None = None,
    ) -> None:
        self.folders = [Path(folder)] if isinstance(folder, Path | str) else list(map(Path, folder))
        if not self.folders:
            raise ConfigError("folder is an empty list; give the folder of an index, or those of all checkpoints.")
        self.folder = Path(os.path.commonpath(self.folders))
        self.describe = describe
        self._bench = bench
        self._open()
        self._rows = RowsAtHand(self._stored.parts, train)

    def _open(self) -> None:
        """Read anew what is on disk."""
        self._stored = open_stored(self.folders)
        vars(self).pop("_nearest", None)

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
        """Each row's influence on its own loss, exact, float32 `[row]` in the order of `ids`."""
        return self._stored.norms

    @property
    def row_bytes(self) -> float:
        """Bytes on disk per row."""
        return self._stored.row_bytes

    @property
    def fidelity(self) -> Fidelity | None:
        """How near the index's own scores come to exact ones, measured when it was made; None if that could not be."""
        return self._stored.fidelity

    def scores(self, queries: Any, *, query_rows: Sequence[int] | None = None) -> Tensor:
        """Return the index's own scores of all rows, float32 `[query, row]` in the order of `ids`.

        Here and in `query`, more queries than fit into a gigabyte as whole gradients are taken in turns, each a pass over the index.

        Raises:
            MismatchError: the index is of another model. DataError: a query cannot be used.
        """
        return torch.cat(self._in_turns(queries, query_rows, self._scores))

    def _in_turns(self, queries: Any, query_rows: Sequence[int] | None, read: Callable[[Projection, Held], Result]) -> list[Result]:
        """Return what `read` makes of the queries of each turn, in the form in which rows meet them."""
        asked = range(check_dataset(queries, "query")) if query_rows is None else query_rows
        settings, checkpoints = self.settings, len(self.folders)
        return in_turns(asked, settings["layers"], checkpoints, lambda turn: read(*self._bench.index_queries(queries, turn, settings)))

    def _scores(self, projection: Projection, held: Held) -> Tensor:
        return torch.cat([scores for _, scores in self._stored.blocks(projection, held)]).T

    def _together(self, queries: Any, query_rows: Sequence[int] | None, k: int) -> Together:
        found = Together(self.ids, k)
        self._in_turns(queries, query_rows, lambda projection, held: found.add(self._scores(projection, held)))
        return found

    def by_group(self, queries: Any, groups: Any, *, query_rows: Sequence[int] | None = None, together: bool = False) -> GroupScores:
        """Return the influence of groups of rows on each query, by the index's own scores.

        Args:
            queries, query_rows, together: as of `query`.
            groups: what group each row is in, in the order of `ids`; see `whence.scores.groups.group_scores`.

        Raises:
            ConfigError: the sizes do not fit. MismatchError, DataError: as of `scores`.
        """
        if together:
            return group_scores(self._together(queries, query_rows, 1).mean, groups)
        return group_scores(self.scores(queries, query_rows=query_rows), groups, query_rows=query_rows)

    def query(
        self,
        queries: Any,
        *,
        k: int = 10,
        rescore: float = 0.05,
        query_rows: Sequence[int] | None = None,
        together: bool = False,
        nprobe: int | None = None,
    ) -> Answer:
        """Return the rows that pushed each query's measurement down and up most.

        Args:
            queries: rows whose measurement is to be explained.
            k: how many of each.
            rescore: share of the rows that are candidates of each query, half of them (but `k` at least) at either end by the
                index. All queries' candidates together are scored exactly for all queries. 0: none. Needs `train`.
            query_rows: which queries.
            together: explain the mean of the queries' measurements, such as of a whole class, as one query; the answer then says how
                much the queries agree, by the index's own scores.
            nprobe: lists of the approximate index (`accelerate`) that are read for each end of each query; by default one in 16;
                0: read all rows instead, and not only those that it, or the coarse vectors of triplets, name. `together` always does.

        Raises:
            ConfigError: an option cannot be used, or all rows are deleted. MismatchError: as of `scores`, or `train` is not what was
                indexed. DataError: as of `scores`.
        """
        check_question(k, rescore, nprobe)
        if rescore and not self._rows:
            raise ConfigError("rescore needs the training rows: open the index with train=..., or say rescore=0.")
        if not len(self):
            raise ConfigError(f"all rows of {self.folder} are deleted, so there is nothing to ask; append rows, or index again.")
        agreed, several = None, candidates(len(self), k, rescore)
        if together:
            explained = self._together(queries, query_rows, k)
            agreed = explained.agreement()
            top, bottom = both_ends([(self.ids, explained.mean.float().T)], several)
        else:
            ends = self._in_turns(queries, query_rows, lambda *asked: both_ends(self._blocks(asked, several, nprobe), several))
            top, bottom = map(joined, zip(*ends, strict=True))
        if rescore:
            ids = self.ids if rescore == 1 else torch.cat([top.ids, bottom.ids], dim=1).unique()
            rows = self._rows.at(ids.tolist(), "or say rescore=0")
            exact = self._bench.index_exact(queries, query_rows, rows, self.settings, together=together)
            top, bottom = both_ends([(ids, exact.T)], min(k, len(ids)))
        return Answer(proponents=top, opponents=bottom, exact=rescore > 0, agreement=agreed, text=self._text)

    def _blocks(self, asked: tuple[Projection, Held], several: int, nprobe: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Return ids and scores of all rows, or of those that an approximate index or the coarse vectors name."""
        projection, held = asked
        if nprobe == 0 or not isinstance(self._stored, StoredIndex):
            return self._stored.blocks(projection, held)
        nearest = self._nearest
        places = promising(self._stored, projection, held, several) if nearest is None else nearest.candidates(held, several, nprobe)
        return self._stored.blocks(projection, held) if places is None else blocks_at(self._stored, projection, held, places)

    @cached_property
    def _nearest(self) -> Nearest | None:
        if not isinstance(self._stored, StoredIndex):
            return None
        found, why_not = open_nearest(self._stored)
        if why_not is not None:
            warnings.warn(f"{why_not}; all rows are read instead. Make it anew with accelerate, or whence index --faiss.", stacklevel=4)
        return found

    def accelerate(self) -> None:
        """Write an approximate index beside the rows, for some millions of them; `query` then reads part of the rows. Needs `train`.

        It takes a byte for each number of each row, in memory while it is made, and on disk. After `append` and `delete`
        it is not used until it is made anew by this. See the module `whence.index.nearest`, and docs/guide/index.md for when it pays.

        Raises:
            ConfigError: rows are triplets, FAISS is not installed, the index is of several checkpoints, or there is no `train`.
            StorageError: another process is writing the index, or the disk refuses.
        """
        check_projection(self.settings["rows"]["projection"])
        require_faiss()
        if not self._rows:
            raise ConfigError("accelerate needs a training row to look at the model with: open the index with train=...")
        self._bench.index_nearest(self.folders, self._rows.given[0], self.settings)
        self._open()

    def _text(self, example: int) -> str | None:
        row = None if self.describe is None else self.row(example)
        return None if row is None or self.describe is None else self.describe(row)

    def explain(self, queries: Any, ids: Sequence[int], *, query_rows: Sequence[int] | None = None) -> TokenScores:
        """Say which tokens of training rows, and which tokens of the queries, their scores come from; needs `train`.

        The scores are exact, whatever the index keeps of a row. `ids` are a few, such as those of an answer.

        Args:
            queries, query_rows: as of `query`.
            ids: example ids, the order of `[row]` in the result.

        Raises:
            ConfigError: no id, one that is not in the index, no `train`, or a model without tokens.
            MismatchError, DataError: as of `query`.
        """
        wanted = known_ids(ids, self.ids)
        if not wanted:
            raise ConfigError(f"ids={ids}: there is none. Give ids of rows.")
        if not self._rows:
            raise ConfigError("explain needs the training rows: open the index with train=...")
        return self._bench.index_tokens(queries, query_rows, self._rows.at(wanted), self.settings)

    def places(self) -> list[int]:
        """Return where every row is among the rows at hand, `train` before what was appended, in the order of `ids`.

        Raises:
            MismatchError: a row is not at hand.
        """
        return self._rows.places(self.ids.tolist())

    def row(self, example: int) -> Any:
        """Return the training row with an example id; None if it is not among the rows at hand."""
        return self._rows.row(example)

    def place(self, example: int) -> int | None:
        """Return where the row with an example id stands in `train` as it was given; None if it is not there."""
        return self._rows.place(example)

    def append(self, train: Any, ids: Sequence[int]) -> None:
        """Add rows.

        Args:
            train: the rows.
            ids: their example ids, none of which the index has or had.

        The index can be asked meanwhile, and if this breaks off; the rows are there once all of them are written. The same call
        then continues, a call with other rows begins anew.

        Raises:
            ConfigError: an id is there already, or was. MismatchError: the model is not the index's. Errors of `Attributor.index`.
        """
        self._bench.index_append(self.folders, train, ids)
        self._open()
        self._rows = self._rows.followed_by(self._stored.parts, train)

    def delete(self, ids: Sequence[int]) -> None:
        """Delete rows: they are not found any more; their bytes stay on disk.

        Of several checkpoints, rows are there until all say so; after a deletion that broke off the same call goes on.

        Raises:
            ConfigError: an id is not in the index, or no whole number.
        """
        self._open()  # another process may have written since this object was made
        self._stored.delete(torch.tensor(known_ids(ids, self.ids), dtype=torch.int64).unique())
        self._open()

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            StorageError: a file is missing or altered.
        """
        self._stored.verify()
        for folder in self.folders:
            verify_nearest(folder)
