"""Real architectures of Hugging Face, small and random: neither the batch nor the padding changes a score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from compare import assert_close
from whence.tasks import Task

transformers = pytest.importorskip("transformers")
LENGTHS = [5, 9, 3, 9, 7, 4, 8, 6]


class LastLogits(Task):
    """Cross-entropy on a class read off the model's logits; padded positions are masked out of attention."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if logits.dim() == 3:  # a language model: next-token loss over real tokens
            losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            return (losses * batch["attention_mask"][:, 1:]).sum(1)
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    def padding_mask(self, batch: Any) -> Tensor:
        return batch["attention_mask"]


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 20, (n,), generator=generator), "label": n % 2} for n in LENGTHS]


def collate_to(least: int) -> Any:
    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(least, *(len(row["input_ids"]) for row in batch))
        padded = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for place, row in enumerate(batch):
            padded[place, : len(row["input_ids"])], mask[place, : len(row["input_ids"])] = row["input_ids"], 1
        return {"input_ids": padded, "attention_mask": mask, "label": torch.tensor([row["label"] for row in batch])}

    return collate


def bert() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, max_position_embeddings=16))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=16))


def results(model: nn.Module, strategy: str, *, least: int, batch_size: int) -> list[Tensor]:
    attributor = whence.Attributor(model, LastLogits(), collate=collate_to(least), progress=False)
    attributor.fit(rows(), strategy=strategy, empirical=True, batch_size=batch_size)
    scores = attributor.scores(rows()[:3], rows(), batch_size=batch_size, query_batch_size=batch_size)
    return [scores.values, attributor.self_influence(rows(), batch_size=batch_size)]


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac"])
def test_batches_and_padding_change_nothing(make: Any, strategy: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    alone = results(model, strategy, least=1, batch_size=1)
    for least, batch_size in ((1, 3), (13, 8)):
        for found, wanted in zip(results(model, strategy, least=least, batch_size=batch_size), alone, strict=True):
            assert_close(found, wanted, f"{strategy} in batches of {batch_size}", rtol=0.0, atol_of_largest=1e-12)
            assert torch.equal(found.argsort(), wanted.argsort())
