"""How well a trained model does on its queries, in the numbers that people know."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whence.recipes.answers import right_options
from whence.recipes.base import Recipe
from whence.runtime.batches import iterate_batches
from whence.runtime.device import resolve_device
from whence.runtime.progress import Stages
from whence.tasks import CausalLM, MultipleChoice, Seq2SeqLM, SequenceClassification
from whence.tasks.hugging_face import HuggingFaceTask
from whence.tasks.likelihoods import IGNORE, Categorical

_BATCH = 32
_LANGUAGE = (CausalLM, Seq2SeqLM)


def quality(recipe: Recipe, *, stages: Stages | None = None) -> dict[str, float]:
    """Return the accuracy of a classifier, the perplexity of a language model, else the mean loss, over the recipe's queries.

    Of a language model whose queries have options also how often it prefers the right one.

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
        device, every = next(recipe.model.parameters()).device, range(len(recipe.queries))
        for batch in iterate_batches(recipe.queries, every, batch_size=_BATCH, collate=recipe.collate, device=device):
            parts.append(_of_batch(recipe, batch.data))
            advance(len(batch.ids))
    losses, right, tokens = (torch.cat(column) for column in zip(*parts, strict=True))
    found = {"queries": float(len(losses)), "loss": float(losses.sum() / tokens.sum())}
    if isinstance(recipe.task, _LANGUAGE):
        chosen = {} if recipe.options is None else {"option_accuracy": float(right_options(recipe).double().mean())}
        return found | {"perplexity": math.exp(min(found["loss"], 700.0))} | chosen
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
    if not isinstance(recipe.task, _LANGUAGE):
        return torch.ones(len(rows), dtype=torch.float64)
    assert recipe.collate is not None  # every recipe of language models has one
    return _counted(recipe.task.targets(recipe.collate(list(rows))))


def _counted(labels: Tensor) -> Tensor:
    return (labels != IGNORE).sum(1).double().cpu()


def _of_batch(recipe: Recipe, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's loss, whether its class is right (NaN: there is none), and its tokens."""
    task = recipe.task
    assert isinstance(task, HuggingFaceTask)
    output, labels = task.output(recipe.model, batch), task.targets(batch)
    likelihood = task.likelihood(recipe.model, output.shape[-1], labels)
    losses = likelihood.loss(output, labels).double().cpu()
    right = torch.full_like(losses, math.nan)
    if isinstance(task, SequenceClassification | MultipleChoice) and isinstance(likelihood, Categorical):
        right = (output.argmax(-1) == labels).double().cpu()
    return losses, right, _counted(labels) if isinstance(task, _LANGUAGE) else torch.ones_like(losses)
