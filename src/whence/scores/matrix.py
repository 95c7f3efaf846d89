"""The matrix of pairwise scores, and what people ask of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from whence.errors import ConfigError, StorageError
from whence.storage.run import write_table_atomic
from whence.storage.shards import ShardStore


def layer_key(number: int, name: str) -> str:
    """Return the name of a layer's scores in a file; numbered, since files keep their tensors by sorted name."""
    return f"layer/{number:05d}/{name}"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Influence scores, float32 on the CPU (float64 for a float64 model).

    `values[q, t] = <grad measurement_q, (H + damping)^-1 grad loss_t>`, H a mean over examples, losses and measurements
    summed over an example's tokens. Positive: training on t pushed measurement q down where it is a loss (t helped).
    Removing t changes the measurement by about `+values[q, t] / N`.

    Attributes:
        values: `[query, train]`.
        per_layer: layer name to `[query, train]`; they sum to `values`. Empty unless asked for.
        settings: what the scores were computed with.
    """

    values: Tensor
    per_layer: dict[str, Tensor] = field(default_factory=dict)
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

    def removal_effect(self) -> Tensor:
        """Return the predicted change of each measurement if a row were removed: `values / N`, `[query, train]`."""
        return self.values / self.values.shape[1]

    def _ranked(self, query: int, k: int, *, descending: bool) -> list[tuple[int, float]]:
        queries = len(self.values)
        if not -queries <= query < queries:
            raise ConfigError(f"query={query} does not exist: there are {queries} queries, numbered 0 to {queries - 1}.")
        if k < 1:
            raise ConfigError(f"k={k} cannot be used; ask for at least one row.")
        values, indices = torch.sort(self.values[query], descending=descending, stable=True)
        return list(zip(indices[:k].tolist(), values[:k].tolist(), strict=True))

    def save(self, folder: str | Path) -> None:
        """Write the scores into a folder of their own, replacing scores that are there."""
        layers = {layer_key(number, name): values for number, (name, values) in enumerate(self.per_layer.items())}
        with ShardStore(Path(folder), kind="scores", settings=self.settings, overwrite=True) as store:
            for name in store.names:
                store.remove(name)
            store.write("rows-000000000", {"total": self.values, **layers})
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
        keys = [key for key in sorted(shards[0]) if key == "total" or key.startswith("layer/")]
        joined = {key: torch.cat([shard[key] for shard in shards], dim=1) for key in keys}
        # A layer that no row gave a gradient is left out of the coverage, and has no scores.
        silent = set(store.result.get("unreached", ()))
        layers = {name: joined[key] for key in keys if key != "total" and (name := key.split("/", 2)[2]) not in silent}
        return cls(values=joined["total"], per_layer=layers, settings=store.settings)

    def to_parquet(self, path: str | Path, *, k: int = 100) -> None:
        """Write each query's `k` strongest proponents and opponents: query, side, rank, train, score."""
        sides: tuple[Literal["proponent"], Literal["opponent"]] = ("proponent", "opponent")
        rows = [
            {"query": query, "side": side, "rank": rank, "train": train, "score": score}
            for query in range(len(self.values))
            for side, ranked in zip(sides, (self.top(query, k), self.bottom(query, k)), strict=True)
            for rank, (train, score) in enumerate(ranked, start=1)
        ]
        write_table_atomic(Path(path), pa.Table.from_pylist(rows))
