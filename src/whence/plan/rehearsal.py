"""The real passes with the real consumers on parts of a batch, with stand-ins for what only a full run would have.

Eigenvectors are stood for by the covariances of the rehearsed rows, which have the same shapes and are equal where the
eigenvectors would be; queries by copies of a few. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis
from whence.capture.passes import Rows, loss_of, measurement_of, run_block, sampled_loss_of
from whence.capture.recorder import ObjectiveOf, Recorder
from whence.capture.state import Consumer
from whence.curvature.basis import share_equal
from whence.curvature.fit import Sums, add_covariances, add_moments
from whence.curvature.stored import Preconditioner
from whence.plan.asked import Asked
from whence.plan.measure import Cost, cost_of
from whence.plan.samples import Sample
from whence.plan.work import Seen, model_flops, watching
from whence.runtime.progress import Stages
from whence.scores.pairwise import Pairwise, Queries
from whence.scores.queries import DenseQueries, Resident
from whence.scores.queries_low_rank import LowRankQueries
from whence.scores.queries_pairs import PairQueries
from whence.scores.queries_sparse import SparseQueries
from whence.scores.self_influence import SelfInfluence
from whence.storage.shards import ShardStore

MOST_QUERIES = 64
"""Queries that training rows meet in a rehearsal; more are inferred."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a batch of some width is made of: FLOPs of the model per row, and the layers' sizes."""

    width: float
    model_flops: float
    seen: Mapping[str, Seen]


class _Nowhere:
    """A store that keeps nothing."""

    names: tuple[str, ...] = ()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Forget the tensors."""


NOWHERE = cast(ShardStore, _Nowhere())


@dataclass(kw_only=True)
class Rehearsal:
    """Costs of every pass, one after another: a later one uses what an earlier one leaves."""

    recorder: Recorder
    asked: Asked
    seed: int
    offload: bool
    device: torch.device
    dtype: torch.dtype
    bases: dict[str, Basis] = field(default_factory=dict)
    shared: int = 0

    @property
    def _budget(self) -> int:
        return working_set(self.device.type)

    def looks(self, sample: Sample, *, measurement: bool = False) -> list[Look]:
        """Return what the narrowest, the median and the widest batch are made of."""
        objective = measurement_of(self.recorder.task) if measurement else loss_of(self.recorder.task)
        found = []
        for load in sample.typical():
            rows, seen = sample.part(load, 1), dict[str, Seen]()
            self._run(rows, objective, watching(seen))
            flops = model_flops(partial(self._run, rows, objective, lambda layer, gradient: None))
            found.append(Look(width=load.width, model_flops=flops, seen=seen))
        return found

    def plain(self, sample: Sample) -> Cost:
        """Return the cost of the model alone."""
        return cost_of(sample, lambda rows: self._run(rows, loss_of(self.recorder.task), lambda layer, gradient: None))

    def covariances(self, sample: Sample) -> Cost:
        """Return the cost of the pass for covariances, and keep stand-ins for eigenvectors."""
        sums: Sums = {}
        consume = partial(add_covariances, sums, scaled=self.asked.scaled, budget=self._budget)
        found = cost_of(sample, lambda rows: self._run(rows, self._fitted(0), consume))
        self.bases = {layer.name: self._stand_in(sums, layer.name) for layer in self.recorder.taken}
        self.bases = share_equal(self.bases)
        distinct = {id(q): q.nbytes for basis in self.bases.values() for q in (basis.inputs, basis.outputs) if q is not None}
        every = sum(q.nbytes for basis in self.bases.values() for q in (basis.inputs, basis.outputs) if q is not None)
        self.shared = every - sum(distinct.values())
        return found

    def _stand_in(self, sums: Sums, name: str) -> Basis:
        sides = {side: sums.pop(f"{name}/{side}", None) for side in ("inputs", "outputs")}
        found = {side: q for side, q in sides.items() if q is not None and q.dim() == 3}
        # The norm of orthogonal matrices: numbers that are far smaller would slow a processor down.
        return Basis(**{side: q * ((q.shape[0] * q.shape[1]) ** 0.5 / q.norm().clamp(min=1e-30)) for side, q in found.items()})

    def moments(self, sample: Sample) -> Cost:
        """Return the cost of the pass for eigenvalues."""
        sums: Sums = {}
        bases = {layer.name: self._basis(layer.name) for layer in self.recorder.taken}
        consume = partial(add_moments, sums, bases=bases, budget=self._budget)
        return cost_of(sample, lambda rows: self._run(rows, self._fitted(1), consume))

    def queries(self, sample: Sample, resident_row: float) -> Cost:
        """Return the cost of preconditioning queries; `resident_row` is the bytes that one of them keeps."""
        pairwise = self._pairwise()
        return cost_of(sample, lambda rows: pairwise.prepare(rows, self._train_for(len(rows))), own=lambda rows: rows * resident_row)

    def pairwise(self, sample: Sample, queries: Sample, most: int) -> Cost:
        """Return the cost of training rows' meeting all queries; `most` is how many of them may be held."""
        pairwise = self._pairwise()
        few = min(self.asked.queries, max(1, min(8, most)))
        held = pairwise.prepare(queries.part(queries.loads[-1], few), self._train_for(few))

        def meet(rows: Rows, held: Queries) -> None:
            pairwise.block(rows, held, range(len(rows)), lambda n: None)

        if self.asked.request.sums_queries:
            return cost_of(sample, partial(meet, held=held))
        many = min(self.asked.queries, max(few, min(MOST_QUERIES, most)))
        most_of = cost_of(sample, partial(meet, held=_copies(held, few, many)))
        if many in (few, self.asked.queries):
            return most_of
        start = cost_of(sample, partial(meet, held=held), widths=False)
        return most_of.beyond(start, (self.asked.queries - many) / (many - few))

    def self_influence(self, sample: Sample) -> Cost:
        """Return the cost of rows' meeting themselves."""
        weighed, stages = self._preconditioner(), Stages(enabled=False)
        run = SelfInfluence(recorder=self.recorder, preconditioner=weighed, on=self.asked.on, store=NOWHERE, stages=stages).run
        return cost_of(sample, run)

    def _run(self, rows: Rows, objective: ObjectiveOf, consumer: Consumer) -> None:
        run_block(self.recorder, rows, range(len(rows)), objective, lambda place: consumer, lambda n: None)

    def _fitted(self, stream: int) -> ObjectiveOf:
        if self.asked.empirical:
            return loss_of(self.recorder.task)
        return sampled_loss_of(self.recorder.task, seed=self.seed, stream=stream, device=self.device)

    def _train_for(self, queries: int) -> int:
        """Return how many training rows go with some of the queries, so that what is chosen by their ratio stays the same."""
        if self.asked.request.sums_queries:
            return self.asked.train
        return max(1, round(self.asked.train * queries / self.asked.queries))

    def _basis(self, name: str) -> Basis:
        return self.bases.get(name, Basis())

    def _preconditioner(self) -> Preconditioner:
        home = torch.device("cpu") if self.offload else self.device
        names = {layer.name: layer.shape for layer in self.recorder.taken}
        ones = {name: torch.ones(shape, dtype=self.dtype, device=home) if self.asked.weighed else None for name, shape in names.items()}
        bases = {name: self._basis(name) for name in names}
        if self.offload:
            bases = share_equal({name: basis.to(home, self.dtype) for name, basis in bases.items()})
        return Preconditioner(bases=bases, weights=ones, device=self.device, dtype=self.dtype)

    def _pairwise(self) -> Pairwise:
        weighed, stages = self._preconditioner(), Stages(enabled=False)
        return Pairwise(recorder=self.recorder, preconditioner=weighed, request=self.asked.request, store=NOWHERE, stages=stages)


def _copies(held: Queries, few: int, many: int) -> Queries:
    """Return so many queries, copies of the few that are held."""
    residents = {name: _copied(resident, few, many) for name, resident in held.residents.items()}
    return Queries(residents=residents, norms=_repeated(held.norms, many))


def _copied(resident: Resident, few: int, many: int) -> Resident:
    if isinstance(resident, DenseQueries):
        return replace(resident, values=_repeated(resident.values, many))
    if isinstance(resident, LowRankQueries):
        return replace(resident, left=_repeated(resident.left, many), right=_repeated(resident.right, many))
    if isinstance(resident, PairQueries):
        return replace(resident, a=_repeated(resident.a, many), g=_repeated(resident.g, many))
    if isinstance(resident, SparseQueries) and resident.held is not None:
        held, times = resident.held, -(-many // few)
        examples = torch.cat([held.examples + copy * few for copy in range(times)])
        tokens, values = (_all(x, times) for x in (held.tokens, held.values))
        order = tokens.argsort(stable=True)
        order = order[examples[order] < many]
        return replace(resident, queries=many, held=replace(held, examples=examples[order], tokens=tokens[order], values=values[order]))
    return resident


def _all(x: Tensor, times: int) -> Tensor:
    return torch.cat([x] * times)


def _repeated(x: Tensor, count: int) -> Tensor:
    return _all(x, -(-count // len(x)))[:count].contiguous()


def flops_of(looks: Iterable[Look], sample: Sample, rows: int, per_layer: partial[float] | None) -> tuple[float, float]:
    """Return the FLOPs of a pass over `rows`: all, and the model's. `per_layer(seen)` counts ours."""
    every = list(looks)
    shares = sample.shares([look.width for look in every])
    model = sum(share * rows * look.model_flops for share, look in zip(shares, every, strict=True))
    if per_layer is None:
        return model, model
    ours = sum(share * per_layer(seen.rows(rows)) for share, look in zip(shares, every, strict=True) for seen in look.seen.values())
    return model + ours, model
