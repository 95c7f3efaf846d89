"""Cases with embeddings and tied output heads. Ids that are padded are filled with a real word, so that reading them shows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import case_tasks as t
from case import Case, simple
from case_data import integer, padded
from whence.tasks import Classification

WORDS, WIDTH = 7, 4


def sentences(generator: torch.Generator, count: int) -> list:
    """Rows of five words and a label."""
    return [(integer(generator, WORDS, 5), int(integer(generator, 3))) for _ in range(count)]


def words(generator: torch.Generator, count: int) -> list:
    """Rows of one word and a label."""
    return [(integer(generator, WORDS), int(integer(generator, 3))) for _ in range(count)]


def continued(generator: torch.Generator, count: int) -> list:
    """Rows of five words and the word that follows each."""
    return [(row[:-1], row[1:]) for row in (integer(generator, WORDS, 6) for _ in range(count))]


def ragged(generator: torch.Generator, count: int) -> list:
    """Rows of two to six words, with a label for each and one for all."""
    lengths = [2 + (3 * index + 1) % 5 for index in range(count)]
    return [{"ids": integer(generator, WORDS, n), "next": integer(generator, WORDS, n), "label": n % 3} for n in lengths]


def collate_ragged(rows: list, *, labels: str = "label", left: bool = False) -> dict:
    """Pad to the longest row, on the right or on the left. The fill is a word like any other, masked out by the model."""
    ids, following = ([row[key] for row in rows] for key in ("ids", "next"))
    if left:
        ids, following = ([x.flip(0) for x in part] for part in (ids, following))
    mask = padded([torch.ones(len(x)).double() for x in ids], 0.0)
    batch = {"ids": padded(ids, 3), "mask": mask, "next": padded(following, -100)}
    if left:
        batch = {key: value.flip(1) for key, value in batch.items()}
    return {
        "inputs": {"ids": batch["ids"], "mask": batch["mask"]},
        "label": torch.tensor([row["label"] for row in rows]),
        "next": batch["next"],
    }


class Bag(nn.Module):
    """Words to vectors to classes: `[batch, word]` or `[batch]`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(WORDS, WIDTH, **options), nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.words(ids)))
        return self.head(x if x.dim() == 2 else x.mean(1))


class MaskedBag(Bag):
    """The same on padded rows."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.words(ids))) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class Twice(nn.Module):
    """One embedding used for the words and for the words in reverse, changed in place, or recomputed in the backward pass."""

    def __init__(self, *, in_place: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)
        self.in_place, self.checkpointed = in_place, checkpointed

    def look(self, ids: Tensor) -> Tensor:
        return torch.sin(self.words(ids) + 2.0 * self.words(ids.flip(1)).roll(1, -1))

    def forward(self, ids: Tensor) -> Tensor:
        if self.in_place:
            x = self.words(ids)
            x.mul_(1.5).tanh_()
        else:
            x = checkpoint(self.look, ids, use_reentrant=False) if self.checkpointed else self.look(ids)
        return self.head(torch.tanh(x.sum(1)))


class EmbeddingsTied(nn.Module):
    """Two embeddings with one weight, one of which skips word 0."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others, self.head = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH, padding_idx=0), nn.Linear(WIDTH, 3)
        self.others.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids) + 0.5 * self.others(ids.flip(1)).roll(1, -1)).sum(1))


class Speaker(nn.Module):
    """A language model: an embedding, a layer, and a head with the embedding's weight, `[batch, word] -> [batch, word, word]`."""

    def __init__(self, *, bias: bool = False, head_first: bool = False, checkpointed: bool = False, **options: Any) -> None:
        super().__init__()
        parts = {"words": nn.Embedding(WORDS, WIDTH, **options), "mix": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, WORDS, bias=bias)}
        for name in ("head", "words", "mix") if head_first else ("words", "mix", "head"):
            setattr(self, name, parts[name])
        self.head.weight, self.checkpointed = self.words.weight, checkpointed

    def speak(self, x: Tensor) -> Tensor:
        return self.head(x + torch.tanh(self.mix(x.cumsum(1))))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(ids) if mask is None else self.words(ids) * mask.unsqueeze(-1)
        return checkpoint(self.speak, x, use_reentrant=False) if self.checkpointed else self.speak(x)


def embedded(name: str, factory: Any, tracked: str = "words mix head", rows: Any = sentences, **options: Any) -> Case:
    """A case in which everything is tracked, embeddings and heads among them."""
    return simple(name, factory, tracked, **{"rows": rows, "layers": "all", **options})


EMBEDDINGS = [
    embedded("embedding", Bag),
    embedded("embedding_of_one_word", Bag, rows=words),
    embedded("embedding_padding_word", partial(Bag, padding_idx=2)),
    embedded("embedding_named", Bag, tracked="words head", layers=["words", "head"]),
    embedded("embedding_twice", Twice, tracked="words head"),
    embedded("embedding_in_place", partial(Twice, in_place=True), tracked="words head"),
    embedded("embedding_checkpointed", partial(Twice, checkpointed=True), tracked="words head"),
    embedded("embeddings_tied", EmbeddingsTied, tracked="words head"),
    embedded(
        "embedding_padded",
        MaskedBag,
        rows=ragged,
        task=partial(t.PaddedTask, inputs="inputs", labels="label", measurement="margin"),
        collate=collate_ragged,
    ),
    embedded(
        "embedding_padded_with_a_padding_word",
        partial(MaskedBag, padding_idx=3),
        rows=ragged,
        task=partial(t.PaddedTask, inputs="inputs", labels="label"),
        collate=collate_ragged,
    ),
    embedded("tied_head", Speaker, tracked="words mix", rows=continued, task=Classification),
    embedded("tied_head_with_bias", partial(Speaker, bias=True), rows=continued, task=Classification),
    embedded("tied_head_first", partial(Speaker, head_first=True), tracked="words mix", rows=continued, task=Classification),
    embedded("tied_head_checkpointed", partial(Speaker, checkpointed=True), tracked="words mix", rows=continued, task=Classification),
    embedded("tied_head_padding_word", partial(Speaker, padding_idx=1), tracked="words mix", rows=continued, task=Classification),
    embedded(
        "tied_head_padded",
        partial(Speaker, bias=True),
        rows=ragged,
        task=partial(t.PaddedTask, inputs="inputs", labels="next"),
        collate=collate_ragged,
    ),
]
