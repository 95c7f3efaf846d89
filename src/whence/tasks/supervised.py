"""Tasks of plain modules, called as `model(inputs)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whence.errors import DataError
from whence.tasks.likelihoods import Categorical, Gaussian, Likelihood
from whence.tasks.modelled import ModelledTask, known_measure


class _Supervised(ModelledTask):
    """A plain module called as `model(inputs)` on batches that carry inputs and targets under two keys."""

    input_key: int | str
    target_key: int | str

    def _part(self, batch: Any, key: int | str) -> Any:
        try:
            return batch[key]
        except (KeyError, IndexError, TypeError):
            have = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"{type(batch).__name__}"
            raise DataError(
                f"{type(self).__name__}: a row or batch has no part {key!r}; it has {have}. "
                f"Name the right parts with {type(self).__name__}(inputs=..., ...), or give a collate function that makes them."
            ) from None

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's output on the batch's inputs; mappings are passed as keyword arguments."""
        inputs = self._part(batch, self.input_key)
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def targets(self, batch: Any) -> Tensor:
        """Return the batch's targets."""
        return self._part(batch, self.target_key)

    def inspect_row(self, model: nn.Module, index: int, row: Any) -> None:
        """Raise `DataError` for a label that is no class of the model, or a target that is not finite."""
        self._check_labels(model, index, torch.as_tensor(self._part(row, self.target_key)))


class Classification(_Supervised):
    """Cross-entropy on logits `[batch, ..., class]`; positions labelled -100 count for nothing.

    Measurements: `"loss"`, the cross-entropy; `"margin"`, minus the log-odds of the label (see `ModelledTask`).
    """

    def __init__(self, *, inputs: int | str = 0, labels: int | str = 1, measurement: Literal["loss", "margin"] = "loss") -> None:
        self.input_key, self.target_key = inputs, labels
        self.measure = known_measure(measurement, ("loss", "margin"))

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the categorical distribution."""
        return Categorical()


class Regression(_Supervised):
    """Half the squared error, summed over outputs: the negative log-likelihood of a Gaussian of variance 1."""

    def __init__(self, *, inputs: int | str = 0, targets: int | str = 1) -> None:
        self.input_key, self.target_key = inputs, targets

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the Gaussian of variance 1."""
        return Gaussian()
