"""Put a plan together: what is asked, a rehearsal, and arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from whence.capture.assemble import token_axis
from whence.capture.passes import BLOCK, Rows, draw_rows
from whence.capture.recorder import Recorder
from whence.capture.tracking import sum_type
from whence.curvature.settings import ResponseLike
from whence.curvature.strategies import StrategyName, get_strategy
from whence.errors import ConfigError
from whence.plan import advice, work
from whence.plan.asked import Asked
from whence.plan.measure import Cost, Rates, rates
from whence.plan.rehearsal import Look, Rehearsal, flops_of
from whence.plan.result import Call, Plan, PlannedStage
from whence.plan.samples import Sample, sample
from whence.plan.state import Bytes, State, model_bytes
from whence.runtime.batches import check_dataset, iterate_batches
from whence.runtime.memory import free_bytes
from whence.scores.request import Aggregate, Normalize, Request
from whence.scores.self_influence import On
from whence.workbench import Size, Workbench

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """All that is known of what is asked: from it the stages of this and of other batch sizes and ranks can be told."""

    asked: Asked
    state: State
    samples: dict[Call, Sample]
    looks: dict[Call, list[Look]]
    costs: dict[str, Cost]
    rates: Rates
    tokens: int = 0

    def stages(self) -> tuple[PlannedStage, ...]:
        """Return the stages in the order they run."""
        found = [*self._fit_stages(), *self._score_stages()]
        flops = self._flops("fit", self.asked.train, partial(work.own_products, asked=self.asked))
        times = 1
        if self.asked.on == "measurement":
            # Two passes of the model, and two gradients instead of one square.
            times, sides = 2, self.asked.sides
            ours = self._flops("fit", self.asked.train, lambda seen: work.gradients(seen, sides(seen.layer)))
            flops = (2 * ours[0], 2 * ours[1])
        transient = self._transient("Self-influence", self.asked.batch)
        peak, rest = self.state.self_influence(transient), self.state.self_influence(0)
        seconds = self._seconds("Self-influence")
        return (*found, self._stage("self_influence", "Self-influence", times, self.asked.train, flops, seconds, peak, rest))

    def _fit_stages(self) -> list[PlannedStage]:
        asked, state, stages = self.asked, self.state, []
        blocks = -(-asked.fitted // BLOCK)
        if asked.rotated:
            name = "Fit covariances"
            seconds = self._seconds(name) + blocks * state.covariances * self.rates.add
            flops = self._flops("fit", asked.fitted, partial(work.covariances, asked=asked))
            peak = state.fit_covariances(self._transient(name, asked.batch), seconds)
            stages.append(self._stage("fit", name, 1, asked.fitted, flops, seconds, peak, state.fit_covariances(0, 0)))
            sizes = dict(work.decompositions(state.layers, asked))
            counted = sum(count * work.eigen(size) for size, count in sizes.items())
            stored = state.bases + (state.itemsize * state.parameters if asked.scaled else 0)
            seconds = self.rates.eigen + stored * self.rates.store
            peak = state.decompositions()
            stages.append(self._stage("fit", "Eigendecompositions", 0, 0, (counted, 0.0), seconds, peak, peak))
        if asked.moments:
            name = "Fit eigenvalues"
            stored = state.itemsize * state.parameters
            seconds = self._seconds(name) + blocks * state.parameters * self.rates.add + stored * self.rates.store
            flops = self._flops("fit", asked.fitted, lambda seen: work.squares(seen, asked.sides(seen.layer)))
            peak = state.fit_eigenvalues(self._transient(name, asked.batch), seconds)
            stages.append(self._stage("fit", name, 1, asked.fitted, flops, seconds, peak, state.fit_eigenvalues(0, 0)))
        return stages

    def _score_stages(self) -> list[PlannedStage]:
        asked, state = self.asked, self.state
        if not asked.queries:
            return []
        name = "Query gradients"
        flops = self._flops("scores", asked.queries, partial(work.query, asked=asked))
        peak, rest = state.query_gradients(self._transient(name, asked.query_batch)), state.query_gradients(0)
        first = self._stage("scores", name, 1, asked.queries, flops, self._seconds(name), peak, rest)
        name, held = "Pairwise scores", state.held
        flops = self._flops(
            "fit", asked.train, lambda seen: work.pairwise(seen, held[seen.layer.name], asked) if seen.layer.name in held else 0.0
        )
        peak, rest = state.pairwise(self._transient(name, asked.batch), self.tokens), state.pairwise(0, self.tokens)
        seconds = self._seconds(name) + state.score_bytes(asked.train, self.tokens) * self.rates.store
        return [first, self._stage("scores", name, 1, asked.train, flops, seconds, peak, rest)]

    def _flops(self, call: Call, rows: int, ours: Any) -> tuple[float, float]:
        return flops_of(self.looks[call], self.samples[call], rows, ours)

    def _seconds(self, name: str) -> float:
        call: Call = "fit" if name.startswith("Fit") else "scores" if name == "Query gradients" else "self_influence"
        return self._cost(name).seconds(self.samples[call])

    def _transient(self, name: str, batch: int) -> float:
        return self._cost(name).transient(batch)

    def _cost(self, name: str) -> Cost:
        # A stage that only another strategy has was not rehearsed; self-influence contracts much as the eigenvalues' pass does.
        return self.costs.get(name, self.costs["Self-influence"])

    def _stage(
        self, call: Call, name: str, passes: int, rows: int, flops: tuple[float, float], seconds: float, peak: Bytes, rest: Bytes
    ) -> PlannedStage:
        return PlannedStage(
            call=call,
            name=name,
            passes=passes,
            rows=rows,
            flops=flops[0],
            model_flops=flops[1],
            seconds=seconds,
            peak_bytes=round(peak.device),
            host_bytes=round(peak.host),
            state_bytes=round(rest.device),
        )

    def disk(self) -> dict[str, int]:
        """Return what is written, by kind."""
        found = {"factors": self.state.factors} if self.asked.weighed else {}
        if self.asked.queries:
            # A request that sums rows writes one row for every block of rows.
            rows = -(-self.asked.train // BLOCK) if self.asked.request.sums_rows else self.asked.train
            found["scores"] = self.state.score_bytes(rows, self.tokens)
        return found | {"self_influence": self.state.itemsize * self.asked.train}

    def changed(self, **options: Any) -> Drafted:
        """Return the same for other options: batch sizes, `query_rank`, queries at a time, `max_examples`, a strategy that is cheaper."""
        rank = options.pop("query_rank", self.asked.request.query_rank)
        asked = replace(self.asked, request=replace(self.asked.request, query_rank=rank), **options)
        return replace(self, asked=asked, state=replace(self.state, asked=asked))


def make_plan(
    workbench: Workbench,
    train: Any,
    queries: Any = None,
    *,
    strategy: StrategyName = "ekfac",
    empirical: bool = False,
    max_examples: int | None = None,
    response: ResponseLike = "inverse",
    query_rank: int | None = None,
    normalize: Normalize | None = None,
    per_layer: bool = False,
    per_token: bool = False,
    aggregate: Aggregate | None = None,
    on: On = "loss",
    query_batch_size: Size = "auto",
    batch_size: Size = "auto",
    free: int | None = None,
) -> Plan:
    """Predict what `fit`, `scores` and `self_influence` will cost: work, time, memory, disk.

    Every pass is rehearsed with a few rows of the data, some seconds in all; nothing is written.

    Args:
        workbench: the attributor.
        train, queries: as of `scores`; without queries no scores are planned.
        strategy, empirical, max_examples: as of `fit`.
        response, query_rank, normalize, per_layer, per_token, aggregate, query_batch_size, batch_size: as of `scores`.
        on: as of `self_influence`.
        free: bytes that may be taken beside the model; by default what is free on the device now.

    Raises:
        ConfigError, DataError, LayerError, NumericalError: as `fit` and `scores` would.
    """
    start = time.perf_counter()
    get_strategy(strategy)
    if on not in ("loss", "measurement"):
        raise ConfigError(f"on={on!r} is not known; choose 'loss' or 'measurement'.")
    request = Request(per_layer=per_layer, per_token=per_token, aggregate=aggregate, normalize=normalize, query_rank=query_rank)
    workbench._spectrum(strategy, "auto", response)
    indices = draw_rows(check_dataset(train, "training"), max_examples, seed=workbench.seed)
    rows: dict[Call, Rows] = {
        "fit": workbench._rows(train, "training", indices, batch_size),
        "self_influence": workbench._rows(train, "training", None, batch_size),
    }
    if queries is not None:
        rows["scores"] = workbench._rows(queries, "query", None, query_batch_size, "query_batch_size")
    asked = _asked(rows, strategy, empirical, request, on)
    return _planned(workbench, asked, rows, free, start)


def _asked(rows: dict[Call, Rows], strategy: StrategyName, empirical: bool, request: Request, on: On) -> Asked:
    train, queries = rows["self_influence"], rows.get("scores")
    return Asked(
        strategy=strategy,
        empirical=empirical,
        fitted=len(rows["fit"]),
        train=len(train),
        queries=0 if queries is None else len(queries),
        batch=min(train.batch_size.rows, len(train)),
        query_batch=0 if queries is None else min(queries.batch_size.rows, len(queries)),
        request=request,
        on=on,
    )


def _planned(workbench: Workbench, asked: Asked, rows: dict[Call, Rows], free: int | None, start: float) -> Plan:
    train, queries = rows["self_influence"], rows.get("scores")
    available = free_bytes(workbench.device)
    datasets = {"train": train.dataset} | ({} if queries is None else {"queries": queries.dataset})
    with workbench._session(train, **datasets) as (recorder, _):
        recorder.with_tokens = asked.request.per_token
        draft = _rehearse(workbench, recorder, asked, rows, available)
    plan = Plan(
        strategy=asked.strategy,
        device=str(workbench.device),
        stages=draft.stages(),
        model_bytes=draft.state.model,
        free_bytes=available if free is None else free,
        free_host_bytes=free_bytes(CPU),
        disk_bytes=draft.disk(),
        calibration_s=time.perf_counter() - start,
    )
    return replace(plan, advice=advice.advise(plan, draft))


def _rehearse(workbench: Workbench, recorder: Recorder, asked: Asked, rows: dict[Call, Rows], available: int) -> Drafted:
    device, dtype = workbench.device, sum_type(workbench.model)
    rehearsal = Rehearsal(
        recorder=recorder, asked=asked, seed=workbench.seed, offload=workbench.options.offload, device=device, dtype=dtype
    )
    samples = {call: sample(of) for call, of in rows.items()}
    looks: dict[Call, list[Look]] = {"fit": rehearsal.looks(samples["fit"])}
    if asked.queries:
        looks["scores"] = rehearsal.looks(samples["scores"], measurement=True)
    state = State(
        layers=recorder.taken,
        asked=asked,
        itemsize=dtype.itemsize,
        model=model_bytes(workbench.model),
        on_cpu=device.type == "cpu",
        offload=workbench.options.offload,
        held=looks["scores"][-1].seen if asked.queries else {},
    )
    measured = rates(work.decompositions(state.layers, asked), device)
    draft = Drafted(asked=asked, state=state, samples=samples, looks=looks, costs={}, rates=measured)
    if asked.request.per_token:
        draft = replace(draft, tokens=_tokens(recorder, samples["self_influence"]))
    costs = _inferred(rehearsal, draft) if _too_large(draft, available) else _measured(rehearsal, draft, available)
    return replace(draft, costs=costs, state=replace(state, shared=rehearsal.shared))


def _too_large(draft: Drafted, available: int) -> bool:
    """Whether not even a rehearsal would fit: sums, eigenvectors and weights beside the model."""
    state = draft.state
    sums = state.itemsize * (state.covariances if draft.asked.rotated else 0)
    return sums + state.bases + 2 * state.itemsize * state.parameters > 0.8 * available


def _measured(rehearsal: Rehearsal, draft: Drafted, available: int) -> dict[str, Cost]:
    asked, samples, costs = draft.asked, draft.samples, dict[str, Cost]()
    if asked.rotated:
        costs["Fit covariances"] = rehearsal.covariances(samples["fit"])
    if asked.moments:
        costs["Fit eigenvalues"] = rehearsal.moments(samples["fit"])
    if asked.queries:
        own = draft.state.residents / asked.queries
        costs["Query gradients"] = rehearsal.queries(samples["scores"], own)
        most = max(1, int(available / 8 / max(1.0, own)))
        costs["Pairwise scores"] = rehearsal.pairwise(samples["self_influence"], samples["scores"], most)
    costs["Self-influence"] = rehearsal.self_influence(samples["self_influence"])
    return costs


def _inferred(rehearsal: Rehearsal, draft: Drafted) -> dict[str, Cost]:
    """Return costs where factors would not fit: the model's own pass, slower by the share of our work."""
    plain = rehearsal.plain(draft.samples["fit"])
    names = ("Fit covariances", "Fit eigenvalues", "Query gradients", "Pairwise scores", "Self-influence")
    costs = dict.fromkeys(names, plain)
    stages = replace(draft, costs=costs).stages()
    return costs | {stage.name: plain.scaled(stage.flops / stage.model_flops) for stage in stages if stage.model_flops}


def _tokens(recorder: Recorder, rows: Sample) -> int:
    """Return the length of the token axis of the widest batch."""
    part = rows.part(rows.loads[-1], 1)
    batch = next(iterate_batches(part.dataset, part.indices, batch_size=1, collate=part.collate, device=part.device))
    axis = token_axis(recorder.task.padding_mask(batch.data), batch.data)
    return 0 if axis is None else axis[0]
