"""From a gradient of all tracked parameters to k numbers: a sparse random projection that is never a matrix, or all numbers.

`"random"` shares the k numbers out into four parts and adds each coordinate to one number of every part, with random signs; all is
halved. That is the sparse Johnson-Lindenstrauss transform of Kane and Nelson ("Sparser Johnson-Lindenstrauss transforms", 2014).
Inner products are right on average, with a variance of at most `(|x|^2 |y|^2 + <x, y>^2) / k`, that of a dense matrix of signs,
and the length of a gradient with one coordinate is kept exactly. A layer's coordinates are cut into blocks as long as a part, and
each block goes to the part in a random order, so that no two of its coordinates meet. Orders and signs are functions of (seed, layer
name, part, block) alone, made by a counter-based generator on the CPU: the same on every device, in every batch and in every run.
They take 20 bytes per tracked parameter, where the matrix would take 4 k.

`"pca"` is made of a wider random one: see `whence.refit.principal`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.errors import ConfigError
from whence.runtime.noise import KeyedNoise

Kind = Literal["random", "pca", "none"]
Shapes = Mapping[str, tuple[int, int, int]]

PARTS = 4
"""Numbers that each coordinate is added to, where there are so many."""

_TOGETHER = 4096
"""Blocks whose orders and signs come from one stream of random numbers."""

WIDER = 4
"""How many times as many random directions `"pca"` chooses from."""

LARGEST_WHOLE = 2**16
"""Numbers of a row with `"none"`, at most."""


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """How gradients become rows of k numbers.

    Attributes:
        projection: `"random"`, `"pca"` (the leading directions of the training rows' gradients) or `"none"` (all coordinates).
        dimension: k; `"none"` has as many as there are parameters.
        seed: of the random directions.

    Raises:
        ConfigError: one of them cannot be used.
    """

    projection: Kind = "random"
    dimension: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projection not in get_args(Kind):
            raise ConfigError(f"projection={self.projection!r} is not known; choose from {', '.join(map(repr, get_args(Kind)))}.")
        for name, least in (("dimension", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} cannot be used; give a whole number of {least} or more.")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what has no effect is left out."""
        return {"projection": "none"} if self.projection == "none" else asdict(self)


class Projector(Protocol):
    """Adds a layer's gradients to rows."""

    @property
    def dimension(self) -> int:
        """Numbers of a row."""
        ...

    def add(self, into: Tensor, layer: str, gradients: Tensor) -> None:
        """Add gradients `[row, group, out, in]` of a layer to `into` `[row, dimension]`."""
        ...


def projector(options: ProjectionOptions, shapes: Shapes, device: torch.device) -> Projector:
    """Return what makes the rows that are computed: for `"pca"` those that its directions are chosen from.

    Args:
        options: the choice.
        shapes: `[group, out, in]` of every layer; their order is that of the coordinates of `"none"`.
        device: where gradients are.

    Raises:
        ConfigError: `"none"` with too many parameters.
    """
    parameters = sum(map(math.prod, shapes.values()))
    if options.projection == "none":
        if parameters > LARGEST_WHOLE:
            raise ConfigError(
                f"projection='none' keeps all of {parameters} numbers for every row; at most {LARGEST_WHOLE} are allowed. "
                "Use projection='random' or 'pca', or track fewer layers with layers=..."
            )
        return Whole.make(shapes)
    wide = options.dimension * (WIDER if options.projection == "pca" else 1)
    return Signs(dimension=wide, seed=options.seed, device=device)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """All coordinates, layer after layer; `starts`: where each layer's begin."""

    starts: Mapping[str, int]
    dimension: int

    @classmethod
    def make(cls, shapes: Shapes) -> Whole:
        """Lay the layers out in their order."""
        starts, end = {}, 0
        for name, shape in shapes.items():
            starts[name] = end
            end += math.prod(shape)
        return cls(starts=starts, dimension=end)

    def add(self, into: Tensor, layer: str, gradients: Tensor) -> None:
        """Add a layer's gradients in their place."""
        flat = gradients.flatten(1)
        into[:, self.starts[layer] : self.starts[layer] + flat.shape[1]] += flat


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The sparse random projection; `maps` keeps what was drawn for each layer."""

    dimension: int
    seed: int
    device: torch.device
    maps: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, into: Tensor, layer: str, gradients: Tensor) -> None:
        """Add a layer's projected gradients."""
        flat = gradients.flatten(1).T.contiguous()
        key = layer, len(flat)
        if key not in self.maps:
            self.maps[key] = tuple(drawn.to(self.device) for drawn in signs_of(layer, len(flat), self.dimension, self.seed))  # type: ignore[assignment]
        places, signs = self.maps[key]
        # Sums of signed rows of a table, in a fixed order: no atomic additions on a GPU.
        sums = F.embedding_bag(places, flat, mode="sum", per_sample_weights=signs.to(flat))
        into += sums.T / math.sqrt(min(PARTS, self.dimension))


def signs_of(layer: str, numbers: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return which coordinates each of the k numbers is a sum of, int32 `[k, block]`, and with which signs, int8 alike.

    A sign is 0 where a block has no coordinate for the number.
    """
    most = -(-numbers // max(1, dimension // PARTS))
    parts = torch.arange(dimension).tensor_split(min(PARTS, dimension))
    drawn = [_part(layer, part, len(own), most, seed) for part, own in enumerate(parts)]
    places, signs = (torch.cat(found) for found in zip(*drawn, strict=True))
    there = places < numbers
    return torch.where(there, places, 0).to(torch.int32), signs * there


def _part(layer: str, part: int, length: int, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return places `[number of the part, block]` and signs, drawn for many blocks at a time."""
    stream = int.from_bytes(hashlib.sha256(f"{part} {layer}".encode()).digest()[:8], "big")
    places, signs = [], []
    for group, first in enumerate(range(0, blocks, _TOGETHER)):
        several = min(_TOGETHER, blocks - first)
        noise = KeyedNoise(seed=seed, stream=stream, ids=[group], device="cpu")
        order = noise.uniform(several, length)[0].argsort(dim=1, stable=True)
        places.append((order + torch.arange(first, first + several).unsqueeze(1) * length).T)
        signs.append(torch.where(noise.uniform(several, length)[0].T < 0.5, -1, 1).to(torch.int8))
    return torch.cat(places, dim=1), torch.cat(signs, dim=1)
