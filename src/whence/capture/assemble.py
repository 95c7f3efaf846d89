"""From the calls of one layer to what consumers get: masks, token numbers, examples, and several calls in one."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from whence.capture.pair import Pair
from whence.capture.regroup import Regrouping
from whence.capture.sparse import SparsePair
from whence.errors import LayerError
from whence.tasks import Masks


def joined(pairs: list[Pair | SparsePair]) -> Pair | SparsePair:
    """Several calls of one layer are just more positions."""
    if len(pairs) == 1:
        return pairs[0]
    masks, places = _joined_masks(pairs), _joined_places(pairs)
    sparse = [pair for pair in pairs if isinstance(pair, SparsePair)]
    g = torch.cat([pair.g for pair in pairs], dim=2)
    if len(sparse) == len(pairs):
        return SparsePair(torch.cat([pair.ids for pair in sparse], dim=1), g, sparse[0].vocabulary, masks, places)
    dense = [pair for pair in pairs if isinstance(pair, Pair)]
    assert len(dense) == len(pairs), "an embedding that is also a head is written out before it comes here"
    return Pair(a=torch.cat([pair.a for pair in dense], dim=2), g=g, bias=dense[0].bias, mask=masks, places=places)


def _joined_masks(pairs: list[Pair | SparsePair]) -> Tensor | None:
    if all(pair.mask is None for pair in pairs):
        return None
    return torch.cat([_filled(pair, pair.mask, 1).bool() for pair in pairs], dim=1)


def _joined_places(pairs: list[Pair | SparsePair]) -> Tensor | None:
    if all(pair.places is None for pair in pairs):
        return None
    return torch.cat([_filled(pair, pair.places, -1) for pair in pairs], dim=1)


def _filled(pair: Pair | SparsePair, values: Tensor | None, otherwise: int) -> Tensor:
    """Return `[example, position]` values, all the same where the call has none."""
    examples, _, positions, _ = pair.g.shape
    return torch.full((examples, positions), otherwise, device=pair.g.device) if values is None else values


def mask_for(masks: Masks, name: str, shape: torch.Size, call: int = 0) -> Tensor | None:
    """Return the task's mask for a layer with `[row, position]` of the given shape, in the given call of a forward pass.

    Raises:
        LayerError: the mask is of another shape.
    """
    if masks is None:
        return None
    if isinstance(masks, Mapping):
        found = next((m for pattern, m in masks.items() if fnmatchcase(name, pattern)), None)
    else:
        found = masks
    mask = found if found is None or isinstance(found, Tensor) else found[min(call, len(found) - 1)]
    # A layer after pooling has one position a row, and it is a real one.
    if mask is None or (shape[1] == 1 and mask.shape != shape):
        return None
    if mask.shape != shape:
        raise LayerError(
            f"layer {name!r} has {shape[1]} positions in {shape[0]} rows, but padding_mask is {tuple(mask.shape)}. "
            "Return a dict from layer patterns to masks, with none for layers on another axis."
        )
    return mask


def regrouped(regrouping: Regrouping, mask: Tensor | None, positions: int) -> Tensor | None:
    """Return the mask `[example, position]` after gathering rows into examples; None if all are real."""
    real = regrouping.mask(positions)
    if mask is not None:
        return regrouping.gather(mask).bool() & real.to(mask.device)
    return None if real.all() else real


def numbered(real: Tensor) -> Tensor:
    """Number the real positions of each row from 0; -1 elsewhere: `[example, position]`."""
    real = real.bool()
    return torch.where(real, real.long().cumsum(1) - 1, -1)


def token_axis(masks: Masks, data: object) -> tuple[int, Tensor | None] | None:
    """Return the length of the batch's token axis and its mask; None if the batch has no such axis.

    The axis is that of the padding mask; where the task has none, or one per layer, that of the batch's `input_ids`.
    """
    if isinstance(masks, Tensor):
        return masks.shape[1], masks
    if isinstance(data, Mapping) and isinstance(ids := data.get("input_ids"), Tensor) and ids.dim() >= 2:
        mask = data.get("attention_mask") if masks is not None else None
        return ids.shape[-1], mask if isinstance(mask, Tensor) else None
    return None
