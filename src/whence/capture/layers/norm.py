"""Normalisations with a weight per feature: one group per feature, whose input is the normalised input."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import Handler, LayerParts, register


class Normalisation(Handler):
    """What all have in common: weight and bias are applied feature by feature to `normalised(module, x)`."""

    def parts(self, module: nn.Module) -> LayerParts:
        """One group per feature, of one input and one output."""
        return LayerParts(groups=cast(Tensor, module.weight).numel(), inputs=1, outputs=1)

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the input to weight and bias, of the shape of `x`."""
        raise NotImplementedError

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """`x` -> `[row, position, feature, 1]`."""
        return self.gradients(module, self.normalised(module, x))

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, ..., *features]` -> `[row, position, feature, 1]`."""
        return g.reshape(g.shape[0], -1, cast(Tensor, module.weight).numel(), 1)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Normalised, weighed and shifted."""
        result = self.normalised(module, x) * cast(Tensor, module.weight)
        bias = cast(Tensor | None, getattr(module, "bias", None))
        return result if bias is None else result + bias


@register(nn.LayerNorm)
class LayerNorm(Normalisation):
    """Over the last axes."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the last axes."""
        norm = cast(nn.LayerNorm, module)
        return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)


@register(nn.RMSNorm)
class RMSNorm(Normalisation):
    """Over the last axes, without a mean (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019)."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Mean square 1 over the last axes."""
        norm = cast(nn.RMSNorm, module)
        return F.rms_norm(x, list(norm.normalized_shape), eps=norm.eps)


@register("transformers.models.*RMSNorm", "transformers.models.*T5LayerNorm")
class HuggingFaceRMSNorm(Normalisation):
    """Those of the language models on Hugging Face, which compute in float32 and return the input's type."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Mean square 1 over the last axis."""
        eps = cast(float, getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Weighed; Gemma's weight counts from one."""
        weight = cast(Tensor, module.weight)
        gemma = "gemma" in type(module).__name__.lower()
        return self.normalised(module, x) * (1 + weight if gemma else weight)


class _ChannelNorm(Normalisation):
    """Weights per channel, the second axis."""

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, channel, *space]` -> `[row, position, channel, 1]`."""
        return g.reshape(g.shape[0], g.shape[1], -1, 1).transpose(1, 2)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Normalised, weighed and shifted along the second axis."""
        shape = (-1, *[1] * (x.dim() - 2))
        result = self.normalised(module, x) * cast(Tensor, module.weight).view(shape)
        bias = cast(Tensor | None, module.bias)
        return result if bias is None else result + bias.view(shape)


@register(nn.GroupNorm)
class GroupNorm(_ChannelNorm):
    """Over groups of channels."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over each group of channels."""
        norm = cast(nn.GroupNorm, module)
        return F.group_norm(x, norm.num_groups, eps=norm.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(_ChannelNorm):
    """In eval mode, in which it uses running statistics and keeps examples apart."""

    def against(self, module: nn.Module) -> str | None:
        """Name the kind that has no running statistics."""
        return None if cast(nn.BatchNorm2d, module).running_mean is not None else "it normalises over the batch, without running statistics"

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """The running mean taken off, divided by the running deviation."""
        norm = cast(nn.BatchNorm2d, module)
        return F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
