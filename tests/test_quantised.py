"""LoRA adapters on a quantised base: the base is frozen and holds integers, the adapters are tracked as on any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cases
import whence
from compare import assert_close
from whence.tasks import Classification

peft = pytest.importorskip("peft")


class Int8Linear(nn.Linear):
    """Weights as int8 with a scale per row, as quantisation libraries hold them."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, bias=source.bias is not None)
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Int8Linear(nn.Linear(6, 8)), nn.Tanh(), Int8Linear(nn.Linear(8, 5)), nn.Tanh(), nn.Linear(5, 3))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    adapters = peft.get_peft_model(model, config)
    return cases.watch(adapters.double().eval())  # the integers stay integers


def rows() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=generator, dtype=torch.float64), i % 3) for i in range(13)]


def attributor(model: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(model, Classification(), device="cpu", progress=False, **options)


def test_only_adapters_are_tracked_and_their_gradients_are_autograds() -> None:
    model = adapted()
    found = attributor(model).fit(None, strategy="identity")
    assert all("lora" in name for name in found.coverage.tracked)
    assert found.coverage.share == 1.0
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for x, y in rows():
        loss = F.cross_entropy(model(x[None]), torch.tensor([y]))
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    wanted = torch.stack(gradients) @ torch.stack(gradients).T
    assert_close(found.scores(rows(), rows(), batch_size=5).values, wanted, "identity scores", rtol=1e-9)


@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_batches_change_nothing(strategy: str) -> None:
    model = adapted()
    values = []
    for size in (1, 5, 13):
        fitted = attributor(model).fit(rows(), strategy=strategy, batch_size=size)
        values.append(fitted.scores(rows()[:4], rows(), batch_size=size, query_batch_size=size).values)
    assert_close(values[1], values[0], "batches of 5", rtol=1e-9)
    assert_close(values[2], values[0], "one batch", rtol=1e-9)
