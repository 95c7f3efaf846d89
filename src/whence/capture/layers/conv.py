"""nn.Conv2d: patches are positions, groups are groups."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import LayerParts, register


@register(nn.Conv2d)
class Conv2d:
    """Any stride, padding, padding mode, dilation and number of groups."""

    plain = False

    def parts(self, module: nn.Conv2d) -> LayerParts:
        """Sizes from the weight `[out, in / groups, height, width]`; `in` counts a whole patch."""
        out, channels, height, width = module.weight.shape
        return LayerParts(groups=module.groups, inputs=channels * height * width, outputs=out // module.groups)

    def inputs(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        """`[row, channel, y, x]` -> `[row, patch, group, in]`; features ordered as in the flattened weight."""
        patches = F.unfold(self._padded(module, x), module.kernel_size, dilation=module.dilation, stride=module.stride)
        # unfold orders its features channel first, so one group's channels stand together.
        return patches.unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2)

    def gradients(self, module: nn.Conv2d, g: Tensor) -> Tensor:
        """`[row, channel, y, x]` -> `[row, patch, group, out]`."""
        return g.flatten(2).unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2)

    def forward(self, module: nn.Conv2d, x: Tensor) -> Tensor:
        """The convolution of nn.Conv2d."""
        return F.conv2d(self._padded(module, x), module.weight, module.bias, module.stride, 0, module.dilation, module.groups)

    @staticmethod
    def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
        # Holds (left, right, top, bottom), also for padding="same" and "valid".
        amounts = module._reversed_padding_repeated_twice
        if not any(amounts):
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, amounts, mode=mode)
