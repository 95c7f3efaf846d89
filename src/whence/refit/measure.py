"""One pass over rows that leaves outputs and projected gradients, shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from whence.capture.columns import mean_log_odds, run_columns
from whence.capture.contract import working_set
from whence.capture.pair import IDENTITY, LayerGradient
from whence.capture.passes import Rows, all_finite, finished, raise_not_finite
from whence.capture.recorder import Recorder
from whence.capture.state import Consumer
from whence.capture.tracking import TrackedLayer
from whence.errors import DataError
from whence.refit.principal import in_basis, settle, wide_name
from whence.refit.projection import Projector
from whence.refit.stored import BASIS, COUNTS, GRADIENTS, LABELS, OUTPUTS, shard_names
from whence.runtime.batches import Batch
from whence.runtime.progress import Stages
from whence.scores.blocks import REACHED, reached, write_missing
from whence.storage.shards import ShardStore

STAGE = "Output gradients"
Part = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measures rows into a store.

    Attributes:
        recorder, store, stages: what runs, where it goes, who is told.
        projector: makes rows of gradients.
        per_token: a row for each trained label; else one for each example, of their mean.
        basis: `[wide, k]`, what rows are multiplied with; None: nothing.
        principal: find the basis from these rows, so many directions; 0: none is looked for.
    """

    recorder: Recorder
    store: ShardStore
    stages: Stages
    projector: Projector
    per_token: bool
    basis: Tensor | None = None
    principal: int = 0

    def write(self, rows: Rows) -> None:
        """Write the shards that are not there yet, and finish the store."""
        names = shard_names(len(rows))
        if self.basis is not None and BASIS not in self.store.names:
            self.store.write(BASIS, {BASIS: self.basis})
        if not self.principal:
            write_missing(self.store, names, self.stages, STAGE, partial(self._shard, rows))
        else:
            if BASIS not in self.store.names:
                wide = {wide_name(name): places for name, places in names.items()}
                write_missing(self.store, wide, self.stages, STAGE, partial(self._shard, rows))
            with self.stages.stage("Principal directions"):
                settle(self.store, names, self.principal)
        touched = torch.stack([self.store.read(name)[REACHED] for name in names]).amax(0)
        unreached = [layer.name for layer, any_ in zip(self.recorder.layers, touched.tolist(), strict=True) if not any_]
        self.store.finish({"unreached": unreached})

    def _shard(self, rows: Rows, places: range, advance: Callable[[int], None]) -> Part:
        mean = mean_log_odds(self.recorder.task)
        return finished(
            self.recorder,
            rows,
            partial(self._measured, rows, places, advance),
            all_finite,
            lambda: raise_not_finite(self.recorder, rows, places, lambda batch: mean, STAGE),
        )

    def _measured(self, rows: Rows, places: range, advance: Callable[[int], None]) -> Part:
        # Examples with as many labels side by side: a batch takes as many passes as its longest example has labels.
        order = self._longest_first(rows, places) if self.per_token else list(range(len(places)))
        sorted_rows = replace(rows, indices=[rows.indices[places[i]] for i in order])
        touched, parts, done = set[str](), list[Part](), 0
        measure = self._by_label if self.per_token else self._by_example
        try:
            for batch in sorted_rows.batches(range(len(order))):
                parts.append(measure(batch, touched))
                done += len(batch.ids)
                advance(len(batch.ids))
        except BaseException:
            advance(-done)  # the shard will be begun again, if at all
            raise
        part = _in_order(parts, order)
        if self.basis is not None:
            part[GRADIENTS] = in_basis(part[GRADIENTS], self.basis)
        return {**part, REACHED: reached(self.recorder.layers, touched)}

    def _longest_first(self, rows: Rows, places: range) -> list[int]:
        counts: list[int] = []
        with torch.no_grad():
            for batch in rows.batches(places):
                counts += _counts(batch, self.recorder.task.log_odds(self.recorder.model, batch.data)[1]).tolist()
        return sorted(range(len(counts)), key=lambda i: -counts[i])

    def _by_example(self, batch: Batch, touched: set[str]) -> Part:
        """Measure the mean log-odds of each example's labels."""
        seen: list[Tensor] = []
        into = self._zeros(batch)
        objective = mean_log_odds(self.recorder.task, seen)
        outputs = self.recorder.run(batch, lambda own: objective, self._consumer(into, touched))
        _counts(batch, seen[0])
        first = seen[0].to(torch.uint8).argmax(1)
        return {OUTPUTS: outputs, GRADIENTS: into, COUNTS: torch.ones(len(into)), LABELS: first}

    def _by_label(self, batch: Batch, touched: set[str]) -> Part:
        """Measure the log-odds of each label."""
        columns: dict[int, Tensor] = {}

        def consumer_for(column: int, there: Tensor) -> Consumer:
            into = columns.setdefault(column, self._zeros(batch))
            return self._consumer(into[: 1 + int(there.nonzero().max())], touched)  # the others' gradients are zero

        odds, trained = run_columns(self.recorder, batch, consumer_for)
        counts = _counts(batch, trained)
        there = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        found = [columns.get(column, self._zeros(batch)) for column in range(there.shape[1])]
        gradients = torch.stack(found, dim=1)[there.to(odds.device)]
        return {OUTPUTS: odds[trained], GRADIENTS: gradients, COUNTS: counts, LABELS: trained.nonzero()[:, 1]}

    def _zeros(self, batch: Batch) -> Tensor:
        return torch.zeros(len(batch.ids), self.projector.dimension, dtype=self.recorder.sums, device=self.recorder.device)

    def _consumer(self, into: Tensor, touched: set[str]) -> Consumer:
        """Return who adds the first examples' gradients to `into` `[example, dimension]`."""
        # Projecting few rows at a time costs nearly as much as many.
        budget = 8 * working_set(into.device.type)

        def consume(layer: TrackedLayer, gradient: LayerGradient) -> None:
            touched.add(layer.name)
            own = gradient if len(into) == gradient.sizes.examples else gradient.take(slice(0, len(into)))
            for rows, values in own.gradients(IDENTITY, budget):
                self.projector.add(into[rows], layer.name, values)

        return consume


def _counts(batch: Batch, trained: Tensor) -> Tensor:
    """Return how many trained labels each example has, on the CPU.

    Raises:
        DataError: one has none.
    """
    counts = trained.sum(1).cpu()
    if not counts.all():
        raise DataError(f"row {batch.ids[int(counts.argmin())]} has no trained label once it is collated. Drop it, or cut its prompt.")
    return counts


def _in_order(parts: list[Part], order: list[int]) -> Part:
    """Return the rows of all batches, example after example as they were before they were put in `order`."""
    counts = torch.cat([part[COUNTS] for part in parts]).long().cpu()
    back = torch.tensor(order).argsort()
    ends = counts.cumsum(0)
    rows = torch.cat([torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in back.tolist()])
    joined = {key: torch.cat([part[key] for part in parts]).cpu()[rows] for key in (OUTPUTS, GRADIENTS, LABELS)}
    return {
        OUTPUTS: joined[OUTPUTS].float(),
        GRADIENTS: joined[GRADIENTS].float(),
        LABELS: joined[LABELS].to(torch.int32),
        COUNTS: counts[back].to(torch.int32),
    }
