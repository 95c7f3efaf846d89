"""Models that the peer gets wrong or refuses, and the truth: batch-of-one autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from support.models import Case, cross_entropy, vectors

TRAIN, QUERIES, CLASSES = 21, 5, 4


class Reused(nn.Module):
    """One Linear called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.body(torch.tanh(self.body(x)))))


class TwoNames(Reused):
    """One Linear registered under two names, each of them called."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.body

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.again(torch.tanh(self.body(x)))))


class Keyword(Reused):
    """A Linear called with a keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(input=x)))


class NamedLinear(nn.Linear):
    """A subclass that computes what its parent does, as quantisation and parallelism libraries make them."""


def subclass() -> nn.Module:
    """A subclass of Linear among plain ones."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), NamedLinear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def huggingface_conv1d() -> nn.Module:
    """GPT-2's `Conv1D` as it comes, not rewritten."""
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    nn.init.normal_(model[2].weight, std=0.5)
    return model


def convolution(*, kernel: int = 3, **options: Any) -> Callable[[], nn.Module]:
    """A second convolution with the given options, then a Linear head."""
    options = {"padding": 1, **options}

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, kernel, **options),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 25, CLASSES),
        )

    return build


VECTOR, IMAGE = (6,), (3, 5, 5)


@dataclass(frozen=True, kw_only=True)
class Defect:
    """A peculiar layer: how to build the model around it, and an input's shape. Only that layer is tracked."""

    name: str
    build: Callable[[], nn.Module]
    layer: str
    shape: tuple[int, ...]
    shared: bool = False
    """The peer is told that a layer is used more than once."""


DEFECTS = [
    Defect(name="plain Linear", build=Reused, layer="first", shape=VECTOR),
    Defect(name="plain convolution", build=convolution(), layer="2", shape=IMAGE),
    Defect(name="module called twice", build=Reused, layer="body", shape=VECTOR, shared=True),
    Defect(name="module registered twice", build=TwoNames, layer="body", shape=VECTOR, shared=True),
    Defect(name="convolution in 2 groups", build=convolution(groups=2), layer="2", shape=IMAGE),
    Defect(name="depthwise convolution", build=convolution(groups=8), layer="2", shape=IMAGE),
    Defect(name="padding mode reflect", build=convolution(padding_mode="reflect"), layer="2", shape=IMAGE),
    Defect(name="padding mode circular", build=convolution(padding_mode="circular"), layer="2", shape=IMAGE),
    Defect(name="padding mode replicate", build=convolution(padding_mode="replicate"), layer="2", shape=IMAGE),
    Defect(name="padding='same', even kernel", build=convolution(kernel=2, padding="same"), layer="2", shape=IMAGE),
    Defect(name="subclass of Linear", build=subclass, layer="2", shape=VECTOR),
    Defect(name="Linear called by keyword", build=Keyword, layer="first", shape=VECTOR),
    Defect(name="Hugging Face Conv1D, as it is", build=huggingface_conv1d, layer="2", shape=VECTOR),
]


def defect_case(defect: Defect) -> Case:
    """Return the defect's model with data."""
    torch.manual_seed(11)
    return Case(
        name=defect.name,
        model=defect.build().eval(),
        layers=[defect.layer],
        shared=defect.shared,
        loss=cross_entropy,
        measurement=cross_entropy,
        train=vectors(TRAIN, defect.shape, CLASSES, seed=12),
        queries=vectors(QUERIES, defect.shape, CLASSES, seed=13),
    )


def truth(case: Case) -> tuple[Tensor, Tensor]:
    """Return identity scores `[query, train]` and self-influence `[train]`, one example at a time through autograd."""
    model = copy.deepcopy(case.model).double()
    parameters = list(dict.fromkeys(p for name in case.layers for p in model.get_submodule(name).parameters()))
    train = torch.stack([_gradient(model, case, row, parameters) for row in case.train])
    queries = torch.stack([_gradient(model, case, row, parameters) for row in case.queries])
    return queries @ train.T, train.square().sum(1)


def _gradient(model: nn.Module, case: Case, row: tuple[Tensor, int], parameters: list[nn.Parameter]) -> Tensor:
    batch = (row[0].double().unsqueeze(0), torch.tensor([row[1]]))
    loss = case.loss(model, batch).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
