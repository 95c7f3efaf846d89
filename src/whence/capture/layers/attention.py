"""nn.MultiheadAttention, which calls none of its projections as modules.

Its four projections become layers of their own, `q_proj`, `k_proj`, `v_proj` and `out_proj`, each like an nn.Linear.
To reach them the module's output is computed once more from its inputs, with every projection in the open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.linear import Linear
from whence.capture.layers.registry import Composite, LayerParts, Part, Tap, register

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Projection(Linear):
    """One projection."""

    def __init__(self, part: str) -> None:
        self.part = part

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the projection's weight."""
        out, in_ = _weight_and_bias(cast(nn.MultiheadAttention, module), self.part)[0].shape
        return LayerParts(groups=1, inputs=in_, outputs=out)

    def share(self, module: nn.Module, packed: Tensor) -> Tensor:
        """Return a projection's third of packed weights or biases."""
        whole = len(packed) == 3 * cast(nn.MultiheadAttention, module).embed_dim
        return packed.chunk(3)[PROJECTIONS.index(self.part)] if whole and self.part in PROJECTIONS else packed


@register(nn.MultiheadAttention)
class MultiheadAttention(Composite):
    """Self and cross attention, with any masks; in eval mode, so without dropout."""

    def against(self, module: nn.Module) -> str | None:
        """Name the options that add keys and values of their own."""
        attention = cast(nn.MultiheadAttention, module)
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            return "attention with bias_k, bias_v or add_zero_attn"
        return None

    def layers(self, module: nn.Module) -> Mapping[str, Part]:
        """The four projections."""
        attention = cast(nn.MultiheadAttention, module)
        parameters: dict[str, nn.Parameter] = dict(attention.named_parameters())
        bias = parameters.get("in_proj_bias")
        weights = {part: parameters.get("in_proj_weight", parameters.get(f"{part}_weight")) for part in PROJECTIONS}
        own = {part: Part(handler=_Projection(part), weight=cast(nn.Parameter, weight), bias=bias) for part, weight in weights.items()}
        out = Part(handler=_Projection("out_proj"), weight=parameters["out_proj.weight"], bias=parameters.get("out_proj.bias"))
        return {**own, "out_proj": out}

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, tap: Tap) -> Any:
        """Return (output, weights) as the module does, through the taps."""
        attention = cast(nn.MultiheadAttention, module)
        given = _arguments(*args, **kwargs)
        inputs: list[Tensor] = [given["query"], given["key"], given["value"]]
        swap = not attention.batch_first and inputs[0].dim() == 3
        if swap:
            inputs = _swapped(inputs)
        projected = [tap(part, x, F.linear(x, *_weight_and_bias(attention, part))) for part, x in zip(PROJECTIONS, inputs, strict=True)]
        q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2) for x in projected)
        logits = q @ k.mT / math.sqrt(q.shape[-1]) + _bias(attention, given, q)
        weights = logits.softmax(-1)
        context = (weights @ v).transpose(-3, -2).flatten(-2)
        result = tap("out_proj", context, F.linear(context, *_weight_and_bias(attention, "out_proj")))
        result = result.transpose(0, 1) if swap else result
        if not given["need_weights"]:
            return result, None
        return result, weights.mean(-3) if given["average_attn_weights"] else weights


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> dict[str, Any]:
    """Return the arguments of `nn.MultiheadAttention.forward` by name; `is_causal` is a hint and says nothing more."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "average_attn_weights": average_attn_weights,
    }


def _swapped(inputs: list[Tensor]) -> list[Tensor]:
    """Bring the batch's axis to the front; equal inputs stay the same object."""
    turned = {id(x): x.transpose(0, 1) for x in inputs}
    return [turned[id(x)] for x in inputs]


def _weight_and_bias(attention: nn.MultiheadAttention, part: str) -> tuple[Tensor, Tensor | None]:
    if part == "out_proj":
        return attention.out_proj.weight, attention.out_proj.bias
    place = PROJECTIONS.index(part)
    bias = attention.in_proj_bias
    own_bias = None if bias is None else bias.chunk(3)[place]
    packed = cast(Tensor | None, attention.in_proj_weight)
    return getattr(attention, f"{part}_weight") if packed is None else packed.chunk(3)[place], own_bias


def _bias(attention: nn.MultiheadAttention, given: Mapping[str, Any], q: Tensor) -> Tensor:
    """What is added to the logits `[..., head, query, key]`: masks of booleans become minus infinity."""
    total = q.new_zeros(())
    if (mask := given["attn_mask"]) is not None:
        mask = mask if mask.dim() == 2 or q.dim() == 3 else mask.unflatten(0, (-1, attention.num_heads))
        total = total + _additive(mask, q)
    if (padding := given["key_padding_mask"]) is not None:
        total = total + _additive(padding, q)[..., None, None, :]
    return total


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
    return mask.to(q)
