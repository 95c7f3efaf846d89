"""The check of layers before long work: a layer whose parameters are used behind its back is found, a correct one never dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whence
from case_models import mlp
from case_models_conv import ConvNet
from cases import EMPIRICAL, Case, build, watch
from compare import assert_close
from whence.capture import survey
from whence.errors import LayerError
from whence.tasks import Classification

REASON = r"its parameters are used outside of it too"


def vectors(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3, strict=True))


def engine(model: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(model, Classification(), device="cpu", progress=False, **options)


# ---------------------------------------------------------------------------------------------- uses behind a layer's back


class Functional(nn.Module):
    """The weight of a layer is used again, as a function's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(F.linear(torch.tanh(self.first(x)), self.first.weight))))


class Penalised(nn.Module):
    """A bias serves as a shift elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))) + self.first.bias)


class Aliased(nn.Module):
    """A norm's weight under a second name, used as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        nn.init.uniform_(self.first.weight, 0.5, 1.5)
        self.scale = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.inner(x))) * self.scale)


class Convolved(nn.Module):
    """A convolution's kernel is applied again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.first(x.unsqueeze(1)))
        return self.head(torch.tanh(F.conv1d(once, self.first.weight, padding=1)).squeeze(1))


class Attended(nn.Module):
    """Attention's output weight is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([x, x.roll(1, 1), x.square()], 1)
        out, _ = self.first(rows, rows, rows, need_weights=False)
        return self.head((out + F.linear(out, self.first.out_proj.weight)).mean(1))


STRANGE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight": (Functional, "first"),
    "bias": (Penalised, "first"),
    "alias": (Aliased, "first"),
    "kernel": (Convolved, "first"),
    "attention": (Attended, "first.out_proj"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_layer_used_behind_its_back_is_left_out_and_said_so(name: str) -> None:
    factory, strange = STRANGE[name]
    model, rows = build(factory), vectors(1, 9)
    attributor = engine(model)
    found = attributor.scores(rows[:3], rows, strategy="identity", per_layer=True)
    reasons = dict(attributor.coverage.left_out)
    assert REASON in reasons[strange]
    assert strange not in found.per_layer
    assert strange not in attributor.coverage.tracked
    assert attributor.coverage.share < 1
    # The layers that are left are right.
    for layer, values in found.per_layer.items():
        if "proj" in layer:
            continue
        own = list(model.get_submodule(layer).parameters())
        flat = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), own)]) for x, y in rows]
        )
        assert_close(values, flat[:3] @ flat.T, layer, rtol=1e-8)


@pytest.mark.parametrize("name", STRANGE)
def test_a_named_layer_used_behind_its_back_is_an_error(name: str) -> None:
    factory, strange = STRANGE[name]
    rows = vectors(1, 9)
    for call in (lambda a: a.fit(rows), lambda a: a.self_influence(rows, strategy="identity")):
        with pytest.raises(LayerError, match=rf"layer '{strange}': {REASON}.*Leave it out with layers=\.\.\."):
            call(engine(build(factory), layers=[strange, "head"]))
    # The others can be had by name.
    assert engine(build(factory), layers=["head"]).self_influence(rows, strategy="identity").shape == (9,)


@pytest.mark.parametrize("name", STRANGE)
def test_with_fallback_such_parameters_are_tracked_whole(name: str) -> None:
    factory, strange = STRANGE[name]
    model, rows = build(factory), vectors(1, 6)
    attributor = engine(model, fallback=True)
    found = attributor.self_influence(rows, strategy="identity")
    own = list(model.parameters())
    flat = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), own)]) for x, y in rows]
    )
    assert_close(found, flat.square().sum(1), "self-influence", rtol=1e-8)
    assert attributor.coverage.share == 1.0
    assert strange not in attributor.coverage.tracked


# ---------------------------------------------------------------------------------------------- correct models


# These are about gradients of the task's own making, or have layers that are left out for another reason.
RIGHT = [case for case in EMPIRICAL if case.name not in {"transformed_gradients"}]
# This model makes float32 numbers of its own, and so is none of bfloat16.
NOT_NARROW = {"fallback_places_gated"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PAIRS = [(case, dtype) for case in RIGHT for dtype in DTYPES if not (dtype == torch.bfloat16 and case.name in NOT_NARROW)]


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=lambda value: getattr(value, "name", str(value)))
def test_no_correct_layer_is_dropped(case: Case, dtype: torch.dtype) -> None:
    """The cases' floating-point rows are brought to the model's type, as a user of such a model would."""
    model = case.model()
    rows, _ = case.data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model.to(dtype)

    watch(model)

    def collate(some_rows: list) -> Any:
        return convert(case.collate(some_rows), dtype)

    attributor = case.attributor(model, collate=collate)
    attributor.self_influence(rows, strategy="identity", batch_size=5)
    dropped = {name: reason for name, reason in dict(attributor.coverage.left_out).items() if REASON in reason}
    assert not dropped
    assert set(case.tracked) <= set(attributor.coverage.tracked)


def convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: convert(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [convert(item, dtype) for item in value]
    return value


class OnlyBiases(nn.Module):
    """Attention of which only biases are trained. Those of the keys change no attention: their gradient is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([x, x.roll(1, -1)], -1).unsqueeze(1) * torch.linspace(-2, 2, 6, dtype=x.dtype)[:, None]
        weights = (self.q(rows) @ self.k(rows).mT / 8**0.5).softmax(-1)
        return self.head(torch.tanh(weights @ self.v(rows)).mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_rounding_alone_is_no_reason(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = OnlyBiases().to(dtype)
    rows = [(x.to(dtype), y) for x, y in vectors(1, 9)]
    attributor = engine(model)
    attributor.self_influence(rows, strategy="identity")
    assert set(attributor.coverage.tracked) == {"q", "k", "v", "head"}
    engine(model, layers=["k", "head"]).self_influence(rows, strategy="identity")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_rows_whose_gradients_cancel_are_no_reason(dtype: torch.dtype) -> None:
    """The look takes the sum over two rows: here the same inputs with either label, for a model that cannot tell."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].bias[1] += (model[2](model[1](model[0](torch.ones(1, 4))))[0] @ torch.tensor([1.0, -1.0])).item()
    model = model.to(dtype)
    x = torch.ones(4, dtype=dtype)
    rows = [(x, torch.tensor(0)), (x, torch.tensor(1)), *((a.to(dtype), b % 2) for a, b in vectors(1, 5))]
    attributor = engine(model)
    attributor.self_influence(rows, strategy="identity")
    assert set(attributor.coverage.tracked) == {"0", "2"}


WIDE = [(dtype, scale) for dtype in (torch.float64, torch.float32, torch.bfloat16) for scale in (1e-9, 1e-5, 1.0, 1e4, 1e12)]


@pytest.mark.parametrize(("dtype", "scale"), [*WIDE, *((torch.float16, scale) for scale in (1e-9, 1e-5, 1.0))], ids=str)
def test_the_size_of_gradients_is_no_reason(dtype: torch.dtype, scale: float) -> None:
    """Also not where float16's range ends: the engine scales the loss there, so must the check."""

    class Shrunk(Classification):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) * scale

    torch.manual_seed(0)
    model = mlp().to(dtype)
    rows = [(x.to(dtype), y) for x, y in vectors(1, 9)]
    attributor = whence.Attributor(model, Shrunk(), device="cpu", progress=False)
    attributor.self_influence(rows, strategy="identity")
    assert set(attributor.coverage.tracked) == {"0", "2", "4"}


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"precision": "float16"}, {"offload": True}], ids=str)
def test_half_precision_and_offloading_are_no_reason(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ConvNet(6, groups=2)
    generator = torch.Generator().manual_seed(3)
    rows = list(zip(torch.randn(9, 4, 5, 6, generator=generator), torch.arange(9) % 3, strict=True))
    attributor = engine(model, **options)
    attributor.self_influence(rows, strategy="identity")
    assert set(attributor.coverage.tracked) == {"conv", "head"}


def test_moments_and_unused_layers_are_no_reason() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.used(x)))

    model = build(Idle)
    moments = {name: torch.rand_like(p) + 0.1 for name, p in model.named_parameters()}
    attributor = engine(model, second_moments=moments)
    attributor.self_influence(vectors(1, 9), strategy="identity")
    assert set(attributor.coverage.tracked) == {"used", "head"}
    assert "reached by no gradient" in dict(attributor.coverage.left_out)["idle"]


# --------------------------------------------------------------------------------------------------------- looked at once


def test_a_model_is_looked_at_once_until_its_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = survey.strange_layers
    monkeypatch.setattr(survey, "strange_layers", lambda *args, **options: looks.append(1) or look(*args, **options))  # type: ignore[func-returns-value]
    model, rows = build(Functional), vectors(0, 6)
    attributor = engine(model)
    first, again = (attributor.scores(rows[:count], rows, strategy="identity", per_layer=True) for count in (2, 3))
    assert "first" not in {**first.per_layer, **again.per_layer}
    assert len(looks) == 1
    before = model.head.bias.detach().clone()
    with torch.no_grad():
        model.head.bias += 1
    attributor.scores(rows[:2], rows, strategy="identity")
    assert len(looks) == 2
    with torch.no_grad():
        model.head.bias.copy_(before)
