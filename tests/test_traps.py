"""Models and tasks that invite a silent mistake: each one is either scored right or refused with a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracle
from case_models import mlp
from cases import STRATEGIES, build, case_named, watch
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
        return self._cross_entropy(logits, batch[1]) + slope.square().sum(-1)


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


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    with pytest.raises(LayerError, match=r"'0'.*Scaled"):
        all_scores(build(lambda: nn.Sequential(Scaled(4, 6), nn.Tanh(), nn.Linear(6, 3))))


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
def test_coverage_after_scoring_names_layers_that_were_never_called(strategy: str) -> None:
    """torch's attention uses the weights of its output projection without calling it."""
    case = case_named("attention")
    train, queries = case.data()
    attributor = case.attributor(case.model()).fit(train, strategy=strategy, empirical=True, batch_size=5)
    scores = attributor.scores(queries, train, per_layer=True)
    assert list(attributor.coverage.tracked) == list(case.tracked)
    assert {"block.self_attn.out_proj", "places"} <= set(dict(attributor.coverage.left_out))
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


# ---------------------------------------------------------------------------------------------- numbers


class OtherMask:
    """A mask whose real positions are marked by another number than one."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        self.convert = convert

    def __call__(self, batch: dict) -> Tensor:
        return self.convert(batch["inputs"]["mask"])


@pytest.mark.parametrize("convert", [Tensor.bool, Tensor.long, lambda mask: 3.0 * mask], ids=["bool", "integer", "three"])
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_a_mask_marks_what_is_not_zero(strategy: str, convert: Callable[[Tensor], Tensor]) -> None:
    case = case_named("padded")
    rows, queries = case.data()
    found = []
    for change in (lambda mask: mask, convert):
        task = case.task()
        task.padding_mask = OtherMask(change)
        attributor = case.attributor(case.model(), task=task).fit(rows, strategy=strategy, empirical=True, batch_size=5)
        found.append(attributor.scores(queries, rows).values)
    oracle.assert_close(found[1], found[0], f"{strategy}, another kind of mask", rtol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_models_are_summed_in_single_precision(strategy: str) -> None:
    """bfloat16 has eight bits: sums of a few hundred terms in it lose percents, whatever the terms' own rounding.

    Two models see the same bfloat16 numbers, one computes in float64; 3% is left for rounding in forward and backward,
    which is random from row to row, while a sum in bfloat16 is off by 10% and more.
    """

    def linear() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3))

    narrow = watch(build(linear).bfloat16())
    wide = watch(build(linear))
    with torch.no_grad():
        for p, q in zip(wide.parameters(), narrow.parameters(), strict=True):
            p.copy_(q)
    watch(wide)
    x = (torch.rand(1000, 4) + 0.5).bfloat16()
    labels = [index % 3 for index in range(1000)]
    own = []
    for model, kind in ((narrow, torch.bfloat16), (wide, torch.float64)):
        rows = [(row.to(kind), label) for row, label in zip(x, labels, strict=True)]
        attributor = CASE.attributor(model, task=Classification()).fit(rows, strategy=strategy, empirical=True, batch_size=1)
        own.append(attributor.self_influence(rows, batch_size=100).double())
    assert own[0].shape == (1000,)
    assert abs(own[0].mean() / own[1].mean() - 1) < 0.03


class Autocast(Classification):
    """Mixed precision, as training code has it: weights in float32, activations of some layers in bfloat16."""

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().output(model, batch).float()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_task_may_use_autocast(strategy: str) -> None:
    """bfloat16 has a relative rounding of 0.4%; the damped inverse amplifies it some times over."""
    rows, queries = ([(x.float(), label) for x, label in part] for part in (ROWS, QUERIES))
    found = []
    for task in (Autocast(), Classification()):
        attributor = CASE.attributor(watch(CASE.model().float()), task=task).fit(rows, strategy=strategy, empirical=True, batch_size=5)
        found.append(attributor.scores(queries, rows, batch_size=5).values)
    assert found[0].dtype == torch.float32
    oracle.assert_close(found[0], found[1], f"{strategy} under autocast", rtol=0.0, atol_of_largest=0.1)


@pytest.mark.parametrize("damping", [0.5, 2.0])
def test_absolute_damping_holds_for_a_layer_without_curvature(damping: float) -> None:
    """Where no fitted row reaches a layer its curvature is zero, and `(0 + damping)^-1` is what the definition says."""
    case = case_named("branch_not_always_taken")
    model, (rows, queries) = case.model(), case.data()
    shut, opened = rows[5:10], rows[:5]
    attributor = case.attributor(model).fit(shut, strategy="diagonal", empirical=True, batch_size=5)
    damped = attributor.scores(queries[:3], opened, damping=damping, per_layer=True, batch_size=5, query_batch_size=3)
    plain = case.attributor(model).scores(queries[:3], opened, strategy="identity", per_layer=True, batch_size=5, query_batch_size=3)
    if "branch" not in attributor.coverage.tracked:
        assert "branch" in dict(attributor.coverage.left_out)
        return
    oracle.assert_close(damped.per_layer["branch"], plain.per_layer["branch"] / damping, "the branch")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_row_and_one_query(strategy: str) -> None:
    attributor = CASE.attributor(CASE.model()).fit(ROWS[:1], strategy=strategy, empirical=True)
    scores = attributor.scores(QUERIES[:1], ROWS[:1], per_layer=True)
    assert scores.values.shape == (1, 1)
    assert attributor.self_influence(ROWS[:1]).shape == (1,)
    assert list(attributor.coverage.tracked) == ["0", "2", "4"]


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "ekfac"])
def test_single_precision_does_not_depend_on_batches(strategy: str) -> None:
    """About 1e-6, as the design says; EKFAC's eigenvectors amplify rounding by the gaps between eigenvalues, here up to 1e3."""
    rows = [(x.float(), label) for x, label in ROWS]
    queries = [(x.float(), label) for x, label in QUERIES]
    found = []
    for size in (1, 5, 13):
        model = watch(CASE.model().float())
        attributor = CASE.attributor(model).fit(rows, strategy=strategy, empirical=True, batch_size=size)
        found.append(attributor.scores(queries, rows, batch_size=size).values)
    tolerance = 1e-4 if strategy == "ekfac" else 2e-6
    for other in found[1:]:
        oracle.assert_close(other, found[0], f"{strategy} in float32", rtol=0.0, atol_of_largest=tolerance)
