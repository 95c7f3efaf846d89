"""The part of an attributor that writes gradient indexes and answers from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import LayerGradient
from whence.capture.passes import Rows, finished, measurement_of, raise_not_finite_anywhere, run_block
from whence.capture.recorder import Recorder
from whence.capture.survey import Survey
from whence.capture.tracking import TrackedLayer
from whence.curvature.settings import Spectrum
from whence.curvature.stored import Preconditioner, stored_curvature
from whence.errors import ConfigError, MismatchError
from whence.index.balance import Balance, balance
from whence.index.make import make_projection
from whence.index.projection import Projection, RowSettings
from whence.index.stored import claim_part
from whence.index.writer import IndexWriter
from whence.scores.queries import DenseQueries
from whence.scores.request import Ask, Request
from whence.storage.run import fingerprint_rows
from whence.storage.settings import differences, plain_json
from whence.storage.shards import ShardStore
from whence.workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A session with a curvature and a projection."""

    recorder: Recorder
    preconditioner: Preconditioner
    balances: Mapping[str, Balance]
    projection: Projection
    settings: dict[str, Any]


class IndexBench(Workbench):
    """What an `Index` asks of a model."""

    def write_index(self, rows: Rows, ids: Sequence[int], ask: Ask, made: RowSettings, *, append: bool = False) -> Path:
        """Write the rows of an index, or those that are missing; return its folder."""
        with (
            self._ready(rows, ask.strategy, ask.spectrum, made, train=rows.dataset) as ready,
            self._store("index", ask.folder, ready.settings, ask.overwrite) as store,
        ):
            part = claim_part(store, ids, fingerprint_rows(rows.dataset), append=append, replace=ask.overwrite or self._temporary)
            writer = IndexWriter(
                recorder=ready.recorder, preconditioner=ready.preconditioner, projection=ready.projection, store=store, stages=self.stages
            )
            writer.write(rows, part, int(4 * sum(layer.parameters for layer in self._layers) * made.keep))
            store.finish({})
            self._record("index", ready.settings)
            return store.folder

    def index_append(self, folder: Path, rows: Any, ids: Sequence[int]) -> None:
        """Add rows to an index."""
        settings = ShardStore.open(folder, kind="index").settings
        ask = Ask(strategy=settings["strategy"], spectrum=Spectrum.from_json(settings["spectrum"]), name=folder.name)
        taken = self._rows(rows, "training", None, "auto")
        self.write_index(taken, checked_ids(ids, len(taken)), ask, RowSettings(**settings["rows"]), append=True)

    def index_queries(
        self, queries: Any, query_rows: Sequence[int] | None, settings: Mapping[str, Any]
    ) -> tuple[Projection, dict[str, Tensor]]:
        """Return the projection of an index, and the queries' P of each layer, `[query, group, out, in]`.

        Raises:
            MismatchError: the index is of another model, or of factors fitted otherwise.
        """
        rows = self._rows(queries, "query", query_rows, "auto", "query_batch_size")
        spectrum, made = Spectrum.from_json(settings["spectrum"]), RowSettings(**settings["rows"])
        with self._ready(rows, settings["strategy"], spectrum, made, queries=queries) as ready:
            found = list(differences(plain_json(settings, "settings"), plain_json(ready.settings, "settings")))
            if found:
                shown = "; ".join(f"{field}: of the index {old}, of this model {new}" for field, old, new in found[:3])
                raise MismatchError(
                    f"the index was made with another model or curvature: {shown}. Open the one that it is of, or index again."
                )
            with self.stages.stage("Query gradients"):
                held = finished(
                    ready.recorder,
                    rows,
                    partial(_vectors, ready, rows),
                    lambda vectors: all(one.finite() for one in vectors.values()),
                    lambda: raise_not_finite_anywhere(ready.recorder, rows, measurement_of(self.task), "Query gradients"),
                )
            return ready.projection, {name: one.values for name, one in held.items()}

    def index_exact(self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any]) -> Tensor:
        """Return exact scores `[query, row]`."""
        ask = Ask(
            strategy=settings["strategy"],
            spectrum=Spectrum.from_json(settings["spectrum"]),
            request=Request(),
            name="index",
            overwrite=True,
        )
        train = self._rows(rows, "training", None, "auto")
        return self._score(self._rows(queries, "query", query_rows, "auto", "query_batch_size"), train, ask).values

    @contextmanager
    def _ready(self, rows: Rows, strategy: str, spectrum: Spectrum, made: RowSettings, **datasets: Any) -> Iterator[_Ready]:
        with self._session(rows, **datasets) as (recorder, seen):
            factors = self._factors(strategy, seen)
            weighed = self._preconditioner(factors, spectrum)
            curvature = stored_curvature(factors, self._layers)
            names = [layer.name for layer in recorder.taken]
            like = torch.zeros((), dtype=weighed.dtype, device=self.device)
            balances = {name: balance(weighed.basis(name), weighed.weight(name), like) for name in names}
            energies: dict[str, Tensor | None] = {}
            for name in names:
                eigenvalues, weights = curvature[name].eigenvalues, weighed.weight(name)
                energies[name] = None if eigenvalues is None or weights is None else eigenvalues.to(weights) * weights
            shapes = {layer.name: layer.shape for layer in recorder.taken}
            yield _Ready(
                recorder=recorder,
                preconditioner=weighed,
                balances=balances,
                projection=make_projection(made, balances, energies, shapes),
                settings=self._index_settings(strategy, spectrum, made, seen, factors),
            )

    def _index_settings(
        self, strategy: str, spectrum: Spectrum, made: RowSettings, seen: Survey, factors: ShardStore | None
    ) -> dict[str, Any]:
        fitted = {} if factors is None else {key: value for key, value in factors.settings.items() if key not in seen.identity}
        return {"strategy": strategy, "spectrum": spectrum.to_json(), "rows": made.to_json(), "factors": fitted, **seen.identity}


def checked_ids(ids: Sequence[int] | None, rows: int) -> Sequence[int]:
    """Return one id for every row, by default its place.

    Raises:
        ConfigError: there are more or fewer, or one is no whole number of zero or more.
    """
    if ids is None:
        return range(rows)
    if len(ids) != rows or not all(isinstance(example, int) and example >= 0 for example in ids):
        raise ConfigError(f"ids has {len(ids)} entries for {rows} rows; give one whole number, zero or more, for each.")
    return ids


def _vectors(ready: _Ready, rows: Rows) -> dict[str, DenseQueries]:
    """Return P of each layer that a query reaches."""
    found: dict[str, DenseQueries] = {}
    budget = working_set(rows.device.type)

    def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
        if layer.name not in found:
            own = ready.balances[layer.name]
            empty = torch.zeros(len(rows), *layer.shape, dtype=ready.preconditioner.dtype, device=rows.device)
            found[layer.name] = DenseQueries(values=empty, basis=own.queries, weights=own.weights, rotated=True, budget=budget)
        found[layer.name].fill(first, gradient)

    for block in rows.blocks():
        objective = measurement_of(ready.recorder.task)
        run_block(ready.recorder, rows, block, objective, lambda place: partial(consume, place), lambda n: None, first=block.start)
    return found
