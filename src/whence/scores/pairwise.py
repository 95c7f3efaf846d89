"""Pairwise scores: all queries resident, one pass over the training rows, finished blocks on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis, Pair
from whence.capture.passes import Rows, loss_of, measurement_of, raise_not_finite, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer, sum_type
from whence.runtime.progress import Stages
from whence.scores.blocks import REACHED, missing_blocks, reached, write_blocks
from whence.scores.matrix import layer_key
from whence.scores.queries import Resident, make_resident
from whence.storage.shards import ShardStore


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """Scores `[query, train]`: bases and weights (`1 / (eigenvalue + damping)`) by layer, on the rows' device."""

    recorder: Recorder
    bases: Mapping[str, Basis]
    weights: Mapping[str, Tensor | None]
    per_layer: bool
    store: ShardStore
    stages: Stages

    def run(self, queries: Rows, train: Rows) -> None:
        """Write one shard of scores per block of training rows; blocks that are there already are not repeated."""
        if not missing_blocks(self.store, train):
            return
        with self.stages.stage("Query gradients"):
            residents = self._precondition(queries, len(train))

        def compute(block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
            return self._block(train, block, len(queries), residents, advance)

        write_blocks(self.store, train, self.stages, "Pairwise scores", compute)

    def _precondition(self, queries: Rows, train: int) -> dict[str, Resident]:
        residents: dict[str, Resident] = {}
        budget = working_set(queries.device.type)

        def consume(first: int, layer: TrackedLayer, pair: Pair) -> None:
            name = layer.name
            if name not in residents:
                basis, weights = self.bases[name], self.weights[name]
                residents[name] = make_resident(pair, basis, weights, queries=len(queries), train=train, budget=budget)
            residents[name].fill(first, pair)

        objective = measurement_of(self.recorder.task)
        with self.stages.track(len(queries), "Query gradients") as advance:
            for block in queries.blocks():
                run_block(self.recorder, queries, block, objective, lambda place: partial(consume, place), advance, first=block.start)
        for name, resident in residents.items():
            if not all(torch.isfinite(t).all() for t in vars(resident).values() if isinstance(t, Tensor)):
                for block in queries.blocks():
                    raise_not_finite(self.recorder, queries, block, objective, f"Query gradients of layer {name!r}")
        return residents

    def _block(
        self, train: Rows, block: range, queries: int, residents: Mapping[str, Resident], advance: Callable[[int], None]
    ) -> dict[str, Tensor]:
        kept = sum_type(self.recorder.model)
        layers = self.recorder.taken if self.per_layer else []
        keys = {layer.name: layer_key(number, layer.name) for number, layer in enumerate(layers)}
        empty = torch.zeros(len(block), queries, dtype=kept, device=train.device)
        outputs = {key: empty.clone() for key in ("total", *keys.values())}

        touched: set[str] = set()

        def consume(first: int, layer: TrackedLayer, pair: Pair) -> None:
            touched.add(layer.name)
            if layer.name not in residents:  # no query reached this layer
                return
            scores = residents[layer.name].scores(pair)
            outputs["total"][first : first + len(scores)] += scores
            if self.per_layer:
                outputs[keys[layer.name]][first : first + len(scores)] = scores

        objective = loss_of(self.recorder.task)
        run_block(self.recorder, train, block, objective, lambda place: partial(consume, place), advance)
        if not torch.isfinite(outputs["total"]).all():
            raise_not_finite(self.recorder, train, block, objective, "Pairwise scores")
        # [query, train], as everywhere outside.
        shard = {name: values.mT.contiguous().cpu() for name, values in outputs.items()}
        return {**shard, REACHED: reached(self.recorder.layers, touched)}
