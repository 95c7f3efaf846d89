"""What would make a plan fit, or be faster; each piece is checked by making the plan again with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from whence.capture.passes import BLOCK
from whence.plan.result import Advice, Plan, duration, size
from whence.plan.state import basis_numbers

if TYPE_CHECKING:
    from whence.plan.predict import Drafted

LONG_S = 600.0
"""Seconds from which on a plan is worth making faster."""
MARGIN = 0.9
"""Share of the free memory that advice may fill: a prediction is no measurement."""
RANKS = (32, 16, 8, 4, 1)


def advise(plan: Plan, draft: Drafted) -> tuple[Advice, ...]:
    """Return advice, most useful first; none for a plan that fits and is quick."""
    found = [] if plan.fits else list(_smaller(plan, draft))
    return (*found, *(_faster(plan, draft) if plan.seconds > LONG_S else ()))


def _with(plan: Plan, draft: Drafted) -> Plan:
    return replace(plan, stages=draft.stages())


def _fits(plan: Plan) -> bool:
    return plan.peak_bytes - plan.model_bytes <= MARGIN * plan.free_bytes and plan.host_bytes <= MARGIN * plan.free_host_bytes


def _smaller(plan: Plan, draft: Drafted) -> Iterator[Advice]:
    """Single changes that make it fit; else the smallest combination; else what takes the most room."""
    single = [found for options in (_batch(plan, draft), _rank(plan, draft), _parts(plan, draft)) if (found := options)]
    yield from single
    if not single:
        yield from _together(plan, draft)
    peak = max(plan.stages, key=lambda stage: stage.peak_bytes)
    if peak.state_bytes - plan.model_bytes > MARGIN * plan.free_bytes:
        yield from _state(plan, draft)


def _told(plan: Plan, changed: Drafted, what: str, options: dict[str, Any]) -> Advice:
    other = _with(plan, changed)
    need, before = (size(p.peak_bytes - p.model_bytes) for p in (other, plan))
    return Advice(text=f"{what}: {need} beside the model instead of {before}, and it fits.", options=options, fits=True)


def _halvings(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _batch(plan: Plan, draft: Drafted) -> Advice | None:
    for rows in _halvings(max(draft.asked.batch, draft.asked.query_batch)):
        changed = draft.changed(batch=min(rows, draft.asked.batch), query_batch=min(rows, draft.asked.query_batch))
        if _fits(_with(plan, changed)):
            return _told(plan, changed, f"batch_size={rows}" + _also(draft, rows), _batches(draft, rows))
    return None


def _also(draft: Drafted, rows: int) -> str:
    return f" and query_batch_size={rows}" if draft.asked.queries else ""


def _batches(draft: Drafted, rows: int) -> dict[str, Any]:
    return {"batch_size": rows} | ({"query_batch_size": rows} if draft.asked.queries else {})


def _rank(plan: Plan, draft: Drafted) -> Advice | None:
    if not _residents_matter(plan, draft):
        return None
    for rank in RANKS:
        changed = draft.changed(query_rank=rank)
        if _fits(_with(plan, changed)):
            return _told(plan, changed, f"query_rank={rank} (approximate: each layer's query gradients at that rank)", {"query_rank": rank})
    return None


def _residents_matter(plan: Plan, draft: Drafted) -> bool:
    return bool(draft.asked.queries) and draft.asked.request.query_rank is None and not draft.asked.request.sums_queries


def _parts(plan: Plan, draft: Drafted) -> Advice | None:
    """Queries in several calls: exact, at a pass over the training rows each."""
    if not _residents_matter(plan, draft):
        return None
    for count in _halvings(draft.asked.queries):
        changed = draft.changed(queries=count, query_batch=min(count, draft.asked.query_batch))
        if _fits(_with(plan, changed)):
            calls = -(-draft.asked.queries // count)
            what = f"{count} queries at a time (query_rows=range(0, {count}), ...), {calls} calls of scores and as many passes"
            return _told(plan, changed, what, {"queries at a time": count})
    return None


def _together(plan: Plan, draft: Drafted) -> Iterator[Advice]:
    """Smaller batches with a lower rank."""
    if not _residents_matter(plan, draft):
        return
    for rows in _halvings(draft.asked.batch):
        small = draft.changed(batch=rows, query_batch=min(rows, draft.asked.query_batch))
        for rank in RANKS:
            changed = small.changed(query_rank=rank)
            if _fits(_with(plan, changed)):
                options = _batches(draft, rows) | {"query_rank": rank}
                yield _told(plan, changed, f"query_rank={rank}, batch_size={rows}" + _also(draft, rows) + " together", options)
                return


def _state(plan: Plan, draft: Drafted) -> Iterator[Advice]:
    """What the curvature itself takes, which no batch size changes."""
    state = draft.state
    if not state.on_cpu and not state.offload:
        changed = replace(draft, state=replace(state, offload=True))
        fits = _fits(_with(plan, changed))
        yield Advice(
            text=f"Attributor(..., offload=True) keeps {size(state.bases)} of eigenvectors in the CPU's memory.", options={}, fits=fits
        )
    layers = sorted(state.layers, key=lambda layer: -basis_numbers(layer, draft.asked) - layer.parameters)
    shares = ", ".join(f"{layer.name} {size(8 * (basis_numbers(layer, draft.asked) + layer.parameters))}" for layer in layers[:3])
    yield Advice(text=f"layers=... without the largest; in float64 sums take: {shares}.", options={}, fits=False)
    if draft.asked.rotated:
        changed = draft.changed(strategy="diagonal")
        if _fits(_with(plan, changed)):
            yield _told(plan, changed, "strategy='diagonal', which keeps no eigenvectors", {"strategy": "diagonal"})


def _faster(plan: Plan, draft: Drafted) -> Iterator[Advice]:
    """Fewer rows for the fit, one pass less, a lower rank."""
    fitting = sum(stage.seconds for stage in plan.stages if stage.call == "fit" and stage.passes)
    fewer = max(2 * BLOCK, draft.asked.fitted // 4)
    if fitting > plan.seconds / 4 and fewer < draft.asked.fitted:
        saved = fitting * (1 - fewer / draft.asked.fitted)
        text = f"max_examples={fewer}: the fit's passes over the data take {duration(fitting - saved)} instead of {duration(fitting)}."
        yield Advice(text=text, options={"max_examples": fewer}, fits=plan.fits)
    second = next((stage.seconds for stage in plan.stages if stage.name == "Fit eigenvalues"), 0.0)
    if draft.asked.strategy == "ekfac" and second > plan.seconds / 4:
        text = f"strategy='kfac': one pass less, {duration(second)} (its scores are less exact)."
        yield Advice(text=text, options={"strategy": "kfac"}, fits=plan.fits)
    pairs = next((stage for stage in plan.stages if stage.name == "Pairwise scores"), None)
    if pairs is not None and pairs.seconds > plan.seconds / 4 and pairs.flops > 3 * pairs.model_flops and _residents_matter(plan, draft):
        for rank in RANKS[:3]:
            other = _with(plan, draft.changed(query_rank=rank))
            flops = next(stage.flops for stage in other.stages if stage.name == "Pairwise scores")
            if flops < 0.7 * pairs.flops:
                text = f"query_rank={rank}: the scores' pass takes {flops / pairs.flops:.0%} of the operations (approximate)."
                yield Advice(text=text, options={"query_rank": rank}, fits=plan.fits)
                return
