"""Numbers of an index on disk: float32, bfloat16, or whole numbers of 8 or 4 bits with a scale for each vector."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from whence.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
_LARGEST: dict[Dtype, int] = {"int8": 127, "int4": 7}
_CLIPS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Where 4 bits may cut off a vector's largest numbers, as shares of the largest: its steps are finer then."""


def check_dtype(dtype: str) -> None:
    """Refuse a type that rows cannot be stored in.

    Raises:
        ConfigError: it is none of the four.
    """
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype={dtype!r} is not known; choose from 'auto', {', '.join(map(repr, get_args(Dtype)))}.")


def vector_bytes(numbers: int, dtype: Dtype) -> int:
    """Return the bytes of a vector, without its scale."""
    return {"float32": 4 * numbers, "bfloat16": 2 * numbers, "int8": numbers, "int4": (numbers + 1) // 2}[dtype]


def numbers_in(size: int, dtype: Dtype) -> int:
    """Return how many numbers a vector of so many bytes has at most."""
    return {"float32": size // 4, "bfloat16": size // 2, "int8": size, "int4": 2 * size}[dtype]


def encode(vectors: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor]:
    """Return vectors `[..., n]` in the type, and what to multiply them with to have them back, float32 `[...]`.

    int8 rounds to the nearest of 255 steps between minus and plus the vector's largest number. int4 has 15 steps, between the
    bounds that lose least, and puts two numbers into a byte: `[..., (n + 1) // 2]`, the first one in the low half.
    """
    if dtype not in _LARGEST:
        return vectors.to(getattr(torch, dtype)), torch.ones(vectors.shape[:-1], dtype=torch.float32, device=vectors.device)
    largest = _LARGEST[dtype]
    scale = vectors.abs().amax(-1).float() / largest if vectors.shape[-1] else torch.zeros(vectors.shape[:-1], device=vectors.device)
    if dtype == "int8":
        return _steps(vectors, scale, largest), scale
    scale = _least_loss(vectors, scale, largest)
    return _packed(_steps(vectors, scale, largest)), scale


def decode(values: Tensor, dtype: Dtype, numbers: int) -> Tensor:
    """Return encoded vectors as float32 `[..., numbers]`, still to be multiplied with their scales."""
    if dtype != "int4":
        return values.float()
    # Both halves at once: a nibble's 16 patterns stand for -8 to 7.
    halves = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)[..., :numbers]
    return halves.float().sub_(8)


def _steps(vectors: Tensor, scale: Tensor, largest: int) -> Tensor:
    steps = vectors / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return steps.round().clamp(-largest, largest).to(torch.int8)


def _least_loss(vectors: Tensor, scale: Tensor, largest: int) -> Tensor:
    """Return, of each vector's scales at every bound, the one with the least squared error."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for clip in _CLIPS:
        tried = scale * clip
        error = (_steps(vectors, tried, largest) * tried.unsqueeze(-1) - vectors).square().sum(-1).float()
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _packed(steps: Tensor) -> Tensor:
    even = torch.nn.functional.pad(steps, (0, steps.shape[-1] % 2)) + 8
    low, high = even.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)
