"""The base of all tasks, with the defaults that plain models need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from whence.errors import ConfigError


class Noise(Protocol):
    """Uniform random numbers that depend on the example alone, not on its batch or place in it."""

    def uniform(self, *shape: int) -> Tensor:
        """Return `[batch, *shape]` in the open interval (0, 1); row b is keyed by example b's id."""
        ...


Masks = Tensor | Mapping[str, Tensor | Sequence[Tensor]] | None
"""Which positions are real: everywhere, or by layer pattern."""


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

    def columns(self, model: nn.Module, batch: Any) -> Tensor:
        """Return scalar functions of the model, `[column, batch]`, whose gradients make up each example's Fisher matrix.

        The outer products of an example's column gradients sum to the expectation of the outer product of the gradient
        of `sampled_loss` over the drawn labels; for the usual losses that is its Gauss-Newton matrix. A column of zeros
        changes nothing, so examples in one batch may have different numbers of them.
        """
        raise ConfigError(
            f"{type(self).__name__} does not define columns, which this solver needs. "
            "Define columns(model, batch) -> [column, batch], or use solver='direct'."
        )

    def log_odds(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the log-odds of every label against all others, `[batch, label]`, and which of them are trained (bool, alike).

        A label is a token, or the class of an example. `softplus(-log_odds)` of the trained ones sum to `loss`.
        """
        raise ConfigError(
            f"{type(self).__name__} does not define log_odds, which linearise needs. "
            "Define log_odds(model, batch) -> ([batch, label], [batch, label]), or use one of whence.tasks."
        )

    def padding_mask(self, batch: Any) -> Masks:
        """Return `[batch, position]` (nonzero = a real position), one such mask per layer pattern, or None.

        A layer that is called on several sequences has a list of masks, one for each of its calls in order.

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


def check_model_and_task(model: Any, task: Any) -> None:
    """Check what a user gave.

    Raises:
        ConfigError: the model is no module, or the task is no task object.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; give a torch.nn.Module. Attributor.from_pretrained opens a folder.")
    if isinstance(task, type) or not isinstance(task, Task):
        what = f"the class {task.__name__}" if isinstance(task, type) else f"a {type(task).__name__}"
        raise ConfigError(f"task is {what}; give a task object: whence.tasks.Classification(), or one of your own (whence.tasks.Task).")
