"""From the calls of one layer to its pair: masks, examples and several calls in one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from whence.capture.pair import Pair
from whence.capture.regroup import Regrouping
from whence.errors import LayerError


def joined(pairs: list[Pair]) -> Pair:
    """Several calls of one layer are just more positions."""
    mask = None
    if any(pair.mask is not None for pair in pairs):
        mask = torch.cat([_full_mask(pair) for pair in pairs], dim=1)
    return Pair(
        a=torch.cat([pair.a for pair in pairs], dim=2),
        g=torch.cat([pair.g for pair in pairs], dim=2),
        bias=pairs[0].bias,
        mask=mask,
        transform=pairs[0].transform,
    )


def _full_mask(pair: Pair) -> Tensor:
    return pair.a.new_ones(pair.a.shape[0], pair.a.shape[2]).bool() if pair.mask is None else pair.mask.bool()


def mask_for(masks: Tensor | Mapping[str, Tensor] | None, name: str, shape: torch.Size) -> Tensor | None:
    """Return the task's mask for a layer with `[row, position]` of the given shape.

    Raises:
        LayerError: the mask is of another shape.
    """
    if masks is None:
        return None
    if isinstance(masks, Mapping):
        mask = next((m for pattern, m in masks.items() if fnmatchcase(name, pattern)), None)
    else:
        mask = masks
    # A layer after pooling has one position a row, and it is a real one.
    if mask is None or (shape[1] == 1 and mask.shape != shape):
        return None
    if mask.shape != shape:
        raise LayerError(
            f"layer {name!r} has {shape[1]} positions in {shape[0]} rows, but padding_mask is {tuple(mask.shape)}. "
            "Return a dict from layer patterns to masks, with none for layers on another axis."
        )
    return mask


def regrouped(regrouping: Regrouping, a: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gather rows into examples, and mark the places that were filled up."""
    real = regrouping.mask(a.shape[1]).to(a.device)
    if mask is not None:
        mask = regrouping.gather(mask).bool() & real
    elif not real.all():
        mask = real
    return regrouping.gather(a), regrouping.gather(g), mask
