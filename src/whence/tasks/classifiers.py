"""Hugging Face models that classify: sequences and images, tokens, and choices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whence.errors import ConfigError, DataError
from whence.tasks.hugging_face import HuggingFaceTask, TokenLabels, bare
from whence.tasks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
_LIKELIHOODS: dict[str, type[Likelihood]] = {
    "single_label_classification": Categorical,
    "multi_label_classification": Bernoulli,
    "regression": Gaussian,
}


class SequenceClassification(HuggingFaceTask):
    """Models for sequence and image classification: logits `[batch, label]`.

    What the labels are is told by `problem_type`, else by the model's `config.problem_type`, else as transformers does
    it: one output is a regression, integers are classes, other numbers are several yes-or-no labels. The loss is the
    cross-entropy, the binary cross-entropy summed over labels, or half the squared error (the negative log-likelihood
    of a Gaussian of variance 1; transformers trains on the whole square).

    Measurements: `"loss"`; `"margin"`, minus the log-odds of the label (see `ModelledTask`), not for a regression.

    Raises:
        ConfigError: an option is not known.
    """

    def __init__(
        self, *, labels: str = "labels", measurement: Literal["loss", "margin"] = "loss", problem_type: ProblemType | None = None
    ) -> None:
        super().__init__(labels=labels, measurement=measurement)
        if problem_type is not None and problem_type not in _LIKELIHOODS:
            raise ConfigError(f"problem_type={problem_type!r} is not known; choose {', '.join(map(repr, _LIKELIHOODS))}, or None.")
        self.problem_type = problem_type

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the distribution that the problem type names."""
        named = self.problem_type or getattr(getattr(bare(model), "config", None), "problem_type", None)
        if named is None and outputs == 1:
            named = "regression"
        elif named is None:
            named = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        return _LIKELIHOODS[named]()


class TokenClassification(TokenLabels):
    """Models for token classification: logits `[batch, token, label]`; tokens labelled -100 count for nothing.

    Measurements: `"loss"`, the cross-entropy summed over tokens; `"margin"`, minus the log-odds of the labels, summed.
    """

    def __init__(self, *, labels: str = "labels", measurement: Literal["loss", "margin"] = "loss") -> None:
        super().__init__(labels=labels, measurement=measurement)

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the categorical distribution."""
        return Categorical()


class MultipleChoice(HuggingFaceTask):
    """Models for multiple choice: inputs `[batch, choice, token]`, logits `[batch, choice]`.

    The model flattens choices into rows, all of which are one example. Every example of a data set has the same number
    of choices. Measurements as those of `SequenceClassification`.
    """

    def __init__(self, *, labels: str = "labels", measurement: Literal["loss", "margin"] = "loss") -> None:
        super().__init__(labels=labels, measurement=measurement)

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the categorical distribution."""
        return Categorical()

    def padding_mask(self, batch: Any) -> Tensor | None:
        """Return the attention mask as the model sees it, `[batch * choice, token]`."""
        mask = batch.get("attention_mask")
        return None if mask is None else mask.flatten(0, 1)

    def example_ids(self, batch: Any) -> Tensor:
        """Return the example `[batch * choice]` of each choice."""
        examples, choices = (batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]).shape[:2]
        return torch.arange(examples).repeat_interleave(choices)

    def _check_trained(self, index: int, row: Mapping[str, Any], labels: Tensor) -> None:
        choices = row.get("input_ids")
        if choices is not None and len(choices) != self._outputs:
            raise DataError(
                f"row {index} has {len(choices)} choices, but the first rows have {self._outputs}. "
                "Give every row the same number of choices, each tokenised with the question."
            )
        super()._check_trained(index, row, labels)
