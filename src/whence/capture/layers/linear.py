"""nn.Linear, its subclasses, and the `Conv1D` of Hugging Face's GPT-2, which is a Linear with a transposed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import LayerParts, register


def _positions(x: Tensor) -> Tensor:
    """`[row, ..., feature]` -> `[row, position, 1, feature]`."""
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


@register(nn.Linear)
class Linear:
    """Every axis between the first and the last is a position."""

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[out, in]`."""
        out, in_ = module.weight.shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`[row, ..., in]` -> `[row, position, 1, in]`."""
        return _positions(x)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, ..., out]` -> `[row, position, 1, out]`."""
        return _positions(g)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        return F.linear(x, module.weight, module.bias)


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """Hugging Face's `Conv1D`, weight `[in, out]`."""

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[in, out]`."""
        in_, out = module.weight.shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W + b`."""
        return torch.matmul(x, module.weight) + module.bias
