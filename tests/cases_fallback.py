"""Cases with parameters that no handler knows, and a model of everything at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import case_tasks as t
from case import Case, simple
from case_data import collate_padded, integer, labelled, sequences
from cases_attention import four, unlike
from cases_norm import spread

WORDS = 6


class Places(nn.Module):
    """A class token and learned positions, as a vision transformer has; the block is recomputed if `checkpointed`."""

    def __init__(self, *, checkpointed: bool = False, in_place: bool = False) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.checkpointed, self.in_place = checkpointed, in_place

    def block(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        if self.in_place:
            x.mul_(1.5).add_(self.places).sin_()
        else:
            x = torch.sin(x + self.places)
        return x + torch.tanh(self.mix(x.cumsum(1)))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(torch.tanh(x[:, 0] + x[:, 3] * x[:, 5]))


class Remembering(nn.Module):
    """An LSTM between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.memory, self.head = nn.Linear(4, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(torch.tanh(self.enter(x)))[0][:, -1])


class Upsampled(nn.Module):
    """A transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(x)).mean((2, 3)))


class Bilinear(nn.Module):
    """A bilinear layer of a vector with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cross, self.head = nn.Bilinear(4, 4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.cross(x, x.sin())))


class Scale(nn.Module):
    """A learned scale, a module of its own."""

    def __init__(self, like: Scale | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 + torch.rand(4)) if like is None else like.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledPool(nn.Module):
    """Two modules that share one scale, on padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scale()
        self.second, self.inner, self.head = Scale(self.first), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.second(self.inner(torch.sin(self.first(x))))) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class GatedPlaces(Places):
    """The positions are met a second time by rows whose first number is positive."""

    def block(self, x: Tensor) -> Tensor:
        shut = (x[:, 0, 0] < 0).view(-1, 1, 1)
        return super().block(torch.where(shut, x.sin(), x) + torch.where(shut, 0.0, 1.0) * self.places[:, 1:])


class Everything(nn.Module):
    """Words into a strip, a convolution, two norms, an attention, a table of places, a gated memory and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 4, padding_idx=1), nn.Parameter(0.3 * torch.randn(5, 4))
        self.strip, self.group = nn.Conv1d(4, 4, 3, padding=1, groups=2), spread(nn.GroupNorm(2, 4))
        self.attn, self.norm = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), spread(nn.LayerNorm(4))
        self.up, self.down, self.last = nn.Linear(4, 5), nn.Linear(5, 4, bias=False), spread(nn.RMSNorm(4))
        self.memory = nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, WORDS)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        x = x + torch.tanh(self.group(self.strip(x.mT))).mT
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.down(torch.tanh(self.up(self.last(x))))
        return self.head(torch.tanh(x) + self.memory(x)[0])


def continued(generator: torch.Generator, count: int) -> list:
    """Rows of five words and the word that follows each."""
    return [(row[:-1], row[1:]) for row in (integer(generator, WORDS, 6) for _ in range(count))]


def frozen_places() -> Places:
    """The positions are frozen, the class token is not."""
    model = Places()
    model.places.requires_grad_(False)
    return model


def bare(name: str, factory: Any, tracked: str, **options: Any) -> Case:
    """A case with `fallback=True`."""
    return simple(f"fallback_{name}", factory, tracked, fallback=True, **options)


five, images = partial(labelled, shape=(5, 4)), partial(labelled, shape=(4, 3, 2))
LSTM = "memory.weight_ih_l0 memory.weight_hh_l0 memory.bias_ih_l0 memory.bias_hh_l0"
GRU = LSTM
FALLBACK = [
    bare("places", Places, "token places mix head", rows=five),
    bare("places_in_place", partial(Places, in_place=True), "token places mix head", rows=five),
    bare("places_checkpointed", partial(Places, checkpointed=True), "token places mix head", rows=five),
    bare("places_gated", GatedPlaces, "token places mix head", rows=five),
    bare("places_frozen", frozen_places, "token mix head", rows=five),
    bare("memory", Remembering, f"enter {LSTM} head", rows=five),
    bare("upsampled", Upsampled, "up.weight up.bias head", rows=images),
    bare("bilinear", Bilinear, "cross.weight cross.bias head"),
    bare(
        "shared_scale",
        ScaledPool,
        "first.scale inner head",
        rows=sequences,
        task=partial(t.PaddedTask, inputs="inputs", labels="labels", measurement="margin"),
        collate=collate_padded,
    ),
]
MIXED = [
    simple(
        "everything",
        Everything,
        f"places words strip group {four('attn')} norm up down last {GRU} head",
        rows=continued,
        task=t.Classification,
        layers="all",
        fallback=True,
    ),
    simple(
        "everything_without_fallback",
        Everything,
        f"words strip group {four('attn')} norm up down last head",
        rows=continued,
        task=t.Classification,
        layers="all",
    ),
]
