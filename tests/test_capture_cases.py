"""The cases and the oracle are sound, and capture sees what it should: coverage, the extent of the backward pass, untouched outputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import case_models
import oracle
from cases import EMPIRICAL, STRATEGIES, Case, build, case_named
from coverage_check import assert_coverage_is_true
from whence.tasks import Classification, Task

BATCH = 5


def ids(case: Case) -> str:
    return case.name


def examples_of(case: Case, model: nn.Module, task: Task) -> list[oracle.Example]:
    return oracle.collect(
        model, case.tracked, task, case.data()[0], collate=case.collate, objective=lambda m, batch, _: task.loss(m, batch)
    )


def untransformed(case: Case) -> Task:
    """Return the case's task with gradients left as autograd gives them."""
    task = case.task()
    task.transform_gradient = lambda layer, gradient: gradient
    return task


# ---------------------------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_oracle_positions_add_up_to_its_gradients(case: Case) -> None:
    """`sum_t g_t a_t^T` over the recorded positions is autograd's gradient of the parameters."""
    for example in examples_of(case, case.model(), untransformed(case)):
        for name, uses in example.uses.items():
            # The padding word's row of an embedding has no gradient; other padding has positions, whose g is zero.
            kept = uses.real[:, None, None] if example.layers[name].free[0] else 1.0
            total = torch.einsum("pgo,pgi->goi", uses.g * kept, uses.a)
            oracle.assert_close(total, example.gradient[name], f"{case.name} {name}", rtol=1e-12, atol_of_largest=1e-12)


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_oracle_examples_add_up_to_the_gradient_of_the_batch(case: Case) -> None:
    """An example's loss does not depend on the rows beside it, and all of them together are the batch."""
    model, task = case.model(), untransformed(case)
    rows = case.data()[0][:BATCH]
    layers = {name: oracle.layer_of(model, name) for name in case.tracked}
    with oracle.recorded(model, layers):
        losses = task.loss(model, case.collate(rows))
        wanted = [p for layer in layers.values() for p in oracle.trained(layer)]
        found = iter(torch.autograd.grad(losses.sum(), wanted, allow_unused=True))
    assert losses.shape == (BATCH,)
    examples = examples_of(case, model, task)[:BATCH]
    for name, layer in layers.items():
        whole = oracle.as_trained_matrix(layer, [next(found) for _ in oracle.trained(layer)])
        total = sum(example.gradient[name] for example in examples)
        oracle.assert_close(total, whole, f"{case.name} {name}", rtol=1e-10, atol_of_largest=1e-12)


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_oracle_gradient_is_the_slope_of_the_loss(case: Case) -> None:
    """Finite differences along a random direction of all tracked weights and biases at once."""
    model, task = case.model(), untransformed(case)
    batch = case.collate(case.data()[0][:1])
    example = oracle.run_one(model, case.tracked, task, batch, task.loss)
    layers = {name: oracle.layer_of(model, name) for name in case.tracked}
    steps = {p: torch.randn_like(p) for layer in layers.values() for p in oracle.trained(layer)}
    predicted = sum(
        (example.gradient[name] * oracle.as_trained_matrix(layer, [steps[p] for p in oracle.trained(layer)])).sum()
        for name, layer in layers.items()
    )

    @torch.no_grad()
    def moved(distance: float) -> Tensor:
        before = {p: p.clone() for p in steps}
        for p, step in steps.items():
            p.add_(step, alpha=distance)
        value = task.loss(model, batch).sum()
        for p, old in before.items():
            p.copy_(old)
        return value

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    # The slope includes uses that autograd is told to ignore (no_grad, a padding word), and of an attention that is tracked in part
    # the packed parameters move as a whole.
    ignored = any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in model.modules())
    if case.name not in {"used_without_gradient", "attention_named_parts"} and not ignored:
        assert torch.allclose(slope, predicted, rtol=1e-5, atol=1e-6), f"{case.name}: slope {slope:.9g}, gradient {predicted:.9g}"


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_no_covariance_repeats_an_eigenvalue(case: Case) -> None:
    """EKFAC is then a function of the data alone; with a repeated eigenvalue it would depend on an arbitrary basis."""
    examples = examples_of(case, case.model(), case.task())
    for name in examples[0].uses:
        for side in ("a", "g"):
            free = oracle.free_sides(examples[0], name)
            if free[side == "g"]:
                continue
            values = torch.linalg.eigvalsh(oracle.covariance(examples, name, side))
            gaps = values.diff(dim=-1) / values[:, -1:]
            assert (gaps > 1e-5).all(), f"{case.name} {name} {side}: smallest relative gap {gaps.min():.1e}"


# ---------------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("case", EMPIRICAL, ids=ids)
def test_the_layers_of_the_case_are_tracked(case: Case) -> None:
    model, (train, _) = case.model(), case.data()
    attributor = case.attributor(model).fit(train, strategy="diagonal", empirical=True, batch_size=BATCH)
    assert_coverage_is_true(model, attributor.coverage, case.tracked)
    # Where parameters without a handler stand is not said.
    bare = {name for name, _ in model.named_parameters()}
    found, wanted = ([name for name in names if name not in bare] for names in (attributor.coverage.tracked, case.tracked))
    assert found == wanted, "layers come in the order of the model"


def test_coverage_says_what_is_left_out_and_why() -> None:
    case = case_named("fallback_upsampled")
    coverage = case.attributor(case.model(), fallback=False).coverage
    assert list(coverage.tracked) == ["head"]
    assert {name.split(".")[0] for name, _ in coverage.left_out} == {"up"}
    assert "ConvTranspose2d" in coverage.left_out[0][1]
    assert coverage.share == pytest.approx(9 / 43)
    assert "up" in str(coverage)
    assert "20.9" in str(coverage) or "21" in str(coverage)


def test_frozen_layers_are_left_out_and_named() -> None:
    case = case_named("partly_frozen")
    coverage = case.attributor(case.model()).coverage
    reasons = dict(coverage.left_out)
    assert {"enter", "blocks.0.up", "blocks.0.down"} <= set(reasons)
    assert coverage.share == pytest.approx(1.0), "the share is of the parameters that are trained"


def test_layers_not_asked_for_are_left_out() -> None:
    case = case_named("late_layers")
    coverage = case.attributor(case.model()).coverage
    assert coverage.share == pytest.approx((35 + 18) / (25 + 2 * 71 + 18))


# ---------------------------------------------------------------------------------------------- the extent of the work


class Tripwire(torch.autograd.Function):
    """The identity; counts how often a gradient passes."""

    passed = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Tripwire.passed += 1
        return gradient


class Guarded(nn.Module):
    """A tripwire between the second and the third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(i, o) for i, o in ((4, 6), (6, 5), (5, 4), (4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = Tripwire.apply(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.head(torch.tanh(self.third(x)))


@pytest.mark.parametrize(("layers", "passes"), [(["third", "head"], False), (["head"], False), (["first", "head"], True), (None, True)])
def test_backward_stops_at_the_earliest_tracked_layer(layers: list[str] | None, passes: bool) -> None:
    case = case_named("mlp")
    train, queries = case.data()
    Tripwire.passed = 0
    attributor = case.attributor(build(Guarded), layers=layers).fit(train, empirical=True, batch_size=BATCH)
    attributor.scores(queries, train, batch_size=BATCH)
    attributor.self_influence(train, batch_size=BATCH)
    assert (Tripwire.passed > 0) == passes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "conv_plain", "conv1d_of_transformers"])
def test_autograd_computes_no_gradient_of_a_tracked_weight(name: str, strategy: str) -> None:
    """But for one check of a command, whether the layers account for all uses of their weights, however many batches follow."""
    case = case_named(name)
    model, (train, queries) = case.model(), case.data()
    computed: Counter[str] = Counter()
    handles = [p.register_hook(lambda _, key=key: computed.update([key])) for key, p in model.named_parameters()]
    attributor = case.attributor(model).fit(train, strategy=strategy, empirical=True, batch_size=1)
    attributor.scores(queries, train, batch_size=1)
    attributor.self_influence(train, batch_size=1)
    for handle in handles:
        handle.remove()
    assert all(count <= 3 for count in computed.values()), f"gradients of weights in three commands: {computed}"


class Spying(Classification):
    """Keeps what the model gave while the engine was at work."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        output = super().output(model, batch)
        if output.requires_grad:
            self.outputs.append(output.detach().clone())
        return output


@pytest.mark.parametrize("name", ["mlp", "in_place_relu", "in_place_view", "in_place_input", "checkpointed", "conv_in_place_relu", "tied"])
def test_outputs_are_those_of_the_plain_model(name: str) -> None:
    case = case_named(name)
    model, (train, _), task = case.model(), case.data(), Spying()
    with torch.no_grad():
        plain = model(case.collate(train[:BATCH])[0])
    case.attributor(model, task=task).fit(train, empirical=True, batch_size=BATCH)
    assert task.outputs, "the model was never run with gradients"
    same = [output for output in task.outputs if output.shape == plain.shape and torch.equal(output, plain)]
    assert same, "no batch gave what the plain model gives, to the last bit"


def test_a_model_inside_no_grad_is_scored_all_the_same() -> None:
    case = case_named("mlp")
    train, queries = case.data()
    wanted = case.attributor(case.model()).fit(train, empirical=True).scores(queries, train).values
    with torch.no_grad():
        found = case.attributor(case.model()).fit(train, empirical=True).scores(queries, train).values
    assert torch.equal(found, wanted)


def test_two_attributors_share_a_model() -> None:
    """Taps belong to a command, not to the model."""
    case = case_named("late_layers")
    model, (train, queries) = case.model(), case.data()
    late, whole = case.attributor(model), case.attributor(model, layers="all")
    late.fit(train, empirical=True, batch_size=BATCH)
    whole.fit(train, empirical=True, batch_size=BATCH)
    split = whole.scores(queries, train, per_layer=True).per_layer
    wanted = sum(split[name] for name in case.tracked)
    oracle.assert_close(late.scores(queries, train).values, wanted, "late layers alone", atol_of_largest=1e-12)


def test_models_of_the_cases_differ_in_no_gradient_flag() -> None:
    """The fixture that watches models does notice a change (here made and taken back by hand)."""
    from cases import differences

    model = build(case_models.mlp)
    handle = model[0].register_forward_hook(lambda *_: None)
    model[2].weight.requires_grad_(False)
    model[4].extra = 1
    model.train()
    found = "\n".join(differences())
    for part in ("0: _forward_hooks", "2.weight: requires_grad", "4: attributes", "1: training"):
        assert part in found
    handle.remove()
    model[2].weight.requires_grad_(True)
    del model[4].extra
    model.eval()
