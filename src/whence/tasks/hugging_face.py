"""What all tasks of Hugging Face models share: batches as the Trainer's collators make them, calls, and row checks.

transformers itself is not imported: a model here is any module that is called with a batch's tensors by name and
returns logits. The loss is taken from the logits, since the model's own is a mean over the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ConfigError, DataError
from whence.tasks.base import Masks
from whence.tasks.likelihoods import IGNORE
from whence.tasks.modelled import ModelledTask, known_measure

_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
# Rows of a data set may name their labels as the Trainer's default collator allows; a batch has them under one name.
_ALIASES = ("label", "label_ids")


class HuggingFaceTask(ModelledTask):
    """A model called as `model(**batch without labels)` that returns `.logits`.

    Args:
        labels: the key of the labels in a batch.
        measurement: `"loss"` or, under the name that the task gives it, minus the labels' log-odds.
    """

    _odds = "margin"

    def __init__(self, *, labels: str = "labels", measurement: str = "loss") -> None:
        self.label_key, self.measure = labels, known_measure(measurement, ("loss", self._odds))

    def inputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Return what the model is called with: everything but the labels."""
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{type(self).__name__} takes batches as dicts (input_ids, attention_mask, labels, ...), not a "
                f"{type(batch).__name__}. Give a collate function that makes them."
            )
        return {key: value for key, value in batch.items() if key != self.label_key and value is not None}

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's logits.

        Raises:
            ConfigError: the model returns none.
        """
        inputs = self.inputs(model, batch)
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        # Pixels come as float32, whatever the type of the model.
        inputs = {
            key: value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in inputs.items()
        }
        if "use_cache" in forward_parameters(model):
            inputs.setdefault("use_cache", False)
        result = model(**inputs)
        logits = result[0] if isinstance(result, tuple) else getattr(result, "logits", result)
        if not isinstance(logits, Tensor):
            raise ConfigError(
                f"{type(self).__name__}: {type(bare(model)).__name__} returned a {type(result).__name__} without logits. "
                "Use a model with a head for this task, or write a task of your own (whence.tasks.Task)."
            )
        return logits

    def targets(self, batch: Any) -> Tensor:
        """Return the batch's labels.

        Raises:
            DataError: it has none.
        """
        labels = batch.get(self.label_key)
        if labels is None:
            raise DataError(
                f"{type(self).__name__}: a batch has no {self.label_key!r}; it has {sorted(map(str, batch))}. Give rows with labels "
                f"and a collate function that puts them under {self.label_key!r}, or name the key: {type(self).__name__}(labels=...)."
            )
        return labels

    def padding_mask(self, batch: Any) -> Masks:
        """Return the attention mask `[batch, position]` where there is one."""
        mask = batch.get("attention_mask")
        # Masks of a higher rank say who attends to whom.
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def inspect_row(self, model: nn.Module, index: int, row: Any) -> None:
        """Check a row before it is collated; what is not tokenised yet is left to the collate function.

        Raises:
            DataError: token ids the model does not know, no labels, or labels that cannot be used.
        """
        if not isinstance(row, Mapping):
            return
        self._check_ids(model, index, row)
        labels = self._labels_of(index, row)
        if labels is not None:
            self._check_labels(model, index, labels)
            self._check_trained(index, row, labels)

    def _labels_of(self, index: int, row: Mapping[str, Any]) -> Tensor | None:
        """Return a row's labels; None if another column may become the labels when rows are collated."""
        keys = (self.label_key, *(_ALIASES if self.label_key == "labels" else ()))
        found = next((row[key] for key in keys if row.get(key) is not None), None)
        ready = any(key in row for key in _INPUTS)
        if found is None:
            if not ready:
                return None
            raise DataError(
                f"row {index} has no labels: it has {sorted(map(str, row))}. Give every row labels under {keys[0]!r}, "
                f"or name their key: {type(self).__name__}(labels=...)."
            )
        try:
            return torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            if not ready:
                return None
            raise DataError(f"row {index}: its labels {found!r:.80} are not numbers. Turn them into class numbers.") from None

    def _check_ids(self, model: nn.Module, index: int, row: Mapping[str, Any]) -> None:
        get = getattr(bare(model), "get_input_embeddings", None)
        known = getattr(get(), "num_embeddings", None) if callable(get) and row.get("input_ids") is not None else None
        if known is None:
            return
        for ids in _sequences(row["input_ids"]):
            wrong = ids[(ids < 0) | (ids >= known)]
            if wrong.numel():
                raise DataError(
                    f"row {index}: token id {wrong[0].item()} is out of range: the model knows the ids 0 to {known - 1}. "
                    "Tokenise with the model's own tokenizer."
                )

    def _check_trained(self, index: int, row: Mapping[str, Any], labels: Tensor) -> None:
        if not bool((labels != IGNORE).any()):
            raise DataError(f"row {index} has no label that counts: all are {IGNORE}, so its loss is zero. Drop the row or give it labels.")


class TokenLabels(HuggingFaceTask):
    """Tasks with one label per token of `input_ids`."""

    def _check_labels(self, model: nn.Module, index: int, labels: Tensor) -> None:
        if labels.dim() != 1:
            raise DataError(
                f"row {index}: its labels have the shape {tuple(labels.shape)}. {type(self).__name__} takes one label per token, "
                f"{IGNORE} where there is none."
            )
        super()._check_labels(model, index, labels)

    def _check_trained(self, index: int, row: Mapping[str, Any], labels: Tensor) -> None:
        tokens = row.get("input_ids")
        if tokens is not None and len(tokens) != len(labels):
            raise DataError(
                f"row {index} has {len(tokens)} tokens and {len(labels)} labels. Give one label per token, {IGNORE} where there is none."
            )
        super()._check_trained(index, row, labels)


def bare(model: nn.Module) -> nn.Module:
    """Return the model within compiled, parallel and adapter wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif callable(getattr(inner, "get_base_model", None)):  # peft
            inner = inner.get_base_model()
        else:
            return inner


def forward_parameters(model: nn.Module) -> list[str]:
    """Return the names that the model's forward takes."""
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [name for name, p in inspect.signature(bare(model).forward).parameters.items() if p.kind not in skipped]


def _sequences(value: Any) -> list[Tensor]:
    """Token ids of a row as vectors: one, or one per choice."""
    nested = not isinstance(value, Tensor) and len(value) > 0 and not isinstance(value[0], int)
    return [torch.as_tensor(part).flatten() for part in (value if nested else [value])]
