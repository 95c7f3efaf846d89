"""The new kinds of layer under the tasks that bend examples: choices, packed rows, changed gradients, several runs, shut branches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import case_tasks as t
from case import Case, simple
from case_data import collate_groups, collate_packed, gated, groups, integer, labelled, pairs, sequences
from cases_attention import four, unlike
from cases_norm import spread
from whence.tasks import Classification

WORDS = 6


class WordChoices(nn.Module):
    """Four choices of three words each, `[batch, 4, 3]`, scored as one flat batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, 4), spread(nn.LayerNorm(4))
        self.attn, self.head = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids.flatten(0, 1)))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(x).sum(1)).view(-1, ids.shape[1])


class Positionwise(nn.Module):
    """An embedding of the sign of each number, and norms, at each position alone: `[..., 4] -> [..., 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.signs, self.inner = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.norm, self.head, self.last = spread(nn.LayerNorm(5)), nn.Linear(5, 3), spread(nn.RMSNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x) + self.signs((x > 0).sum(-1))
        return self.head(torch.tanh(self.norm(self.inner(x))))


class Vectors(nn.Module):
    """A norm, a bare scale and a layer: `[batch, 4] -> [batch, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(0.5 + torch.rand(5)), nn.Linear(4, 5)
        self.norm, self.head = spread(nn.LayerNorm(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.inner(x)) * self.scale))


class SpokenVectors(Vectors):
    """The same with an embedding of signs and an attention over the four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.signs, self.attn = nn.Embedding(2, 4), unlike(nn.MultiheadAttention(4, 2, batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.signs((x > 0).long()) + torch.stack([x, x.sin(), x.square(), x.cos()], -1)
        return super().forward(self.attn(y, y, y)[0].sin().sum(1))


class GatedParts(nn.Module):
    """An embedding, a norm and an attention that run only if some row of the batch opens the gate (first number positive)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.signs, self.norm, self.attn = (
            nn.Embedding(5, 4),
            spread(nn.LayerNorm(4)),
            unlike(nn.MultiheadAttention(4, 2, batch_first=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        if bool((x[:, 0] > 0).any()):
            z = self.norm(torch.stack([y, x.sin(), self.signs((x > 0).sum(1))], 1))
            y = y + self.attn(z, z, z, need_weights=False)[0].sum(1)
        return self.head(torch.tanh(y))


class Watching(nn.Module):
    """An attention whose weights are part of the answer, with a mask for each head."""

    def __init__(self, *, average: bool) -> None:
        super().__init__()
        self.attn, self.head, self.average = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 3), average

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.linspace(-1, 1, 2 * x.shape[1] ** 2, dtype=x.dtype).sin().view(2, x.shape[1], x.shape[1]).repeat(len(x), 1, 1)
        y, weights = self.attn(x, x, x, attn_mask=mask, average_attn_weights=self.average)
        seen = weights if self.average else weights[:, 0] - 2.0 * weights[:, 1]
        return self.head(torch.tanh(y + seen @ x.sin()).mean(1))


class Causal(nn.Module):
    """An attention told that it looks back only."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(torch.tanh(self.attn(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]).mean(1))


class Grid(nn.Module):
    """Words on a grid `[batch, 2, 3]`, their numbers in 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(WORDS, 4), spread(nn.LayerNorm((3, 4))), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.words(ids.int()))).sum((1, 2)))


class Bounded(Classification):
    """The gradients of every layer are shrunk to a bounded norm."""

    def transform_gradient(self, layer: str, gradient: Tensor) -> Tensor:
        return gradient / (1.0 + gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def choices(generator: torch.Generator, count: int) -> list:
    """Rows of four choices of three words, and which is right."""
    return [(integer(generator, WORDS, 4, 3), int(integer(generator, 4))) for _ in range(count)]


def grids(generator: torch.Generator, count: int) -> list:
    """Rows of a grid of words, and a label."""
    return [(integer(generator, WORDS, 2, 3), int(integer(generator, 3))) for _ in range(count)]


def case(name: str, factory: Any, tracked: str, **options: Any) -> Case:
    return simple(name, factory, tracked, **{"layers": "all", **options})


five = partial(labelled, shape=(5, 4))
PLACES = "signs inner norm head last"
packed = {"rows": sequences, "collate": collate_packed, "sampled": False}
chosen = partial(t.ChoiceTask, measurement="margin")
COMBINED = [
    case("words_in_choices", WordChoices, f"words norm {four('attn')} head", rows=choices, task=chosen),
    case("norms_packed", Positionwise, PLACES, task=t.PackedTask, **packed),
    case("norms_packed_without_mask", Positionwise, PLACES, task=t.UnmaskedPackedTask, **packed),
    case("norms_in_groups", Positionwise, PLACES, rows=groups, task=t.GroupTask, collate=collate_groups, sampled=False),
    case("bounded_gradients_of_vectors", SpokenVectors, f"scale inner norm head signs {four('attn')}", task=Bounded, fallback=True),
    case("bounded_gradients_of_words", Grid, "words norm head", rows=grids, task=Bounded),
    case("norms_called_twice", Vectors, "scale inner norm head", rows=pairs, task=t.PairTask, sampled=False, fallback=True),
    case("spoken_called_twice", SpokenVectors, f"inner norm head signs {four('attn')}", rows=pairs, task=t.PairTask, sampled=False),
    case("parts_not_always_taken", GatedParts, f"inner head signs norm {four('attn')}", rows=gated),
    case("attention_watched", partial(Watching, average=True), f"{four('attn')} head", rows=five),
    case("attention_watched_by_head", partial(Watching, average=False), f"{four('attn')} head", rows=five),
    case("attention_causal", Causal, f"{four('attn')} head", rows=five),
    case("grid_of_words", Grid, "words norm head", rows=grids),
]
