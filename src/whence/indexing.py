"""The part of an attributor that writes gradient indexes and answers from them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import LayerGradient
from whence.capture.passes import Rows, finished, measurement_of, raise_not_finite_anywhere, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.settings import Spectrum
from whence.curvature.stored import Preconditioner, stored_curvature
from whence.errors import MismatchError
from whence.index.balance import Balance, balance
from whence.index.claim import checked_ids, claim_first, claim_more, finish
from whence.index.dense import DenseRows
from whence.index.fidelity import drawn_for_fidelity, fidelity
from whence.index.make import make_dense, make_factors
from whence.index.nearest import write_nearest
from whence.index.pilot import best_spent
from whence.index.projection import Held, Projection, RowSettings
from whence.index.stored import StoredIndex
from whence.index.turns import in_turns
from whence.index.writer import IndexWriter
from whence.scores.blocks import block_names
from whence.scores.matrix import TOTAL
from whence.scores.pairwise import Pairwise
from whence.scores.request import Ask, Request
from whence.scores.tokens import TokenScores
from whence.storage.settings import differences, plain_json
from whence.storage.shards import ShardStore, temporary_store
from whence.tokenwise import TokenBench


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A session with a curvature and a projection; `data`: fingerprints of the data sets that were looked at."""

    recorder: Recorder
    preconditioner: Preconditioner
    balances: Mapping[str, Balance]
    projection: Projection
    settings: dict[str, Any]
    data: Mapping[str, str]


class IndexBench(TokenBench):
    """What an `Index` asks of a model."""

    def write_index(self, rows: Rows, ids: Sequence[int], ask: Ask, made: RowSettings) -> Path:
        """Write the rows of an index, or those that are missing; return its folder."""
        with (
            self._ready(rows, ask.strategy, ask.spectrum, made, train=rows.dataset) as ready,
            self._store("index", ask.folder, ready.settings, ask.overwrite) as store,
        ):
            part = claim_first(store, ids, ready.data["train"], overwrite=ask.overwrite, replaceable=self._temporary)
            self._write_part(ready, store, rows, part)
            return store.folder

    def index_append(self, folders: Sequence[Path], rows: Any, ids: Any, *, number: int | None = None) -> None:
        """Add rows to the index in the one folder, as its part `number` if that is given (see `claim_more`)."""
        (folder,) = folders
        settings = StoredIndex.open(folder).settings
        taken = self._rows(rows, "training", None, "auto")
        wanted = checked_ids(ids, len(taken))
        spectrum, made = Spectrum.from_json(settings["spectrum"]), RowSettings(**settings["rows"])
        with (
            self._ready(taken, settings["strategy"], spectrum, made, settings.get("indexed"), train=rows) as ready,
            ShardStore(folder, kind="index", settings=ready.settings) as store,
        ):
            self._write_part(ready, store, taken, claim_more(store, wanted, ready.data["train"], number))

    def _write_part(self, ready: _Ready, store: ShardStore, rows: Rows, part: int) -> None:
        IndexWriter(
            recorder=ready.recorder,
            preconditioner=ready.preconditioner,
            projection=ready.projection,
            store=store,
            stages=self.stages,
            seed=self.seed,
        ).write(rows, part)
        if finish(store, self._layers):
            self._leave_out_unreached(store)
        self._record("index", ready.settings)
        if part == 0:  # last: the index is whole, whatever comes of this
            self._measure(ready, StoredIndex.of(store), rows)
            finish(store, self._layers)

    def _measure(self, ready: _Ready, stored: StoredIndex, rows: Rows) -> None:
        """Keep in an index how near its scores come to exact ones, on rows drawn from those that were indexed.

        Where they cannot be asked about as queries are, a line on standard error says why, and nothing is kept.
        """
        drawn = drawn_for_fidelity(len(rows), self.seed)
        if stored.fidelity is not None or drawn is None or len(stored.deleted):
            return
        asked, places = drawn
        against = partial(self._found_and_exact, ready, stored, rows, places)
        try:
            found, exact = map(torch.cat, zip(*in_turns(asked, ready.settings["layers"], 1, against), strict=True))
        except Exception as error:  # noqa: BLE001  (of a row that is no query a task's measurement may raise anything)
            told = " ".join(f"{type(error).__name__}: {error}".split())
            sys.stderr.write(f"The index is whole; how near it comes to exact scores is not known, as its rows cannot be queries: {told}\n")
            return
        stored.keep_fidelity(fidelity(found, exact))

    def _found_and_exact(
        self, ready: _Ready, stored: StoredIndex, rows: Rows, places: list[int], asked: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return scores `[query, row]` by the index and exact ones, both of rows that were indexed."""
        queries, against = (replace(rows, indices=own) for own in (asked, places))
        held = self._hold(ready, queries)
        found = torch.cat([scores for _, scores in stored.blocks(ready.projection, held)])[places].T
        del held
        with temporary_store("scores", {}) as store:
            pairwise = Pairwise(
                recorder=ready.recorder, preconditioner=ready.preconditioner, request=Request(), store=store, stages=self.stages
            )
            return found, _exact(pairwise, queries, against)

    def _hold(self, ready: _Ready, rows: Rows) -> Held:
        """Return queries in the form in which an index's rows meet them."""
        with self.stages.stage("Query gradients"):
            held, _ = finished(
                ready.recorder,
                rows,
                partial(_held, ready, rows),
                lambda result: result[1],
                lambda: raise_not_finite_anywhere(ready.recorder, rows, measurement_of(self.task), "Query gradients"),
            )
        return held

    def index_queries(self, queries: Any, query_rows: Sequence[int] | None, settings: Mapping[str, Any]) -> tuple[Projection, Held]:
        """Return the projection of an index, and the queries as it holds them.

        Raises:
            MismatchError: the index is of another model, or of factors fitted otherwise.
        """
        rows = self._rows(queries, "query", query_rows, "auto", "query_batch_size")
        spectrum, made = Spectrum.from_json(settings["spectrum"]), RowSettings(**settings["rows"])
        with self._ready(rows, settings["strategy"], spectrum, made, settings.get("indexed"), queries=queries) as ready:
            _refuse_another(settings, ready.settings)
            return ready.projection, self._hold(ready, rows)

    def index_nearest(self, folders: Sequence[Path], rows: Any, settings: Mapping[str, Any]) -> None:
        """Write an approximate index beside the rows of the index in the one folder."""
        (folder,) = folders
        projection, _ = self.index_queries(rows, [0], settings)
        assert isinstance(projection, DenseRows)
        write_nearest(StoredIndex.open(folder), projection, seed=self.seed, stages=self.stages)

    def index_exact(
        self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any], *, together: bool = False
    ) -> Tensor:
        """Return exact scores `[query, row]`, or their mean over the queries `[1, row]`; nothing is stored."""
        request = Request(aggregate="queries" if together else None)
        ask = Ask(strategy=settings["strategy"], spectrum=Spectrum.from_json(settings["spectrum"]), request=request)
        train = self._rows(rows, "training", None, "auto")
        asked = self._rows(queries, "query", query_rows, "auto", "query_batch_size")
        with self._session(train) as (recorder, seen), temporary_store("scores", seen.identity) as store:
            found = _exact(self._pairwise(recorder, self._factors(ask.strategy, seen), ask, store, train), asked, train)
        return found / len(asked) if together else found

    def index_tokens(self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any]) -> TokenScores:
        """Return the scores of rows by token on both sides; nothing is stored.

        Raises:
            MismatchError: as of `index_queries`.
        """
        train = self._rows(rows, "training", None, "auto")
        asked = self._rows(queries, "query", query_rows, "auto", "query_batch_size")
        with self._session(train, queries=queries) as (recorder, seen):
            factors = self._factors(settings["strategy"], seen)
            present = {"factors": self._fitted(factors, seen), **seen.identity}
            _refuse_another({name: value for name, value in settings.items() if name in present}, present)
            weighed = self._preconditioner(factors, Spectrum.from_json(settings["spectrum"]))
            return self._by_token(recorder, weighed, seen, asked, train)

    @contextmanager
    def _ready(
        self, rows: Rows, strategy: str, spectrum: Spectrum, made: RowSettings, indexed: Sequence[str] | None = None, **datasets: Any
    ) -> Iterator[_Ready]:
        """Look at model and data. `indexed`: layers that an index has, which of others' rows need not be those that can be taken."""
        with self._session(rows, **datasets) as (recorder, seen):
            factors = self._factors(strategy, seen)
            weighed, energies = self._curved(factors, spectrum, made)
            like = torch.zeros((), dtype=weighed.dtype, device=self.device)
            # Balanced eigenvectors are a second copy beside the factors', on the device even where those are offloaded.
            layers = recorder.taken if indexed is None else [layer for layer in recorder.layers if layer.name in indexed]
            balances = {layer.name: balance(weighed.basis(layer.name), weighed.weight(layer.name), like) for layer in layers}
            shapes = {layer.name: layer.shape for layer in layers}
            one_hot = {layer.name for layer in layers if any(site.handler.one_hot for site in layer.sites)}
            if made.projection == "factors":
                projection: Projection = best_spent(recorder, rows, make_factors(made, balances, energies, shapes))
            else:
                projection = make_dense(made, balances, energies, shapes, one_hot)
            yield _Ready(
                recorder=recorder,
                preconditioner=weighed,
                balances=balances,
                projection=projection,
                settings={
                    "strategy": strategy,
                    "spectrum": spectrum.to_json(),
                    "rows": projection.settings.to_json(),
                    "indexed": list(shapes),
                    "factors": self._fitted(factors, seen),
                    **seen.identity,
                },
                data=seen.data,
            )

    def _curved(self, factors: ShardStore | None, spectrum: Spectrum, made: RowSettings) -> tuple[Preconditioner, dict[str, Tensor | None]]:
        """Return the preconditioner, and what `pca` and `factors` go by: eigenvalue times weight of each layer, where it has any."""
        curvature = stored_curvature(factors, self._layers)
        weighed = self._weighed(curvature, spectrum)
        energies: dict[str, Tensor | None] = {}
        for name, layer in curvature.items() if made.projection in ("pca", "factors") else ():
            weights = weighed.weight(name)
            energies[name] = None if layer.eigenvalues is None or weights is None else layer.eigenvalues.to(weights) * weights
        return weighed, energies


def _exact(pairwise: Pairwise, queries: Rows, rows: Rows) -> Tensor:
    pairwise.run(queries, rows)
    return torch.cat([pairwise.store.read(name)[TOTAL] for name in block_names(rows)], dim=1)


def _refuse_another(settings: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse an index of another model or curvature than the present one, by the names of what differs."""
    found = list(differences(plain_json(settings, "settings"), plain_json(present, "settings")))
    if found:
        shown = "; ".join(f"{field}: of the index {old}, of this model {new}" for field, old, new in found[:3])
        raise MismatchError(f"the index was made with another model or curvature: {shown}. Open the one that it is of, or index again.")


def _held(ready: _Ready, rows: Rows) -> tuple[Held, bool]:
    """Return the queries as the projection holds them, and whether they are finite."""
    held, whole = ready.projection.hold(len(rows)), [True]
    budget = working_set(rows.device.type)

    def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
        own = ready.balances.get(layer.name)
        if own is None:  # the index has nothing of this layer
            return
        for chunk, values in gradient.gradients(own.queries, budget):
            if own.weights is not None:
                values *= own.weights
            whole[0] &= bool(torch.isfinite(values).all())
            ready.projection.fill(held, layer.name, first + (chunk.start or 0), values)

    for block in rows.blocks():
        objective = measurement_of(ready.recorder.task)
        run_block(ready.recorder, rows, block, objective, lambda place: partial(consume, place), lambda n: None, first=block.start)
    return held, whole[0]
