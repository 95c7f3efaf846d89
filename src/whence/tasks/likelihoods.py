"""Three distributions of labels given a model's output: what every ready-made task is made of.

Each gives, per example and summed over its positions: the negative log-likelihood (the loss), labels drawn from the
output, log-odds, and columns whose gradients' outer products sum to the Fisher matrix. All of them are exponential
families in the output z, so the Fisher matrix is the Gauss-Newton matrix `sum_t J_t^T Var(y | z_t) J_t` (Martens, "New
insights and perspectives on the natural gradient method", 2020), and columns are the rows of `Var(y | z)^1/2 J`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.tasks.base import Noise

IGNORE = -100
"""The label of positions that count for nothing, as torch and Hugging Face have it."""

# Labels are drawn in slices of about this many probabilities: a vocabulary times a batch in float64 would be gigabytes.
_SLICE = 2**24


class Likelihood:
    """A distribution of labels given outputs; stateless."""

    has_odds: ClassVar[bool] = True
    """Whether `margin` is defined."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-likelihood `[batch]`, without terms that depend on nothing trained."""
        raise NotImplementedError

    def odds(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-odds of every label `[batch, *label]`, and which labels count; `softplus(-odds)` sum to the loss."""
        raise NotImplementedError

    def margin(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return minus the sum of the labels' log-odds `[batch]`; as for a loss, lower is better."""
        odds, counted = self.odds(output, labels)
        return -_total(odds * counted)

    def sample(self, output: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """Return labels drawn from the output, detached; what `labels` ignores stays ignored."""
        raise NotImplementedError

    def columns(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return `[column, batch]`, as `Task.columns`; `labels` only say what is ignored."""
        raise NotImplementedError

    def mismatch(self, output: Tensor, labels: Tensor) -> str | None:
        """Return what is wrong with the shapes of a batch, as a sentence, or None."""
        raise NotImplementedError

    def problem(self, labels: Tensor, outputs: int) -> str | None:
        """Return what is wrong with one row's labels for a model with `outputs` outputs, as a sentence, or None."""
        raise NotImplementedError


class Categorical(Likelihood):
    """One class of several: logits `[batch, *position, class]`, labels `[batch, *position]` or `IGNORE`."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy `[batch]`."""
        losses = F.cross_entropy(_wide(output).flatten(0, -2), labels.flatten().long(), reduction="none", ignore_index=IGNORE)
        return _total(losses.view(labels.shape))

    def odds(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return `z_label - logsumexp(z_others)`; never a difference of near-equal logarithms."""
        logits, real = _wide(output), labels != IGNORE
        chosen = torch.where(real, labels, 0).long().unsqueeze(-1)
        others = logits.scatter(-1, chosen, float("-inf"))
        return logits.gather(-1, chosen).squeeze(-1) - others.logsumexp(-1), real

    def sample(self, output: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """Return classes drawn from the softmax by inverse CDF."""
        logits = output.detach().flatten(0, -2)
        draws = noise.uniform(*labels.shape[1:]).flatten().to(logits.device, torch.float64)
        step = max(1, _SLICE // logits.shape[-1])
        drawn = [
            torch.searchsorted(logits[at : at + step].double().softmax(-1).cumsum(-1), draws[at : at + step, None])
            for at in range(0, len(logits), step)
        ]
        # The last cumulative sum may round to less than 1.
        sampled = torch.cat(drawn).view(labels.shape).clamp_(max=logits.shape[-1] - 1)
        return torch.where(labels == IGNORE, labels, sampled)

    def columns(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return `sqrt(p_c) (z_c - p . z)` for every position and class c, p held fixed."""
        logits = _wide(output)
        p = logits.detach().softmax(-1)
        columns = p.sqrt() * (logits - (p * logits).sum(-1, keepdim=True))
        return (columns * (labels != IGNORE).unsqueeze(-1)).flatten(1).T

    def mismatch(self, output: Tensor, labels: Tensor) -> str | None:
        """Compare `[batch, *position, class]` with `[batch, *position]`."""
        if output.dim() > 1 and output.shape[:-1] == labels.shape:
            return None
        return (
            f"the model gives {tuple(output.shape)} for labels of shape {tuple(labels.shape)}. Classification takes logits "
            "[batch, ..., class] and one class number for each: labels of the logits' shape without its last axis."
        )

    def problem(self, labels: Tensor, outputs: int) -> str | None:
        """Return what is wrong with labels that are no class numbers."""
        if labels.is_floating_point():
            return f"label {labels.tolist()!r} is not an integer. Classification takes class numbers from 0 to {outputs - 1}."
        wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= outputs))]
        if not wrong.numel():
            return None
        return (
            f"label {wrong.flatten()[0].item()} is out of range: the model has {outputs} classes, "
            f"so labels run from 0 to {outputs - 1}. Correct the row or the model's number of outputs."
        )


class Bernoulli(Likelihood):
    """Several yes-or-no labels: logits and labels (from 0 to 1) `[batch, *label]`."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the binary cross-entropy `[batch]`."""
        logits = _wide(output)
        return _total(F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none"))

    def odds(self, output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-odds of each label as it is given; of labels between 0 and 1 the loss is no function of them."""
        logits = _wide(output)
        return (2.0 * labels.to(logits.dtype) - 1.0) * logits, torch.ones_like(labels, dtype=torch.bool)

    def sample(self, output: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """Return labels drawn independently of each other."""
        p = output.detach().double().sigmoid()
        return (noise.uniform(*output.shape[1:]).to(p) < p).to(_wide(output).dtype)

    def columns(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return `sqrt(p (1 - p)) z` for every label, p held fixed."""
        logits = _wide(output)
        p = logits.detach().sigmoid()
        return ((p * (1.0 - p)).sqrt() * logits).flatten(1).T

    def mismatch(self, output: Tensor, labels: Tensor) -> str | None:
        """Compare the two shapes."""
        if output.shape == labels.shape:
            return None
        return (
            f"the model gives {tuple(output.shape)} for labels of shape {tuple(labels.shape)}. Multi-label classification takes "
            "a number from 0 to 1 per class; for one class per row, give integers."
        )

    def problem(self, labels: Tensor, outputs: int) -> str | None:
        """Return what is wrong with labels that are not a number from 0 to 1 per class."""
        if labels.numel() == outputs and bool(((labels >= 0) & (labels <= 1)).all()):
            return None
        return (
            f"labels {labels.tolist()!r} cannot be used: multi-label classification takes {outputs} numbers from 0 to 1, one per "
            "class. Correct the row; for one class per row, give an integer."
        )


class Gaussian(Likelihood):
    """Numbers with unit variance around the output `[batch, *number]`; labels of as many numbers."""

    has_odds = False

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return half the squared error `[batch]`."""
        output = _wide(output)
        # `[batch]` targets against `[batch, 1]` outputs would broadcast to a square without the view.
        return _total(0.5 * (output - labels.view_as(output).to(output.dtype)).square())

    def sample(self, output: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """Return numbers drawn around the output."""
        output = _wide(output.detach())
        return output + torch.special.ndtri(noise.uniform(*output.shape[1:])).to(output)

    def columns(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the outputs themselves."""
        output = _wide(output)
        return output.flatten(1).T if output.dim() > 1 else output.unsqueeze(0)

    def mismatch(self, output: Tensor, labels: Tensor) -> str | None:
        """Compare how many numbers there are."""
        if output.numel() == labels.numel():
            return None
        return (
            f"the model gives {tuple(output.shape)} for targets of shape {tuple(labels.shape)}. "
            "Regression compares them number by number: give targets of the output's size."
        )

    def problem(self, labels: Tensor, outputs: int) -> str | None:
        """Return what is wrong with targets that are not finite."""
        if bool(torch.isfinite(labels).all()):
            return None
        return "its target is NaN or infinite. Drop the row or fill the value in."


def _wide(output: Tensor) -> Tensor:
    """Half precision has too few digits for a softmax."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _total(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if values.dim() > 1 else values
