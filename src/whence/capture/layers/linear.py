"""nn.Linear, its subclasses, and the `Conv1D` of Hugging Face's GPT-2, which is a Linear with a transposed weight."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import Handler, LayerParts, register


def positions(x: Tensor) -> Tensor:
    """`[row, ..., feature]` -> `[row, position, 1, feature]`."""
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


def weight_of(module: nn.Module) -> Tensor:
    """Return the module's weight."""
    return cast(Tensor, module.weight)


@register(nn.Linear)
class Linear(Handler):
    """Every axis between the first and the last is a position."""

    plain = True

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[out, in]`."""
        out, in_ = weight_of(module).shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`[row, ..., in]` -> `[row, position, 1, in]`."""
        return positions(x)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, ..., out]` -> `[row, position, 1, out]`."""
        return positions(g)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        return F.linear(x, weight_of(module), cast(Tensor | None, module.bias))


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """Hugging Face's `Conv1D`, weight `[in, out]`."""

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[in, out]`."""
        in_, out = weight_of(module).shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W + b`."""
        return x @ weight_of(module) + cast(Tensor, module.bias)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """`[in, out]` -> `[1, out, in]`."""
        return weight.mT.unsqueeze(0)


class TiedHead(Linear):
    """An output head that shares its weight `[token, feature]` with an embedding.

    In the embedding's layout, `in` counts tokens and `out` features, the head's inputs and output gradients are exchanged.
    """

    plain = False

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes as of the embedding."""
        tokens, features = weight_of(module).shape
        return LayerParts(groups=1, inputs=tokens, outputs=features)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """`[token, feature]` -> `[1, feature, token]`."""
        return weight.mT.unsqueeze(0)


class HeadBias(Linear):
    """The bias of a tied head, alone: its inputs are the column of ones and nothing else."""

    plain = False

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """No inputs, `[row, position, 1, 0]`."""
        return positions(x)[..., :0]
