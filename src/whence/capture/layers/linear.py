"""nn.Linear, its subclasses, and the `Conv1D` of Hugging Face's GPT-2, which is a Linear with a transposed weight."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import LayerParts, register


def _positions(x: Tensor) -> Tensor:
    """`[row, ..., feature]` -> `[row, position, 1, feature]`."""
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


@register(nn.Linear)
class Linear:
    """Every axis between the first and the last is a position."""

    plain = True

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[out, in]`."""
        out, in_ = _weight(module).shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`[row, ..., in]` -> `[row, position, 1, in]`."""
        return _positions(x)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, ..., out]` -> `[row, position, 1, out]`."""
        return _positions(g)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        return F.linear(x, _weight(module), cast(Tensor | None, module.bias))


@register("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Linear):
    """Hugging Face's `Conv1D`, weight `[in, out]`."""

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[in, out]`."""
        in_, out = _weight(module).shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x W + b`."""
        return x @ _weight(module) + cast(Tensor, module.bias)
