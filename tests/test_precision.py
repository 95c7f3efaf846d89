"""Narrow types, masks of other kinds, and the smallest data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from cases import STRATEGIES, build, case_named, watch
from whence.tasks import Classification

CASE = case_named("mlp")
ROWS, QUERIES = CASE.data()


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
