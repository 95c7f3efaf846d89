"""Scores by token, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from whence.errors import ConfigError
from whence.runtime import notebook

TokenSide = Literal["rows", "queries"]
SIDES: tuple[TokenSide, TokenSide] = ("rows", "queries")


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Which tokens scores come from; on the CPU, float32 (float64 for a float64 model), signs as of `Scores`.

    Tokens are numbered without padding: the first real token of a row is 0. Past a row's end there are zeros.

    Attributes:
        values: the scores, `[query, row]`.
        rows: the part of each training token, `[query, row, token]`.
        queries: the part of each token of the query, `[query, row, token]`.
    """

    values: Tensor
    rows: Tensor
    queries: Tensor

    @property
    def rows_rest(self) -> Tensor:
        """What is of no training token, `[query, row]`: of layers off the token axis, such as a classifier's head, and of padding."""
        return self.values - self.rows.sum(-1)

    @property
    def queries_rest(self) -> Tensor:
        """What is of no token of the query, `[query, row]`; as `rows_rest`."""
        return self.values - self.queries.sum(-1)

    def strongest(self, query: int, row: int, *, side: TokenSide = "rows", k: int = 5) -> list[tuple[int, float]]:
        """Return (token, part) of the tokens with the largest parts either way, strongest first; zeros are left out.

        Args:
            query, row: places in `values`.
            side: `"rows"` for the training row's tokens, `"queries"` for the query's.
            k: how many.

        Raises:
            ConfigError: there is no such query, row or side.
        """
        parts = self.parts(query, row, side=side)
        order = parts.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(token, float(parts[token])) for token in order if parts[token] != 0]

    def parts(self, query: int, row: int, *, side: TokenSide = "rows") -> Tensor:
        """Return the parts of one side's tokens, `[token]`; arguments and errors as of `strongest`."""
        if side not in SIDES:
            raise ConfigError(f"side={side!r} is not known; choose 'rows' or 'queries'.")
        queries, rows = self.values.shape
        if not (0 <= query < queries and 0 <= row < rows):
            raise ConfigError(f"query={query}, row={row}: there are {queries} queries and {rows} rows here, numbered from 0.")
        found: Tensor = getattr(self, side)[query, row]
        return found

    def html(self, tokens_row: Sequence[str], tokens_query: Sequence[str], *, query: int = 0, row: int = 0) -> str:
        """Return both texts with every token coloured by its part, for a notebook: `IPython.display.HTML(scores.html(...))`.

        Red pushed the score up, blue down; each text's strongest token has the full colour.

        Args:
            tokens_row, tokens_query: text of each token of the training row and of the query, without padding.
            query, row: places in `values`.

        Raises:
            ConfigError: as of `strongest`.
        """
        texts = [
            f"<div><b>{head}</b> {notebook.marked(tokens, self.parts(query, row, side=side).tolist())}</div>"
            for head, side, tokens in zip(("because of", "in the query"), SIDES, (tokens_row, tokens_query), strict=True)
        ]
        return f"<div>score {float(self.values[query, row]):+.3g}{''.join(texts)}</div>"

    def _repr_html_(self) -> str:
        """Return a small table for notebooks: the first pairs, and the strongest tokens of each by number."""
        queries, rows = self.values.shape
        pairs = [(query, row) for query in range(queries) for row in range(rows)]

        lines = [
            (
                query,
                row,
                f"{float(self.values[query, row]):+.3g}",
                *(notebook.ranked(self.strongest(query, row, side=side, k=3)) for side in SIDES),
            )
            for query, row in pairs[:10]
        ]
        return notebook.table(
            f"Scores by token of {queries:,} queries and {rows:,} training rows",
            ("query", "row", "score", "strongest training tokens: token (part)", "strongest tokens of the query"),
            lines,
            more=f"and {len(pairs) - 10:,} more" if len(pairs) > 10 else "",
        )
