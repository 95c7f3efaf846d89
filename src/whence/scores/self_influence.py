"""Self-influence: how strongly an example's own training changed its loss; mislabelled rows stand out.

`self_influence[t] = <grad loss_t, (H + damping)^-1 grad loss_t>`, the diagonal of the pairwise scores when the
measurement is the loss. Never rotated back: the sum of squared rotated gradients over `eigenvalue + damping`. On another
measurement it is `<grad measurement_t, (H + damping)^-1 grad loss_t>`, which may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis, LayerGradient, Pair
from whence.capture.passes import Rows, finished, loss_of, measurement_of, raise_not_finite, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.stored import Preconditioner
from whence.runtime.batches import Batch
from whence.runtime.progress import Stages
from whence.scores.block import own_products
from whence.scores.blocks import REACHED, missing_blocks, reached, write_blocks
from whence.storage.run import write_table_atomic
from whence.storage.shards import ShardStore

On = Literal["loss", "measurement"]


@dataclass(frozen=True, kw_only=True)
class SelfInfluence:
    """Self-influence of rows, one shard per block."""

    recorder: Recorder
    preconditioner: Preconditioner
    on: On
    store: ShardStore
    stages: Stages

    def run(self, train: Rows) -> None:
        """Write one shard of scores per block of rows; blocks that are there already are not repeated."""
        if missing_blocks(self.store, train):
            write_blocks(self.store, train, self.stages, "Self-influence", partial(self._block, train))

    def _block(self, train: Rows, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        return finished(
            self.recorder,
            train,
            partial(self._scores, train, block, advance),
            lambda shard: bool(torch.isfinite(shard["total"]).all()),
            lambda: raise_not_finite(self.recorder, train, block, loss_of(self.recorder.task), "Self-influence"),
        )

    def _scores(self, train: Rows, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        total = torch.zeros(len(block), dtype=self.recorder.sums, device=train.device)
        budget, touched, task = working_set(train.device.type), set[str](), self.recorder.task
        held: dict[str, LayerGradient] = {}

        def hold(layer: TrackedLayer, gradient: LayerGradient) -> None:
            held[layer.name] = replace(gradient, shared=None) if isinstance(gradient, Pair) else gradient

        def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
            touched.add(layer.name)
            basis, weights = self.preconditioner.basis(layer.name), self.preconditioner.weight(layer.name)
            if self.on == "loss":
                scores = own_products(gradient, basis, weights, budget)
            elif layer.name in held:
                scores = products(held.pop(layer.name), gradient, basis, weights, budget)
            else:
                return
            total[first : first + len(scores)] += scores

        def measure(batch: Batch) -> None:
            held.clear()
            self.recorder.run(batch, measurement_of(task), hold)

        before = measure if self.on == "measurement" else None
        run_block(self.recorder, train, block, loss_of(task), lambda place: partial(consume, place), advance, before=before)
        return {"total": total.cpu(), REACHED: reached(self.recorder.layers, touched)}


def products(one: LayerGradient, other: LayerGradient, basis: Basis, weights: Tensor | None, budget: int) -> Tensor:
    """Return `<one_t, weights * other_t>` in a basis for every example t, `[example]`."""
    sizes, parts = other.sizes, []
    chunk = max(1, budget // (2 * sizes.weights * sizes.itemsize))
    for start in range(0, sizes.examples, chunk):
        rows = slice(start, start + chunk)
        left, right = (torch.cat([part for _, part in g.take(rows).gradients(basis, budget)]) for g in (one, other))
        parts.append((left * right if weights is None else left * right * weights).sum((1, 2, 3)))
    return torch.cat(parts)


def to_parquet(path: str | Path, scores: Tensor) -> None:
    """Write self-influence as a table with the columns `example` and `self_influence`."""
    table = pa.table({"example": pa.array(range(len(scores)), pa.int64()), "self_influence": scores.double().numpy()})
    write_table_atomic(Path(path), table)
