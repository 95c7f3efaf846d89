"""Numbers of an index on disk: float32, bfloat16, or int8 with a scale for each vector."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from whence.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "int8"]
BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
_LARGEST = 127


def check_dtype(dtype: str) -> None:
    """Refuse a type that rows cannot be stored in.

    Raises:
        ConfigError: it is none of the three.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype={dtype!r} is not known; choose from {', '.join(map(repr, get_args(Dtype)))}.")


def encode(vectors: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """Return vectors `[..., n]` in the type, and what to multiply them with to have them back, float32 `[...]`.

    int8 rounds to the nearest of 255 steps between minus and plus the vector's largest number.
    """
    ones = torch.ones(vectors.shape[:-1], dtype=torch.float32, device=vectors.device)
    if dtype != "int8":
        return vectors.to(getattr(torch, dtype)), ones
    scale = vectors.abs().amax(-1).float() / _LARGEST
    steps = vectors / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return steps.round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale
