"""The engine against the oracle of batch one: every case, every strategy, every kind of score, in float64 at rtol 1e-6."""

from __future__ import annotations

import pytest
import torch

import oracle
from cases import EMPIRICAL, SAMPLED, STRATEGIES, Case, case_named
from expected import BATCH, KINDS, cached_run, compare, expected, run


def ids(case: Case) -> str:
    return case.name


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
