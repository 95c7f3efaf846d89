"""The engine against the oracle of batch one: every case, every strategy, every kind of score, in float64 at rtol 1e-6."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from cases import EMPIRICAL, SAMPLED, STRATEGIES, Case, case_named

BATCH, QUERY_BATCH, SEED = 5, 3, 11
KINDS = ("scores", "per_layer", "self_influence")


def ids(case: Case) -> str:
    return case.name


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


@lru_cache
def gradients(name: str) -> Gradients:
    """Run every row of the case on its own."""
    case = case_named(name)
    model, task, (train, queries) = case.model(), case.task(), case.data()
    collect = partial(oracle.collect, model, case.tracked, task, collate=case.collate)
    return Gradients(
        train=collect(train, objective=lambda m, batch, _: task.loss(m, batch)),
        queries=collect(queries, objective=lambda m, batch, _: task.measurement(m, batch)),
    )


@lru_cache
def sampled(name: str, stream: int) -> list[oracle.Example]:
    """Run every training row with labels drawn from the model; row i's noise is keyed by i."""
    from whence.runtime.noise import KeyedNoise

    case = case_named(name)
    model, task = case.model(), case.task()

    def objective(m: Any, batch: Any, index: int) -> Tensor:
        noise = KeyedNoise(seed=SEED, stream=stream, ids=torch.tensor([index]), device=torch.device("cpu"))
        return task.sampled_loss(m, batch, noise)

    return oracle.collect(model, case.tracked, task, case.data()[0], collate=case.collate, objective=objective)


def expected(case: Case, strategy: str, damping: Any = "auto", *, empirical: bool = True) -> Result:
    """Score with dense matrices. The covariances come from noise stream 0, the eigenvalues of diagonal and ekfac from stream 1."""
    seen = gradients(case.name)
    first, second = (seen.train, seen.train) if empirical else (sampled(case.name, 0), sampled(case.name, 1))
    curvatures = oracle.fit(case.tracked, strategy, first, second)
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


cached_run = lru_cache(run)


def compare(actual: Result, wanted: Result, kind: str, what: str) -> None:
    """Compare one kind of score."""
    if kind != "per_layer":
        oracle.assert_close(getattr(actual, kind), getattr(wanted, kind), f"{what} {kind}")
        return
    assert set(actual.per_layer) == set(wanted.per_layer), "the layers are not those of the case"
    for name, values in wanted.per_layer.items():
        oracle.assert_close(actual.per_layer[name], values, f"{what} layer {name!r}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_engine_equals_oracle(case: Case, strategy: str, kind: str) -> None:
    compare(cached_run(case, strategy), expected(case, strategy), kind, f"{case.name} {strategy}")


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("case", SAMPLED, ids=ids)
def test_true_fisher_equals_oracle(case: Case, strategy: str) -> None:
    actual, wanted = run(case, strategy, empirical=False), expected(case, strategy, empirical=False)
    for kind in KINDS:
        compare(actual, wanted, kind, f"{case.name} {strategy} with sampled labels")


@pytest.mark.parametrize("damping", ["absolute", "layer", "model"])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("name", ["mlp", "conv_groups", "padded"])
def test_damping_equals_oracle(name: str, strategy: str, damping: str) -> None:
    from whence import Damping

    chosen = 0.03 if damping == "absolute" else Damping(relative=0.02, scope=damping)
    case = case_named(name)
    actual, wanted = run(case, strategy, chosen), expected(case, strategy, chosen)
    for kind in KINDS:
        compare(actual, wanted, kind, f"{name} {strategy} {chosen}")


def test_layers_come_in_the_order_of_the_model() -> None:
    case = case_named("checkpointed")
    assert list(cached_run(case, "ekfac").per_layer) == list(case.tracked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_batch_for_everything_equals_oracle(strategy: str) -> None:
    """A batch larger than the data, and the default sizes."""
    case = case_named("conv_all_three")
    train, queries = case.data()
    attributor = case.attributor(case.model()).fit(train, strategy=strategy, empirical=True)
    wanted = expected(case, strategy)
    oracle.assert_close(attributor.scores(queries, train).values, wanted.scores, f"{strategy} scores")
    oracle.assert_close(attributor.self_influence(train), wanted.self_influence, f"{strategy} self-influence")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "conv_groups_reflect", "choices"])
def test_single_precision_is_close_to_the_oracle(name: str, strategy: str) -> None:
    """float32 models: what remains is rounding, amplified by the damped inverse (condition at most a few hundred)."""
    case = case_named(name)
    model, (train, queries) = case.model().float(), case.data()
    from cases import watch

    watch(model)
    train, queries = ([(x.float(), label) for x, label in rows] for rows in (train, queries))
    attributor = case.attributor(model).fit(train, strategy=strategy, empirical=True, batch_size=BATCH)
    values = attributor.scores(queries, train, batch_size=BATCH).values
    assert values.dtype == torch.float32
    oracle.assert_close(values, expected(case, strategy).scores, f"{name} {strategy}", rtol=1e-3, atol_of_largest=1e-4)
