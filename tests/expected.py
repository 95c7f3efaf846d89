"""What should come out of a case by the oracle, and what does come out of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import oracle
from cases import Case

BATCH, QUERY_BATCH, SEED = 5, 3, 11
KINDS = ("scores", "per_layer", "self_influence")


@dataclass
class Result:
    """What is compared: `[query, train]`, the same by layer, and `[train]`."""

    scores: Tensor
    per_layer: dict[str, Tensor]
    self_influence: Tensor


# ---------------------------------------------------------------------------------------------- what should come out


@dataclass
class Gradients:
    """The oracle's view of one case."""

    train: list[oracle.Example]
    queries: list[oracle.Example]


@cache
def gradients(case: Case) -> Gradients:
    """Run every row of the case on its own."""
    model, task, (train, queries) = case.model(), case.task(), case.data()
    collect = partial(oracle.collect, model, case.tracked, task, collate=case.collate)
    return Gradients(
        train=collect(train, objective=lambda m, batch, _: task.loss(m, batch)),
        queries=collect(queries, objective=lambda m, batch, _: task.measurement(m, batch)),
    )


@cache
def sampled(case: Case, stream: int) -> list[oracle.Example]:
    """Run every training row with labels drawn from the model; row i's noise is keyed by i."""
    from whence.runtime.noise import KeyedNoise

    model, task = case.model(), case.task()

    def objective(m: Any, batch: Any, index: int) -> Tensor:
        noise = KeyedNoise(seed=SEED, stream=stream, ids=torch.tensor([index]), device=torch.device("cpu"))
        return task.sampled_loss(m, batch, noise)

    return oracle.collect(model, case.tracked, task, case.data()[0], collate=case.collate, objective=objective)


def expected(case: Case, strategy: str, damping: Any = "auto", *, empirical: bool = True, widest: int = oracle.WIDEST) -> Result:
    """Score with dense matrices. The covariances come from noise stream 0, the eigenvalues of diagonal and ekfac from stream 1."""
    seen = gradients(case)
    first, second = (seen.train, seen.train) if empirical else (sampled(case, 0), sampled(case, 1))
    curvatures = oracle.fit(case.tracked, strategy, first, second, widest=widest)
    dampings = oracle.damping_of(curvatures, strategy, damping)
    per_layer = oracle.pairwise(seen.queries, seen.train, curvatures, dampings)
    own = oracle.pairwise(seen.train, seen.train, curvatures, dampings)
    return Result(sum(per_layer.values()), per_layer, sum(own.values()).diagonal())


# ---------------------------------------------------------------------------------------------- what does come out


def run(case: Case, strategy: str, damping: Any = "auto", *, empirical: bool = True) -> Result:
    """Fit and score with the engine, ragged last batches on both sides."""
    train, queries = case.data()
    attributor = case.attributor(case.model(), seed=SEED).fit(train, strategy=strategy, empirical=empirical, batch_size=BATCH)
    options = {"damping": damping, "batch_size": BATCH}
    plain = attributor.scores(queries, train, query_batch_size=QUERY_BATCH, **options)
    split = attributor.scores(queries, train, query_batch_size=QUERY_BATCH, per_layer=True, **options)
    assert plain.per_layer == {}, "layers were not asked for"
    assert plain.values.dtype == torch.float64, "scores of a float64 model are float64"
    oracle.assert_close(split.values, plain.values, f"{case.name} {strategy}: values with per_layer=True", rtol=1e-13)
    return Result(plain.values, split.per_layer, attributor.self_influence(train, **options))


cached_run = lru_cache(maxsize=None)(run)


def compare(actual: Result, wanted: Result, kind: str, what: str) -> None:
    """Compare one kind of score."""
    if kind != "per_layer":
        oracle.assert_close(getattr(actual, kind), getattr(wanted, kind), f"{what} {kind}")
        return
    assert set(actual.per_layer) == set(wanted.per_layer), "the layers are not those of the case"
    for name, values in wanted.per_layer.items():
        oracle.assert_close(actual.per_layer[name], values, f"{what} layer {name!r}")
