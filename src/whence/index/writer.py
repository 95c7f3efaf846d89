"""One pass over training rows that leaves an index: shards of rows, found by example id, and safe against kills at any point.

A part is one data set that was indexed or appended: a shard `part-0000/about` with the example ids `[row]` and the data's fingerprint,
shards `part-0000/rows-000000000` of whole blocks, named by the place of their first row, and last `part-0000/done` with the number of
rows: a part without it does not exist for readers. Shards of rows hold what the projection keeps, `norm` `[row]`, each row's
`g^T (H + d)^-1 g` of its whole gradient, its self-influence, and `reached` `[layer]`, whether any row gave the layer a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import LayerGradient
from whence.capture.passes import BLOCK, Rows, all_finite, finished, loss_of, raise_not_finite, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.stored import Preconditioner
from whence.index.coarse import write_coarse
from whence.index.names import COUNT, NORM, done
from whence.index.projection import Projection, RowBatch
from whence.runtime.progress import Stages
from whence.scores.block import own_products
from whence.scores.blocks import REACHED, reached, write_missing
from whence.storage.shards import ShardStore

SHARD_BYTES = 2**26
"""About how large a shard gets; a kill loses at most the rows of one."""


def shard_ranges(rows: int, row_bytes: int) -> list[range]:
    """Return the places of the rows of each shard: whole blocks, as many as come to `SHARD_BYTES`."""
    step = BLOCK * max(1, SHARD_BYTES // (BLOCK * max(1, row_bytes)))
    return [range(first, min(first + step, rows)) for first in range(0, rows, step)]


@dataclass(frozen=True, kw_only=True)
class IndexWriter:
    """Writes the rows of one part; `seed` draws landmarks (`coarse.py`)."""

    recorder: Recorder
    preconditioner: Preconditioner
    projection: Projection
    store: ShardStore
    stages: Stages
    seed: int

    def write(self, rows: Rows, part: int) -> None:
        """Write the shards of a part that are not there yet, and that it is whole."""
        ranges = shard_ranges(len(rows), self.projection.row_bytes)
        shards = {f"part-{part:04d}/rows-{places.start:09d}": places for places in ranges}
        write_missing(self.store, shards, self.stages, "Index rows", partial(self._shard, rows))
        write_coarse(self.store, self.projection, part, self.seed, self.stages)
        if done(part) not in self.store.names:
            self.store.write(done(part), {COUNT: torch.tensor(len(rows))})

    def _shard(self, rows: Rows, places: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        blocks = [range(first, min(first + BLOCK, places.stop)) for first in range(places.start, places.stop, BLOCK)]
        parts = [self._block(rows, block, advance) for block in blocks]
        norms, touched = torch.cat([part.pop(NORM) for part in parts]), torch.stack([part.pop(REACHED) for part in parts]).amax(0)
        return {**self.projection.join(parts, list(map(len, blocks))), NORM: norms, REACHED: touched}

    def _block(self, rows: Rows, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        objective = loss_of(self.recorder.task)
        return finished(
            self.recorder,
            rows,
            partial(self._rows, rows, block, advance),
            all_finite,
            lambda: raise_not_finite(self.recorder, rows, block, objective, "Index rows"),
        )

    def _rows(self, rows: Rows, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        batches = Batches(self.projection)
        norms = torch.zeros(len(block), dtype=self.recorder.sums, device=rows.device)
        budget, touched = working_set(rows.device.type), set[str]()

        def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
            name = layer.name
            touched.add(name)
            products = own_products(gradient, self.preconditioner.basis(name), self.preconditioner.weight(name), budget)
            norms[first : first + len(products)] += products
            batches.open.add(name, gradient)

        run_block(
            self.recorder,
            rows,
            block,
            loss_of(self.recorder.task),
            lambda place: partial(consume, place),
            advance,
            before=lambda batch: batches.begin(len(batch.ids)),
        )
        return {**batches.joined(), NORM: norms.float().cpu(), REACHED: reached(self.recorder.layers, touched)}


class Batches:
    """The rows of several batches, each closed when the next one begins."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._batches: list[tuple[RowBatch, int]] = []
        self._closed: list[Mapping[str, Tensor]] = []

    @property
    def open(self) -> RowBatch:
        """The batch that is running."""
        return self._batches[-1][0]

    def begin(self, examples: int) -> None:
        """Close the last batch and begin one."""
        self._close()
        self._batches.append((self.projection.batch(examples), examples))

    def joined(self) -> dict[str, Tensor]:
        """Return all rows."""
        self._close()
        return self.projection.join(self._closed, [examples for _, examples in self._batches])

    def _close(self) -> None:
        if len(self._closed) < len(self._batches):
            self._closed.append(self.open.close())
