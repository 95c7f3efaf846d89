"""What must not matter: batch sizes, order, padding, the global random state. What must be left alone: the model and that state."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracle
from case_data import collate_padded, collate_tagged
from cases import STRATEGIES, Case, case_named, differences, watch
from whence.tasks import Classification

BATCH = 5
CASES = [
    "mlp",
    "positions",
    "reused_unevenly",
    "tied",
    "conv_groups_reflect",
    "checkpointed",
    "choices",
    "uneven_groups",
    "packed",
    "padded",
    "two_paddings",
    "model_called_twice",
    "measured_by_one_head",
]


def scored(case: Case, rows: list, queries: list, **options: Any) -> tuple[Tensor, Tensor]:
    """Return scores and self-influence; `options` may hold fit_batch, batch, query_batch, strategy, empirical, seed, collate."""
    given = {"strategy": "ekfac", "empirical": True, "fit_batch": BATCH, "batch": BATCH, "query_batch": 3, "seed": 0} | options
    settings = {"seed": given["seed"]} | ({"collate": given["collate"]} if "collate" in given else {})
    attributor = case.attributor(case.model(), **settings)
    attributor.fit(rows, strategy=given["strategy"], empirical=given["empirical"], batch_size=given["fit_batch"])
    values = attributor.scores(queries, rows, batch_size=given["batch"], query_batch_size=given["query_batch"]).values
    return values, attributor.self_influence(rows, batch_size=given["batch"])


def assert_equal_to_rounding(actual: Tensor, expected: Tensor, what: str) -> None:
    """Accept a difference of 1e-12 of the largest score."""
    assert actual.dtype == torch.float64, "scores of a float64 model are float64"
    oracle.assert_close(actual, expected, what, rtol=0.0, atol_of_largest=1e-12)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], what: str) -> None:
    for found, wanted, kind in zip(actual, expected, ("scores", "self-influence"), strict=True):
        assert_equal_to_rounding(found, wanted, f"{what} {kind}")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_batch_sizes_change_nothing(name: str, strategy: str) -> None:
    case = case_named(name)
    rows, queries = case.data()
    wanted = scored(case, rows, queries, strategy=strategy)
    for fit_batch, batch, query_batch in ((1, 1, 1), (4, 50, 2)):
        found = scored(case, rows, queries, strategy=strategy, fit_batch=fit_batch, batch=batch, query_batch=query_batch)
        assert_same(found, wanted, f"{name} {strategy} batches {fit_batch} {batch} {query_batch}")


@pytest.mark.parametrize("name", ["mlp", "regression", "positions", "conv_groups", "choices", "label_per_position"])
def test_batch_sizes_do_not_change_the_sampled_labels(name: str) -> None:
    case = case_named(name)
    rows, queries = case.data()
    wanted = scored(case, rows, queries, empirical=False)
    for size in (1, 4, 13):
        found = scored(case, rows, queries, empirical=False, fit_batch=size)
        assert_same(found, wanted, f"{name} true Fisher in batches of {size}")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_the_order_of_rows_only_orders_the_scores(name: str, strategy: str) -> None:
    case = case_named(name)
    rows, queries = case.data()
    order, query_order = torch.randperm(len(rows)), torch.randperm(len(queries))
    values, own = scored(case, rows, queries, strategy=strategy)
    shuffled = [rows[i] for i in order], [queries[i] for i in query_order]
    found = scored(case, *shuffled, strategy=strategy)
    assert_same(found, (values[query_order][:, order], own[order]), f"{name} {strategy} shuffled")


@pytest.mark.parametrize("empirical", [True, False], ids=["empirical", "sampled"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "collate"), [("padded", collate_padded), ("padded_labels", collate_tagged)])
def test_more_padding_changes_nothing(name: str, collate: Callable, strategy: str, empirical: bool) -> None:
    case = case_named(name)
    rows, queries = case.data()
    wanted = scored(case, rows, queries, strategy=strategy, empirical=empirical)
    found = scored(case, rows, queries, strategy=strategy, empirical=empirical, collate=partial(collate, extra=3))
    assert_same(found, wanted, f"{name} {strategy} with three more positions of padding")


def test_queries_do_not_change_each_other() -> None:
    case = case_named("conv_groups")
    rows, queries = case.data()
    attributor = case.attributor(case.model()).fit(rows, empirical=True)
    together = attributor.scores(queries, rows).values
    alone = torch.cat([attributor.scores([query], rows).values for query in queries])
    assert_equal_to_rounding(alone, together, "queries one at a time")
    some = attributor.scores(queries, rows[3:8], batch_size=2).values
    assert_equal_to_rounding(some, together[:, 3:8], "some training rows")


# ---------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_the_seed_decides_the_sampled_labels(strategy: str) -> None:
    case = case_named("mlp")
    rows, queries = case.data()
    first, again, other = (scored(case, rows, queries, strategy=strategy, empirical=False, seed=seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-3)


@pytest.mark.parametrize("empirical", [True, False], ids=["empirical", "sampled"])
def test_the_global_random_state_is_neither_read_nor_moved(empirical: bool) -> None:
    case = case_named("mlp")
    rows, queries = case.data()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        found.append(scored(case, rows, queries, empirical=empirical)[0])
        assert torch.equal(torch.get_rng_state(), before[0]), "torch's global random state has moved"
        assert np.array_equal(np.random.get_state()[1], before[1]), "numpy's global random state has moved"
        assert random.getstate() == before[2], "Python's global random state has moved"
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------- the model is left alone


def lived_in(case: Case) -> nn.Module:
    """Return the case's model in a mixed state: train and eval, a hook of its owner, a gradient, an attribute, a frozen bias-free part."""
    model = case.model()
    model.train()
    model.blocks[0].eval()
    model.enter.register_forward_hook(lambda *_: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.head.note = "mine"
    model.blocks[0]["up"].requires_grad_(False)
    return watch(model)


def clean_up(model: nn.Module) -> None:
    """Take the owner's own hook off, once the comparison has been made."""
    assert differences() == []
    model.enter._forward_hooks.clear()
    watch(model)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_model_is_left_as_found(strategy: str) -> None:
    case = case_named("checkpointed")
    model, (rows, queries) = lived_in(case), case.data()
    attributor = case.attributor(model).fit(rows, strategy=strategy, batch_size=BATCH)
    assert differences() == []
    attributor.scores(queries, rows, batch_size=BATCH)
    assert differences() == []
    attributor.self_influence(rows, batch_size=BATCH)
    clean_up(model)


class Failing(Classification):
    """Raises in the n-th call for a loss."""

    left = 10**9

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        Failing.left -= 1
        if Failing.left < 0:
            raise KeyboardInterrupt
        return super().output(model, batch)


@pytest.mark.parametrize("calls", range(9))
def test_model_is_left_as_found_when_fitting_breaks_off(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("checkpointed")
    model, (rows, _) = lived_in(case), case.data()
    monkeypatch.setattr(Failing, "left", calls)
    # One look at the model before the work, then two passes of three batches each; the last numbers break off nothing.
    try:
        case.attributor(model, task=Failing()).fit(rows, batch_size=BATCH)
    except KeyboardInterrupt:
        pass
    else:
        assert calls >= 6, "two passes of three batches take at least six calls"
    clean_up(model)


@pytest.mark.parametrize("calls", range(6))
def test_model_is_left_as_found_when_scoring_breaks_off(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_named("checkpointed")
    model, (rows, queries) = lived_in(case), case.data()
    monkeypatch.setattr(Failing, "left", 10**9)
    attributor = case.attributor(model, task=Failing()).fit(rows, batch_size=BATCH)
    for work in (partial(attributor.scores, queries, rows, batch_size=BATCH), partial(attributor.self_influence, rows, batch_size=BATCH)):
        monkeypatch.setattr(Failing, "left", calls)
        try:
            work()
        except KeyboardInterrupt:
            pass
        else:
            assert calls >= 3, "three training batches take at least three calls"
        assert differences() == []
    clean_up(model)


class Shaken(nn.Module):
    """A model with dropout: what it gives in train mode is random."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.inner(x))))


def test_a_model_in_train_mode_is_scored_in_eval_mode() -> None:
    from cases import build

    case = case_named("mlp")
    rows, queries = case.data()
    found = []
    for training in (False, True):
        model = watch(build(Shaken).train(training))
        found.append(case.attributor(model).fit(rows, empirical=True).scores(queries, rows).values)
        assert model.drop.training is training
    assert torch.equal(*found)
