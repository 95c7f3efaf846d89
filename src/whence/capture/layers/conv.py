"""nn.Conv1d, nn.Conv2d and nn.Conv3d: patches are positions, groups are groups."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import Handler, LayerParts, register

AnyConv = nn.Conv1d | nn.Conv2d | nn.Conv3d


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Convolution(Handler):
    """Any stride, padding, padding mode, dilation and number of groups."""

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[out, in / groups, *kernel]`; `in` counts a whole patch."""
        conv = cast(AnyConv, module)
        out, patch = conv.weight.shape[0], conv.weight[0].numel()
        return LayerParts(groups=conv.groups, inputs=patch, outputs=out // conv.groups)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`[row, channel, *space]` -> `[row, patch, group, in]`; features ordered as in the flattened weight."""
        conv = cast(AnyConv, module)
        patches, axes = self._padded(conv, x), len(conv.kernel_size)
        for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
            # A view: windows along the axis, then every `dilation`-th element of each.
            patches = patches.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # [row, channel, *places, *kernel] -> [row, *places, channel, *kernel]
        places, kernel = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
        patches = patches.permute(0, *places, 1, *kernel)
        # Copied here, with the kernel innermost.
        return patches.reshape(len(x), -1, conv.groups, conv.weight[0].numel())

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, channel, *space]` -> `[row, patch, group, out]`."""
        return g.flatten(2).unflatten(1, (cast(AnyConv, module).groups, -1)).permute(0, 3, 1, 2)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """The convolution of its class."""
        conv = cast(AnyConv, module)
        function = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]
        return function(self._padded(conv, x), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    @staticmethod
    def _padded(conv: AnyConv, x: Tensor) -> Tensor:
        # Holds (left, right, top, bottom, ...), also for padding="same" and "valid".
        amounts = conv._reversed_padding_repeated_twice
        if not any(amounts):
            return x
        return F.pad(x, amounts, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
