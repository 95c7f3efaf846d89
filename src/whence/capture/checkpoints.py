"""Gradient checkpointing of the older, reentrant kind, which can hide layers from the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set

from torch.utils.checkpoint import CheckpointFunction

from whence.errors import LayerError


def in_reentrant_checkpoint() -> bool:
    """Whether a caller is the first, gradient-free run of `torch.utils.checkpoint` with `use_reentrant=True`."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def refuse_checkpointed(muted: Mapping[str, bool], finished: Set[str]) -> None:
    """Raise if a reentrant checkpoint hid a layer: it gives gradients only where its input needs one.

    Args:
        muted: layers that were called without gradients, and whether in such a checkpoint.
        finished: layers that a gradient came to all the same.

    Raises:
        LayerError: a layer of the first kind is not among the second.
    """
    for name, reentrant in muted.items():
        if reentrant and name not in finished:
            raise LayerError(
                f"layer {name!r} lies in a checkpoint with use_reentrant=True whose input needs no gradient, so none comes to it. "
                "Use torch.utils.checkpoint with use_reentrant=False (Hugging Face: gradient_checkpointing_kwargs)."
            )
