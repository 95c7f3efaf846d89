"""What an index needs of the model that it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from whence.index.projection import Held, Projection
from whence.scores.tokens import TokenScores


class Bench(Protocol):
    """What an index needs of the model: gradients of queries, and exact scores of a few rows."""

    def index_queries(self, queries: Any, query_rows: Sequence[int] | None, settings: Mapping[str, Any]) -> tuple[Projection, Held]:
        """Return the index's projection, and the queries as it holds them."""
        ...

    def index_exact(
        self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any], *, together: bool = False
    ) -> Tensor:
        """Return exact scores `[query, row]` of rows; `together`: their mean over the queries, `[1, row]`."""
        ...

    def index_tokens(self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any]) -> TokenScores:
        """Return exact scores of rows by token, on both sides."""
        ...

    def index_append(self, folders: Sequence[Path], rows: Any, ids: Sequence[int]) -> None:
        """Add rows to the index in these folders, one of every checkpoint."""
        ...

    def index_nearest(self, folders: Sequence[Path], rows: Any, settings: Mapping[str, Any]) -> None:
        """Write an approximate index beside the rows; `rows`: a training row at least, to look at the model with."""
        ...
