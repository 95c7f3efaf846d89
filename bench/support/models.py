"""The models and made-up data of the comparisons: random weights, one definition of loss for both libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

Row = Any
Batch = Any
IGNORED = -100


@dataclass(kw_only=True)
class Case:
    """A model with data, as both libraries get it.

    `loss` and `measurement` map (model, batch) to `[batch]`; `mask` maps a batch to `[batch, position]` (1 = a real
    token), if there is padding; `layers` names the tracked layers; `shared` says that a layer is used more than once.
    """

    name: str
    model: nn.Module
    train: Sequence[Row]
    queries: Sequence[Row]
    layers: list[str]
    loss: Callable[[nn.Module, Batch], Tensor]
    measurement: Callable[[nn.Module, Batch], Tensor]
    mask: Callable[[Batch], Tensor] | None = None
    collate: Callable[[list[Row]], Batch] | None = None
    shared: bool = False


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy `[batch]` of a plain module on (inputs, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return minus the label's log-odds `[batch]`."""
    return _margin(model(batch[0]), batch[1])


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    chosen = labels.unsqueeze(-1)
    others = logits.scatter(-1, chosen, float("-inf")).logsumexp(-1)
    return others - logits.gather(-1, chosen).squeeze(-1)


def encoder_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy `[batch]` of a Hugging Face sequence classifier."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def encoder_margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return minus the label's log-odds `[batch]` of a Hugging Face sequence classifier."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return _margin(logits, batch["labels"])


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy `[batch]` of a Hugging Face causal model, summed over each example's tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)[:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=IGNORED).sum(1)


def attention_mask(batch: Batch) -> Tensor:
    """Return which positions `[batch, position]` are real tokens."""
    return batch["attention_mask"]


def pad(rows: list[Row]) -> Batch:
    """Collate token rows of different lengths: pad on the right to the longest, with a mask."""
    tokens = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True),
    }
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def vectors(count: int, shape: Sequence[int], classes: int, seed: int) -> list[tuple[Tensor, int]]:
    """Return `count` rows of (normal inputs of `shape`, random label)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return list(zip(inputs, labels.tolist(), strict=True))


def sentences(count: int, lengths: tuple[int, int], vocabulary: int, classes: int | None, seed: int) -> list[Row]:
    """Return `count` rows of random token ids with a length drawn from `lengths` (both included)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
        row: dict[str, Any] = {"input_ids": torch.randint(1, vocabulary, (length,), generator=generator)}
        if classes is not None:
            row["labels"] = int(torch.randint(classes, (), generator=generator))
        rows.append(row)
    return rows


def tracked_layers(model: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Return the names of all layers of the kinds both libraries know (Conv1D once it is rewritten)."""
    kinds = ("Linear", "Conv2d", "Conv1D")
    return [n for n, module in model.named_modules() if type(module).__name__ in kinds and n not in exclude]


def spread_norms(model: nn.Module) -> nn.Module:
    """Give normalisation layers random scales: at 1 and 0 their outputs sum to zero and covariances lose rank."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def mlp(train: int, queries: int) -> Case:
    """Three Linear layers, one of them without bias."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24, bias=False), nn.ReLU(), nn.Linear(24, 5)).eval()
    return Case(
        name="MLP", model=model, layers=tracked_layers(model), loss=cross_entropy, measurement=margin,
        train=vectors(train, (20,), 5, seed=1), queries=vectors(queries, (20,), 5, seed=2),
    )  # fmt: skip


def conv_net(train: int, queries: int) -> Case:
    """Conv2d with padding, stride, dilation and without bias, activations in place, a Linear head."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.ReLU(inplace=True),
        nn.Conv2d(12, 16, 2, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    return Case(
        name="convolutional net", model=model, layers=tracked_layers(model), loss=cross_entropy, measurement=margin,
        train=vectors(train, (3, 10, 10), 5, seed=3), queries=vectors(queries, (3, 10, 10), 5, seed=4),
    )  # fmt: skip


def bert(train: int, queries: int) -> Case:
    """A 2-layer BERT classifier on sentences of 4 to 20 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    model = spread_norms(BertForSequenceClassification(config)).eval()
    return Case(
        name="2-layer BERT", model=model, layers=tracked_layers(model), loss=encoder_loss, measurement=encoder_margin,
        mask=attention_mask, collate=pad,
        train=sentences(train, (4, 20), 100, 3, seed=5), queries=sentences(queries, (4, 20), 100, 3, seed=6),
    )  # fmt: skip


def gpt2(train: int, queries: int) -> Case:
    """A 2-layer GPT-2 on sentences of 4 to 20 tokens; its layers are `Conv1D`, its head is left out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=100, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = spread_norms(GPT2LMHeadModel(config)).eval()
    return Case(
        name="2-layer GPT-2", model=model, layers=tracked_layers(model, exclude=["lm_head"]), loss=next_token_loss,
        measurement=next_token_loss, mask=attention_mask, collate=pad,
        train=sentences(train, (4, 20), 100, None, seed=7), queries=sentences(queries, (4, 20), 100, None, seed=8),
    )  # fmt: skip


def speed_bert(*, tokens: int, train: int, queries: int, attention: str) -> Case:
    """The 6-layer BERT, 384 wide, of the speed comparison: all rows of one length, no padding."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        num_labels=2, max_position_embeddings=max(128, tokens), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    return Case(
        name=f"6-layer BERT, {tokens} tokens", model=model, layers=tracked_layers(model), collate=pad,
        loss=encoder_loss, measurement=encoder_loss,
        train=sentences(train, (tokens, tokens), 1000, 2, seed=9),
        queries=sentences(queries, (tokens, tokens), 1000, 2, seed=10),
    )  # fmt: skip
