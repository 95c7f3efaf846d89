"""Models and tasks that invite a silent mistake: each one is either scored right or refused with a reason."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracle
from case_models import mlp
from cases import STRATEGIES, build, case_named
from whence.errors import LayerError, WhenceError
from whence.tasks import Classification

CASE = case_named("mlp")
ROWS, QUERIES = CASE.data()


def all_scores(model: nn.Module, strategy: str = "diagonal", rows: list = ROWS, **options: Any) -> Tensor:
    attributor = CASE.attributor(model, **options).fit(rows, strategy=strategy, empirical=True, batch_size=5)
    return attributor.scores(QUERIES, rows, batch_size=5).values


# ---------------------------------------------------------------------------------------------- how a model is run


class Reentrant(nn.Module):
    """Checkpointing of the old kind, over the first layers or the later ones: its forward pass is run without gradients."""

    def __init__(self, *, early: bool, active: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.early, self.active = early, active

    def part(self, layer: nn.Module, x: Tensor, active: bool) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(layer(x))

        return checkpoint(block, x, use_reentrant=True) if self.active and active else block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.second, self.part(self.first, x, self.early), not self.early))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True", "ignore:.*use_reentrant")
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_reentrant_checkpointing_is_right_or_refused(strategy: str, early: bool) -> None:
    """Where no input of the block needs a gradient this kind of checkpointing gives none, and the layers inside would score zero."""
    wanted = all_scores(build(partial(Reentrant, early=early, active=False)), strategy)
    active = build(partial(Reentrant, early=early, active=True))
    with contextlib.suppress(LayerError):
        oracle.assert_close(all_scores(active, strategy), wanted, f"reentrant checkpoint, early={early}, {strategy}")
        return
    with pytest.raises(LayerError, match=r"'first'|checkpoint"):
        all_scores(active, strategy)


class Penalised(Classification):
    """Adds a penalty on the gradient with respect to the input: its own gradient passes each layer twice."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().requires_grad_()
            logits = model(x)
            (slope,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        return nn.functional.cross_entropy(logits, batch[1], reduction="none") + slope.square().sum(-1)


def test_a_loss_that_differentiates_the_model_is_refused() -> None:
    """G is then no sum of g a^T over the calls of the forward pass; anything but an error would be a wrong number."""
    with pytest.raises(WhenceError, match=r"(?i)gradient"):
        all_scores(build(mlp), "identity", task=Penalised())


class SharedTable(nn.Module):
    """A layer on a table of as many positions as a batch has rows, without the batch's axis: the sizes agree by accident."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places, self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.randn(places, 2))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.places(self.table).mean(0)
        return self.head(torch.tanh(self.inner(x + shift)))


@pytest.mark.parametrize("places", [5, 7])
def test_a_table_shared_by_the_batch_is_not_taken_for_examples(places: int) -> None:
    """Rows in fives, ten of them: every batch is as long as a table of five."""
    attributor = CASE.attributor(build(partial(SharedTable, places)))
    with contextlib.suppress(LayerError):
        attributor.fit(ROWS[:10], empirical=True, batch_size=5)
        assert "places" in dict(attributor.coverage.left_out)
        return
    with pytest.raises(LayerError, match=r"'places'"):
        attributor.fit(ROWS[:10], empirical=True, batch_size=5)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Logged(nn.Linear):
    """A subclass with a forward of its own that computes the same."""

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", len(x))
        return super().forward(x)


def test_a_subclass_that_computes_something_else_is_left_out_or_refused() -> None:
    """Left out with the reason by default; an error where it was asked for by name."""

    def model() -> nn.Module:
        return build(lambda: nn.Sequential(Scaled(4, 6), nn.Tanh(), nn.Linear(6, 3)))

    attributor = CASE.attributor(model()).fit(ROWS, strategy="diagonal", empirical=True, batch_size=5)
    assert list(attributor.coverage.tracked) == ["2"]
    assert "Scaled" in dict(attributor.coverage.left_out)["0"]
    assert list(attributor.scores(QUERIES, ROWS, per_layer=True).per_layer) == ["2"]
    with pytest.raises(LayerError, match=r"'0'.*Scaled"):
        all_scores(model(), layers=["0"])
    with pytest.raises(LayerError, match=r"'0'.*Scaled"):
        all_scores(model(), layers=["0", "2"])


def test_a_subclass_that_computes_the_same_is_tracked() -> None:
    def network(kind: type[nn.Linear]) -> nn.Module:
        model = nn.Sequential(kind(4, 6), nn.Tanh(), nn.Linear(6, 3))
        for module in model:
            module.__dict__["seen"] = 0
        return model

    found, wanted = (all_scores(build(partial(network, kind))) for kind in (Logged, nn.Linear))
    assert torch.equal(found, wanted)


class HalfTied(nn.Module):
    """Two layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_layers_that_share_half_their_parameters_are_left_out() -> None:
    coverage = CASE.attributor(build(HalfTied)).coverage
    assert list(coverage.tracked) == ["head"]
    assert {name for name, _ in coverage.left_out} == {"first", "second"}
    assert all("shared" in reason for _, reason in coverage.left_out)
    with pytest.raises(LayerError, match=r"'first'.*shared"):
        CASE.attributor(build(HalfTied), layers=["first"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_coverage_after_scoring_names_layers_off_the_axis_of_the_batch(strategy: str) -> None:
    """The table of places is shared by the batch, which is seen when the model first runs."""
    case = case_named("attention")
    train, queries = case.data()
    attributor = case.attributor(case.model()).fit(train, strategy=strategy, empirical=True, batch_size=5)
    scores = attributor.scores(queries, train, per_layer=True)
    assert list(attributor.coverage.tracked) == list(case.tracked)
    assert "places" in dict(attributor.coverage.left_out)
    assert list(scores.per_layer) == list(case.tracked), "a layer that is left out has no scores"


# ---------------------------------------------------------------------------------------------- what must not be touched


class Teacher(Classification):
    """A task with a trainable module of its own, as a loss with learnt weights has."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch) + (model(batch[0]) - self.teacher(batch[0])).square().sum(-1)


def test_no_gradient_is_left_on_a_module_of_the_task() -> None:
    teacher = build(partial(nn.Linear, 4, 3), seed=1)
    all_scores(build(mlp), task=Teacher(teacher))
    assert teacher.weight.grad is None
    assert teacher.bias.grad is None


def test_no_gradient_is_left_on_the_rows() -> None:
    rows = [(x.clone().requires_grad_(), label) for x, label in ROWS]
    oracle.assert_close(all_scores(build(mlp), rows=rows), all_scores(build(mlp)), "rows that require a gradient")
    assert all(x.grad is None for x, _ in rows)


class Restless(Classification):
    """A task that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return super().loss(model, batch)


def test_a_task_may_change_while_it_is_used() -> None:
    assert CASE.attributor(CASE.model(), task=Restless()).fit(ROWS, empirical=True).scores(QUERIES, ROWS).values.shape == (4, 13)


class Equipped(Classification):
    """A task that holds an object and a function: in the next process they have other addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.helper, self.rule = object(), lambda x: x


def test_a_task_may_hold_objects(tmp_path: Path) -> None:
    wanted = CASE.attributor(CASE.model(), task=Equipped(), run_dir=tmp_path).fit(ROWS, empirical=True).scores(QUERIES, ROWS).values
    again = CASE.attributor(CASE.model(), task=Equipped(), run_dir=tmp_path)
    assert torch.equal(again.fit(ROWS, empirical=True).scores(QUERIES, ROWS).values, wanted)
