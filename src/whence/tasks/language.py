"""Hugging Face language models: a label per token, drawn from the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.errors import ConfigError, DataError
from whence.tasks.base import Masks
from whence.tasks.hugging_face import HuggingFaceTask, TokenLabels, bare
from whence.tasks.likelihoods import IGNORE, Categorical, Likelihood

_LanguageMeasure = Literal["loss", "log_odds"]


class _Vocabulary(HuggingFaceTask):
    """A categorical distribution over the vocabulary at every trained token."""

    _odds = "log_odds"

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the categorical distribution."""
        return Categorical()

    def columns(self, model: nn.Module, batch: Any) -> Tensor:
        """Refuse: one column per token and entry of the vocabulary is too many.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{type(self).__name__} has one column per token and entry of the vocabulary, too many. "
            "Use whence.ConjugateGradients(draws=1), which draws labels instead, or solver='direct'."
        )


class CausalLM(_Vocabulary, TokenLabels):
    """Models that predict the next token: logits `[batch, token, vocabulary]`, each against the token after it.

    Labels are `[batch, token]` and not shifted, as for transformers; -100 counts for nothing. Without labels, every
    real token of `input_ids` counts.

    Measurements: `"loss"`, the cross-entropy summed over trained tokens; `"log_odds"`, minus the log-odds of the trained
    tokens against all others, summed (see `ModelledTask`).
    """

    def __init__(self, *, labels: str = "labels", measurement: _LanguageMeasure = "loss") -> None:
        super().__init__(labels=labels, measurement=measurement)

    def targets(self, batch: Any) -> Tensor:
        """Return for each position the token after it, `[batch, token]`."""
        labels = batch.get(self.label_key)
        if labels is None:
            labels, mask = batch["input_ids"], batch.get("attention_mask")
            labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORE)
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def _labels_of(self, index: int, row: Mapping[str, Any]) -> Tensor | None:
        if row.get(self.label_key) is not None:
            return super()._labels_of(index, row)
        if row.get("input_ids") is None:
            return None
        labels, mask = torch.as_tensor(row["input_ids"]), row.get("attention_mask")
        return labels if mask is None else labels.masked_fill(torch.as_tensor(mask) == 0, IGNORE)

    def _check_trained(self, index: int, row: Mapping[str, Any], labels: Tensor) -> None:
        super()._check_trained(index, row, labels)
        if not bool((labels[1:] != IGNORE).any()):
            raise DataError(
                f"row {index} has no trained token: the first token is never predicted, and all after it are {IGNORE} or padding. "
                "Drop the row or give it more labels."
            )


# Keys and values of cross-attention lie on the encoder's positions: T5, BART and its kin, EncoderDecoderModel.
_CROSS = ("EncDecAttention.[kv]", "encoder_attn.[kv]_proj", "crossattention.self.key", "crossattention.self.value", "enc_to_dec_proj")


class Seq2SeqLM(_Vocabulary):
    """Encoder-decoder models: logits `[batch, target token, vocabulary]` against labels `[batch, target token]`.

    The decoder's inputs are the labels, shifted by the model's own `prepare_decoder_input_ids_from_labels`, unless the
    batch has them. Labels of -100 count for nothing. Measurements as those of `CausalLM`.
    """

    def __init__(self, *, labels: str = "labels", measurement: _LanguageMeasure = "loss") -> None:
        super().__init__(labels=labels, measurement=measurement)

    def inputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Return what the model is called with, with the decoder's inputs."""
        inputs = super().inputs(model, batch)
        if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
            return inputs
        shift = getattr(bare(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ConfigError(
                f"Seq2SeqLM: {type(bare(model)).__name__} has no prepare_decoder_input_ids_from_labels. "
                "Give batches with decoder_input_ids: the labels, shifted to the right by one."
            )
        return {**inputs, "decoder_input_ids": shift(labels=self.targets(batch))}

    def padding_mask(self, batch: Any) -> Masks:
        """Return the encoder's mask for its layers and for cross-attention's keys and values, else the decoder's.

        The input embedding that encoder and decoder share is called on the encoder's tokens first.
        """
        source, target = batch.get("attention_mask"), batch.get("decoder_attention_mask")
        target = self.targets(batch) != IGNORE if target is None else target
        masks: dict[str, Tensor | Sequence[Tensor]] = {}
        if source is not None:
            masks |= dict.fromkeys(("shared", "*.shared"), (source, target))
            masks |= {pattern: source for name in _CROSS for pattern in (f"*{name}", f"*{name}.*")}
        # The decoder first: a decoder may hold a module named encoder.
        masks |= dict.fromkeys(("decoder.*", "*.decoder.*", "lm_head*", "*.lm_head*"), target)
        return masks if source is None else masks | dict.fromkeys(("encoder.*", "*.encoder.*"), source)

    def _check_labels(self, model: nn.Module, index: int, labels: Tensor) -> None:
        if labels.dim() != 1:
            raise DataError(f"row {index}: its labels have the shape {tuple(labels.shape)}. Seq2SeqLM takes the target's token ids.")
        super()._check_labels(model, index, labels)
