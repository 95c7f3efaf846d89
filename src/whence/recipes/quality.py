"""How well a trained model does on its queries, in the numbers that people know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whence.recipes.base import Recipe
from whence.runtime.device import resolve_device
from whence.runtime.progress import Stages
from whence.tasks import CausalLM, MultipleChoice, SequenceClassification
from whence.tasks.likelihoods import IGNORE

_BATCH = 32


def quality(recipe: Recipe, *, stages: Stages | None = None) -> dict[str, float]:
    """Return the accuracy of a classifier, the perplexity of a language model, else the mean loss, over the recipe's queries.

    A model on the CPU goes to a GPU for it, if there is one, and back.
    """
    stages = Stages(enabled=False) if stages is None else stages
    parts = []
    with (
        _on_fast_device(recipe.model),
        stages.stage("Evaluate"),
        stages.track(len(recipe.queries), "Evaluating") as advance,
        torch.no_grad(),
    ):
        for start in range(0, len(recipe.queries), _BATCH):
            rows = [recipe.queries[place] for place in range(start, min(start + _BATCH, len(recipe.queries)))]
            parts.append(_of_batch(recipe, rows))
            advance(len(rows))
    losses, right, tokens = (torch.cat(column) for column in zip(*parts, strict=True))
    found = {"queries": float(len(losses)), "loss": float(losses.sum() / tokens.sum())}
    if isinstance(recipe.task, CausalLM):
        return found | {"perplexity": math.exp(min(found["loss"], 700.0))}
    return found | ({} if torch.isnan(right).any() else {"accuracy": float(right.mean())})


@contextmanager
def _on_fast_device(model: nn.Module) -> Iterator[None]:
    found = next(model.parameters()).device
    model.to(resolve_device("auto") if found.type == "cpu" else found)
    try:
        yield
    finally:
        model.to(found)


def tokens_of(recipe: Recipe, rows: Sequence[Any]) -> Tensor:
    """Return how many tokens each row's loss is a sum over, float64 `[row]`; 1 for what is not a language model."""
    if not isinstance(recipe.task, CausalLM):
        return torch.ones(len(rows), dtype=torch.float64)
    return (recipe.task.targets(_collated(recipe, rows)) != IGNORE).sum(1).double()


def _of_batch(recipe: Recipe, rows: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's loss, whether its class is right (NaN: there is none), and its tokens."""
    device = next(recipe.model.parameters()).device
    batch = {key: value.to(device) for key, value in _collated(recipe, rows).items()}
    losses = recipe.task.loss(recipe.model, batch).double().cpu()
    right = torch.full_like(losses, math.nan)
    labels = batch.get("labels")
    if isinstance(recipe.task, SequenceClassification | MultipleChoice) and labels is not None and not labels.is_floating_point():
        logits = recipe.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        right = (logits.argmax(-1) == labels).double().cpu()
    return losses, right, tokens_of(recipe, rows)


def _collated(recipe: Recipe, rows: Sequence[Any]) -> Any:
    assert recipe.collate is not None  # every recipe of Hugging Face models has one
    return recipe.collate(list(rows))
