"""The tiny models of the cases. Sizes differ from each other, so that a transposed or swapped axis shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def mlp(*, bias: bool = True, last: int = 3) -> nn.Sequential:
    """Three layers, 4-6-5-last."""
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, last, bias=bias))


class MeanPooled(nn.Module):
    """A layer on `[batch, ..., 4]`, averaged over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).flatten(1, -2).mean(1))


class Reused(nn.Module):
    """One layer applied three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        for _ in range(3):
            x = torch.sin(2.0 * self.again(x)) + 0.5 * x
        return self.head(x)


class ReusedUnevenly(nn.Module):
    """One layer applied to seven positions, then to their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.again(x)).mean(1))))


class TwoNames(nn.Module):
    """The same module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.sigmoid(self.first(x)))))


class Tied(nn.Module):
    """Two modules with one weight and one bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.sin(2.0 * self.first(x)))))


class NamedLinear(nn.Linear):
    """A subclass as other libraries make them."""

    purpose = "none"


def subclassed() -> nn.Sequential:
    """A network of Linear subclasses, torch's own one among them."""
    own = nn.modules.linear.NonDynamicallyQuantizableLinear(6, 3)
    return nn.Sequential(NamedLinear(4, 6), nn.Tanh(), own)


class KeywordCall(nn.Module):
    """Layers called as `layer(input=x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.tanh(self.inner(input=x)))


def in_place_relu() -> nn.Sequential:
    """The activation overwrites the layer's output."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


class InPlaceView(nn.Module):
    """Part of a layer's output is overwritten through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x[:, :2].mul_(0.5)
        x[:, 3].tanh_()
        return self.head(torch.tanh(x))


class InPlaceInput(nn.Module):
    """A layer's input is overwritten after the layer has used it: what the layer saw is gone by the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x)) * 1.0
        x.add_(torch.tanh(self.inner(x)))
        return self.head(x)


class TransposedWeights(nn.Module):
    """Hugging Face's Conv1D on seven positions."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.inner, self.head = Conv1D(6, 4), Conv1D(3, 6)
        with torch.no_grad():
            self.inner.weight.mul_(20.0)
            self.head.weight.mul_(20.0)
            self.inner.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(1))


class Blocks(nn.Module):
    """Two residual blocks of two layers each, recomputed in the backward pass if `checkpointed`."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.enter, self.checkpointed = nn.Linear(4, 5), checkpointed
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(5, 6), "down": nn.Linear(6, 5)}) for _ in range(2))
        self.head = nn.Linear(5, 3)

    def block(self, layers: nn.ModuleDict, x: Tensor) -> Tensor:
        return x + layers["down"](torch.tanh(layers["up"](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        for layers in self.blocks:
            x = checkpoint(self.block, layers, x, use_reentrant=False) if self.checkpointed else self.block(layers, x)
        # Without this the gradients of the residual stream would span two dimensions only (three classes), and EKFAC be ambiguous.
        return self.head(torch.tanh(x))


def partly_frozen() -> Blocks:
    """Blocks with their entry and the first block frozen."""
    model = Blocks()
    for part in (model.enter, model.blocks[0]):
        part.requires_grad_(False)
    return model


def half_frozen() -> nn.Sequential:
    """The weight of the first layer is frozen, the bias of the second."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def with_hooks() -> nn.Sequential:
    """Its owner's hooks change what goes into a layer and what comes out: a steering vector, a scale."""
    model = mlp()
    model[2].register_forward_pre_hook(lambda _, args: (args[0] + 0.3,))
    model[2].register_forward_hook(lambda _module, _args, output: 1.7 * output + 0.1)
    return model


class Attention(nn.Module):
    """torch's own encoder layer, whose attention calls none of its projections as modules, and positions shared by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Linear(3, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=x.dtype)
        table = torch.stack([steps, steps.sin(), steps.cos()], dim=-1)
        return self.head(torch.tanh(self.block(x + self.places(table.unsqueeze(0))).mean(1)))


class Choices(nn.Module):
    """A batch `[batch, 4, 2, 5]`, four choices of two positions, scored as one flat batch of `4 * batch`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.head(torch.tanh(self.inner(flat)).sum(1)).view(-1, x.shape[1])


class PerPosition(nn.Module):
    """A network that treats every position alone: `[..., 4] -> [..., 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)))


class MaskedPool(nn.Module):
    """Two layers at each position, a masked mean, and a layer on the mean: what fills the padding cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.deeper, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.deeper(torch.tanh(self.inner(x)))) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class TwoStreams(nn.Module):
    """Source and target of different lengths, each with its own padding."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.head = MaskedPool(), MaskedPool(), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        return self.head(torch.cat([self.source(x, mask), self.target(y, y_mask)], dim=-1))


class LookAhead(nn.Module):
    """A layer used once without and once with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hint = torch.tanh(self.inner(x))
        return self.head(torch.tanh(self.inner(x + hint)))


class Gated(nn.Module):
    """A branch that runs only if some row of the batch opens the gate (first feature positive)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.branch, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        if bool((x[:, 0] > 0).any()):
            hidden = hidden + torch.tanh(self.branch(x))
        return self.head(hidden)


class TwoHeads(nn.Module):
    """A trunk with two heads; `head` alone, or both, may be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.head(hidden), self.other(hidden)], dim=-1) if both else self.head(hidden)
