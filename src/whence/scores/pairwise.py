"""Pairwise scores: all queries resident, one pass over the training rows, finished blocks on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import IDENTITY, Basis, LayerGradient
from whence.capture.passes import (
    Rows,
    all_finite,
    finished,
    loss_of,
    measurement_of,
    raise_not_finite,
    raise_not_finite_anywhere,
    run_block,
)
from whence.capture.recorder import ObjectiveOf, Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.stored import Preconditioner
from whence.runtime.progress import Stages
from whence.scores.block import Block, own_products
from whence.scores.blocks import REACHED, missing_blocks, reached, write_blocks
from whence.scores.queries import DenseQueries, Holding, Resident
from whence.scores.request import Request
from whence.scores.resident import make_resident
from whence.storage.shards import ShardStore
from whence.tasks import Task

Residents = dict[str, Resident]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the scores: what its gradients are of, and their name in the table of stages."""

    objective: Callable[[Task], ObjectiveOf]
    stage: str


QUERY_SIDE = Side(objective=measurement_of, stage="Query gradients")
TRAIN_SIDE = Side(objective=loss_of, stage="Training gradients")


@dataclass(frozen=True, kw_only=True)
class Queries:
    """All queries: each layer's residents, and the squared norm of each query's gradient under the curvature `[query]`."""

    residents: Mapping[str, Resident]
    norms: Tensor


class Solver(Protocol):
    """Something better than the fitted curvature's inverse."""

    def solve(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return `(H + d)^-1 g` for the queries' gradients `[query, group, out, in]` of each layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pairwise:
    """Scores `[query, train]`. A `solver` takes the queries' plain gradients and gives what the curvature would have made of them.

    The curvature is symmetric, so either side can be held while the other passes: `exchanged` gives `[train, query]`, and with
    `per_token` the parts of the queries' tokens.
    """

    recorder: Recorder
    preconditioner: Preconditioner
    request: Request
    store: ShardStore
    stages: Stages
    solver: Solver | None = None
    plain: bool = False
    held: Side = QUERY_SIDE
    passed: Side = TRAIN_SIDE

    def exchanged(self) -> Pairwise:
        """Return the same with training rows held, and queries passed by them."""
        return replace(self, held=self.passed, passed=self.held)

    def run(self, queries: Rows, train: Rows) -> None:
        """Write one shard of scores per block of training rows; blocks that are there already are not repeated."""
        if not missing_blocks(self.store, train):
            return
        if self.solver is not None:
            with self.stages.stage(self.held.stage):
                gradients = self.plain_gradients(queries, len(train))
            held = self._dense(self.solver.solve(gradients))
        else:
            with self.stages.stage(self.held.stage):
                held = self.prepare(queries, len(train))
        self.meet(held, train)

    def meet(self, held: Queries, train: Rows) -> None:
        """Score training rows for queries that are held already."""
        self.recorder.with_tokens = self.request.per_token
        write_blocks(self.store, train, self.stages, "Pairwise scores", partial(self.block, train, held))

    def plain_gradients(self, queries: Rows, train: int) -> dict[str, Tensor]:
        """Return the measurement's gradients `[query, group, out, in]` of each layer that they reach."""
        held = replace(self, plain=True).prepare(queries, train)
        return {name: resident.values for name, resident in held.residents.items() if isinstance(resident, DenseQueries)}

    def weighed(self, gradients: Mapping[str, Tensor]) -> Queries:
        """Hold queries whose plain gradients are given, after preconditioning them."""
        return self._dense({name: self.preconditioner.apply(name, values) for name, values in gradients.items()})

    def _dense(self, values: Mapping[str, Tensor]) -> Queries:
        budget, count = working_set(self.recorder.device.type), len(next(iter(values.values())))
        residents: Residents = {}
        for name, gradient in values.items():
            residents[name] = DenseQueries(values=gradient.contiguous(), basis=IDENTITY, weights=None, rotated=False, budget=budget)
        return Queries(residents=residents, norms=torch.zeros(count, dtype=self.recorder.sums, device=self.recorder.device))

    def prepare(self, queries: Rows, train: int) -> Queries:
        """Return the preconditioned queries."""
        return finished(
            self.recorder,
            queries,
            partial(self._prepare, queries, train),
            lambda held: all(resident.finite() for resident in held.residents.values()),
            lambda: raise_not_finite_anywhere(self.recorder, queries, self.held.objective(self.recorder.task), self.held.stage),
        )

    def _prepare(self, queries: Rows, train: int) -> Queries:
        request, device = self.request, queries.device
        holding = Holding(
            queries=len(queries),
            train=train,
            budget=working_set(device.type),
            rank=request.query_rank,
            summed=request.sums_queries,
            dense=self.plain,
        )
        residents: Residents = {}
        norms = torch.zeros(len(queries), dtype=self.recorder.sums, device=device)

        def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
            name = layer.name
            basis, weights = self._curvature(name)
            if request.normalize == "cosine":
                products = own_products(gradient, basis, weights, holding.budget)
                norms[first : first + len(products)] += products
            if request.sums_queries:
                first, gradient = 0, gradient.merged()
            if name not in residents:
                residents[name] = make_resident(gradient, basis, weights, holding)
            residents[name].fill(first, gradient)

        with self.stages.track(len(queries), self.held.stage) as advance:
            for block in queries.blocks():
                objective = self.held.objective(self.recorder.task)
                run_block(self.recorder, queries, block, objective, lambda place: partial(consume, place), advance, first=block.start)
        for resident in residents.values():
            resident.ready()
        return Queries(residents=residents, norms=norms)

    def _curvature(self, name: str) -> tuple[Basis, Tensor | None]:
        if self.plain:
            return IDENTITY, None
        return self.preconditioner.basis(name), self.preconditioner.weight(name)

    def block(self, train: Rows, held: Queries, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the tensors of one block's shard."""
        objective = self.passed.objective(self.recorder.task)
        return finished(
            self.recorder,
            train,
            partial(self._block, train, held, block, advance),
            all_finite,
            lambda: raise_not_finite(self.recorder, train, block, objective, "Pairwise scores"),
        )

    def _block(self, train: Rows, held: Queries, block: range, advance: Callable[[int], None]) -> dict[str, Tensor]:
        request, budget, touched = self.request, working_set(train.device.type), set[str]()
        layers = [layer.name for layer in self.recorder.taken] if request.per_layer else []
        kept = 1 if request.sums_queries else len(held.norms)
        sums = Block(rows=len(block), queries=kept, request=request, layers=layers, device=train.device, dtype=self.recorder.sums)

        def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
            touched.add(layer.name)
            name = layer.name
            if request.normalize is not None:
                basis, weights = self.preconditioner.basis(name), self.preconditioner.weight(name)
                sums.add_norms(first, own_products(gradient, basis, weights, budget))
            if name in held.residents:  # else no query reached this layer
                sums.add(first, name, held.residents[name], gradient)

        objective = self.passed.objective(self.recorder.task)
        run_block(self.recorder, train, block, objective, lambda place: partial(consume, place), advance)
        shard = sums.shard(held.norms)
        return {**shard, REACHED: reached(self.recorder.layers, touched)}
