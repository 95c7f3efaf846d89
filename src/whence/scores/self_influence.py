"""Self-influence: how strongly an example's own training changed its loss; mislabelled rows stand out.

`self_influence[t] = <grad loss_t, (H + damping)^-1 grad loss_t>`, the diagonal of the pairwise scores when the
measurement is the loss. Never rotated back: the sum of squared rotated gradients over `eigenvalue + damping`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis, Pair
from whence.capture.passes import Rows, loss_of, raise_not_finite, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer, sum_type
from whence.runtime.progress import Stages
from whence.scores.blocks import REACHED, missing_blocks, reached, write_blocks
from whence.storage.run import write_table_atomic
from whence.storage.shards import ShardStore


@dataclass(frozen=True, kw_only=True)
class SelfInfluence:
    """Self-influence of rows, one shard per block."""

    recorder: Recorder
    bases: Mapping[str, Basis]
    weights: Mapping[str, Tensor | None]
    store: ShardStore
    stages: Stages

    def run(self, train: Rows) -> None:
        """Write one shard of scores per block of rows; blocks that are there already are not repeated."""
        if missing_blocks(self.store, train):
            write_blocks(self.store, train, self.stages, "Self-influence", partial(self._block, train))

    def _block(self, train: Rows, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        kept = sum_type(self.recorder.model)
        total = torch.zeros(len(block), dtype=kept, device=train.device)
        budget = working_set(train.device.type)

        touched: set[str] = set()

        def consume(first: int, layer: TrackedLayer, pair: Pair) -> None:
            touched.add(layer.name)
            weights = self.weights[layer.name]
            if weights is None:
                scores = pair.norms(budget).sum(1)
            else:
                scores = pair.weighted_squares(self.bases[layer.name], weights, budget)
            total[first : first + len(scores)] += scores

        objective = loss_of(self.recorder.task)
        run_block(self.recorder, train, block, objective, lambda place: partial(consume, place), advance)
        if not torch.isfinite(total).all():
            raise_not_finite(self.recorder, train, block, objective, "Self-influence")
        return {"total": total.cpu(), REACHED: reached(self.recorder.layers, touched)}


def to_parquet(path: str | Path, scores: Tensor) -> None:
    """Write self-influence as a table with the columns `example` and `self_influence`."""
    table = pa.table({"example": pa.array(range(len(scores)), pa.int64()), "self_influence": scores.double().numpy()})
    write_table_atomic(Path(path), table)
