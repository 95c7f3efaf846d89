"""What a model is trained on and what is to be explained: loss, measurement, label sampling, padding.

A task is the only thing a user writes for an unusual model. All losses and measurements are one number per
example, summed over the example's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.errors import ConfigError, DataError


class Noise(Protocol):
    """Uniform random numbers that depend on the example alone, not on its batch or place in it."""

    def uniform(self, *shape: int) -> Tensor:
        """Return `[batch, *shape]` in the open interval (0, 1); row b is keyed by example b's id."""
        ...


class Task:
    """Base class of all tasks; subclasses give `loss` and `sampled_loss`, the rest has defaults.

    Attributes without a leading underscore are options: results made with other options are not mixed up with these.
    """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss `[batch]`, summed over an example's tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch) -> [batch]")

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what is to be explained, `[batch]`. By default the loss."""
        return self.loss(model, batch)

    def sampled_loss(self, model: nn.Module, batch: Any, noise: Noise) -> Tensor:
        """Return the loss `[batch]` with labels drawn from the model's own output (true Fisher)."""
        raise ConfigError(
            f"{type(self).__name__} does not define sampled_loss, which the true Fisher needs. "
            "Define sampled_loss(model, batch, noise), or call fit(..., empirical=True) to use the data's own labels."
        )

    def padding_mask(self, batch: Any) -> Tensor | Mapping[str, Tensor] | None:
        """Return `[batch, position]` (nonzero = a real position), one such mask per layer pattern, or None.

        The mask belongs to the covariances' sums and counts only; gradients take every position, as autograd does.
        """
        return None

    def example_ids(self, batch: Any) -> Tensor | None:
        """Return which example each row `[batch]` or position `[batch, position]` belongs to; None: row i is example i.

        Values index the vector that `loss` returns; -1 marks a position that belongs to no example.
        """
        return None

    def transform_gradient(self, layer: str, gradient: Tensor) -> Tensor:
        """Post-process per-example gradients `[batch, group, out, in]`; for what `example_ids` cannot express."""
        return gradient

    def inspect_row(self, model: nn.Module, index: int, row: Any) -> None:
        """Raise `DataError` if a row cannot be used. Called on every row before long work starts."""

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Look at the model's output on one batch (under no_grad) before any row is inspected."""


class _Supervised(Task):
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


class Classification(_Supervised):
    """Cross-entropy on logits `[batch, ..., class]`; positions labelled `ignore_index` count for nothing.

    Measurements: `"loss"`, the cross-entropy; `"margin"`, minus the log-odds of the label (the measure of
    Park et al., "TRAK: Attributing Model Behavior at Scale", 2023, with its sign turned so that,
    as for a loss, lower is better and a positive score means help).
    """

    ignore_index = -100

    def __init__(self, *, inputs: int | str = 0, labels: int | str = 1, measurement: Literal["loss", "margin"] = "loss") -> None:
        if measurement not in ("loss", "margin"):
            raise ConfigError(f"measurement={measurement!r} is not known; choose 'loss' or 'margin'.")
        self.input_key, self.target_key, self.measure = inputs, labels, measurement
        self._classes: int | None = None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the cross-entropy `[batch]`."""
        return self._cross_entropy(self.output(model, batch), self._part(batch, self.target_key))

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the chosen measurement `[batch]`."""
        if self.measure == "loss":
            return self.loss(model, batch)
        logits, labels = self.output(model, batch), self._part(batch, self.target_key)
        real = labels != self.ignore_index
        chosen = torch.where(real, labels, 0).unsqueeze(-1)
        others = logits.scatter(-1, chosen, float("-inf"))
        odds = logits.gather(-1, chosen).squeeze(-1) - others.logsumexp(-1)
        return -(odds * real).flatten(1).sum(1) if odds.dim() > 1 else -(odds * real)

    def sampled_loss(self, model: nn.Module, batch: Any, noise: Noise) -> Tensor:
        """Return the cross-entropy `[batch]` with labels drawn from the model's softmax by inverse CDF."""
        logits = self.output(model, batch)
        labels = self._part(batch, self.target_key)
        with torch.no_grad():
            cumulative = logits.double().softmax(-1).cumsum(-1)
            draw = noise.uniform(*logits.shape[1:-1]).to(cumulative)
            sampled = (cumulative < draw.unsqueeze(-1)).sum(-1).clamp_(max=logits.shape[-1] - 1)
            sampled = torch.where(labels == self.ignore_index, labels, sampled)
        return self._cross_entropy(logits, sampled)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none", ignore_index=self.ignore_index)
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Learn the number of classes from the model's output."""
        self._classes = self.output(model, batch).shape[-1]

    def inspect_row(self, model: nn.Module, index: int, row: Any) -> None:
        """Raise `DataError` for a label that is no class of the model."""
        labels = torch.as_tensor(self._part(row, self.target_key))
        if labels.is_floating_point():
            raise DataError(
                f"row {index}: label {labels.tolist()!r} is not an integer. "
                f"Classification takes class numbers from 0 to {(self._classes or 0) - 1}."
            )
        wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= (self._classes or 0)))]
        if wrong.numel():
            raise DataError(
                f"row {index}: label {wrong.flatten()[0].item()} is out of range: the model has {self._classes} classes, "
                f"so labels run from 0 to {(self._classes or 0) - 1}. Correct the row or the model's number of outputs."
            )


class Regression(_Supervised):
    """Half the squared error, summed over outputs: the negative log-likelihood of a Gaussian of variance 1."""

    def __init__(self, *, inputs: int | str = 0, targets: int | str = 1) -> None:
        self.input_key, self.target_key = inputs, targets

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return half the squared error `[batch]`."""
        output = self.output(model, batch)
        # `[batch]` targets against `[batch, 1]` outputs would broadcast to a square without this.
        return self._half_square(output - self._part(batch, self.target_key).view_as(output))

    def sampled_loss(self, model: nn.Module, batch: Any, noise: Noise) -> Tensor:
        """Return the loss `[batch]` with targets drawn from a unit Gaussian around the output."""
        output = self.output(model, batch)
        draw = torch.special.ndtri(noise.uniform(*output.shape[1:])).to(output)
        return self._half_square(output - (output.detach() + draw))

    def inspect_row(self, model: nn.Module, index: int, row: Any) -> None:
        """Raise `DataError` for a target that is not finite."""
        if not torch.isfinite(torch.as_tensor(self._part(row, self.target_key))).all():
            raise DataError(f"row {index}: its target is NaN or infinite. Drop the row or fill the value in.")

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Check that outputs and targets have one number for one number."""
        output, targets = self.output(model, batch), self._part(batch, self.target_key)
        if output.numel() != targets.numel():
            raise DataError(
                f"the model gives {tuple(output.shape)} for targets of shape {tuple(targets.shape)}. "
                "Regression compares them number by number: give targets of the output's size."
            )

    @staticmethod
    def _half_square(error: Tensor) -> Tensor:
        return 0.5 * error.square().flatten(1).sum(1) if error.dim() > 1 else 0.5 * error.square()
