"""What an index keeps of a training gradient: the interface, and the choice among its implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from whence.capture.pair import LayerGradient
from whence.errors import ConfigError
from whence.index.encoding import Dtype, check_dtype

Kind = Literal["factors", "pca", "kronecker", "sjlt", "none"]
Tensors = Mapping[str, Tensor]
Held = Any
"""Queries in a form of the projection's own; nobody else looks inside."""


class RowBatch(Protocol):
    """The rows of one batch, as its layers come in."""

    def add(self, layer: str, gradient: LayerGradient) -> None:
        """Take in a layer's gradients of all examples of the batch."""
        ...

    def close(self) -> dict[str, Tensor]:
        """Return the batch's rows as they are stored."""
        ...


class Projection(Protocol):
    """Makes rows of training gradients, and scores of rows and queries."""

    @property
    def settings(self) -> RowSettings:
        """How rows are made."""
        ...

    def batch(self, examples: int) -> RowBatch:
        """Begin a batch."""
        ...

    def join(self, parts: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Return parts of so many examples each as one."""
        ...

    def at(self, rows: Tensors, places: Tensor) -> dict[str, Tensor]:
        """Return the rows at some places, int64 and ascending, as stored rows of their own."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at most, about."""
        ...

    def hold(self, queries: int) -> Held:
        """Begin with so many queries, of which nothing is known yet: they score zero with every row."""
        ...

    def fill(self, held: Held, layer: str, first: int, values: Tensor) -> None:
        """Take a layer's P `[query, group, out, in]` of the queries from `first` on."""
        ...

    def scores(self, rows: Tensors, held: Held, examples: int) -> Tensor:
        """Return products of stored rows with queries, float32 `[row, query]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How rows are made.

    Attributes:
        projection: `"factors"`: the leading singular triplets of each layer's gradient, chosen over all layers; `"pca"`: the
            leading eigenvectors on both sides; `"kronecker"`: random directions on both sides (LoGra, Choe et al., 2024);
            `"sjlt"`: a count sketch; `"none"`: all numbers.
        keep: bytes of a row as a share of the float32 gradient's; `"none"` keeps all numbers whatever it says.
        dtype: `"float32"`, `"bfloat16"`, `"int8"` or `"int4"`, of the numbers kept; `"auto"`: for factors int8 or int4, whichever
            keeps more of a few of the rows, and for the others int8.
        seed: of random directions.
        coordinates: of factors, the share of the leading eigenvectors on either side that they are made of; None: 1, 1/2, 1/4 or
            1/8, whichever keeps more.
    """

    projection: Kind = "factors"
    keep: float = 1 / 64
    dtype: Dtype | Literal["auto"] = "auto"
    seed: int = 0
    coordinates: float | None = None

    def __post_init__(self) -> None:
        if self.projection not in get_args(Kind):
            raise ConfigError(f"projection={self.projection!r} is not known; choose from {', '.join(map(repr, get_args(Kind)))}.")
        if not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise ConfigError(f"keep={self.keep!r} is no share of a gradient's bytes; give a number above 0 and up to 1, such as 1/64.")
        if self.dtype != "auto":
            check_dtype(self.dtype)

    @property
    def number_type(self) -> Dtype:
        """Type of the numbers, once it is settled."""
        return "int8" if self.dtype == "auto" else self.dtype

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)
