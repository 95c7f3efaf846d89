"""A task as three choices: what the model gives, what it should give, and the likelihood that compares them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from whence.errors import ConfigError, DataError
from whence.tasks.base import Noise, Task
from whence.tasks.likelihoods import Likelihood


class ModelledTask(Task):
    """Losses, measurements, samples and columns of a model whose output is the parameter of a likelihood.

    Subclasses give `output`, `targets` and `likelihood`. `measure` is `"loss"`, or a name for minus the log-odds of the
    labels (the measure of Park et al., "TRAK: Attributing Model Behavior at Scale", 2023, with its sign turned so that,
    as for a loss, lower is better and a positive score means help).
    """

    measure: str = "loss"
    _outputs = 0

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the model's output, `[batch, ..., output]`."""
        raise NotImplementedError

    def targets(self, batch: Any) -> Tensor:
        """Return the labels of a batch, aligned with the output."""
        raise NotImplementedError

    def likelihood(self, model: nn.Module, outputs: int, labels: Tensor) -> Likelihood:
        """Return the distribution of `labels` given `outputs` numbers on the output's last axis."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the negative log-likelihood of the labels, `[batch]`."""
        likelihood, output, labels = self._parts(model, batch)
        return likelihood.loss(output, labels)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the chosen measurement, `[batch]`.

        Raises:
            ConfigError: the labels have no log-odds, as those of a regression.
        """
        if self.measure == "loss":
            return self.loss(model, batch)
        likelihood, output, labels = self._parts(model, batch)
        self._check_measure(likelihood)
        return likelihood.margin(output, labels)

    def log_odds(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Return every label's log-odds `[batch, label]`, and which labels are trained.

        Raises:
            ConfigError: the labels have no log-odds, as those of a regression.
        """
        likelihood, output, labels = self._parts(model, batch)
        if not likelihood.has_odds:
            raise ConfigError("a regression has no log-odds. linearise takes models of classes, tokens or yes-or-no labels.")
        odds, trained = likelihood.odds(output, labels)
        return odds.reshape(len(labels), -1), trained.reshape(len(labels), -1)

    def sampled_loss(self, model: nn.Module, batch: Any, noise: Noise) -> Tensor:
        """Return the loss `[batch]` of labels drawn from the model's output."""
        likelihood, output, labels = self._parts(model, batch)
        return likelihood.loss(output, likelihood.sample(output, labels, noise))

    def columns(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the likelihood's columns, `[column, batch]`: one for each position and output."""
        likelihood, output, labels = self._parts(model, batch)
        return likelihood.columns(output, labels)

    def prepare(self, model: nn.Module, batch: Any) -> None:
        """Learn the number of outputs.

        Raises:
            DataError: outputs and labels do not fit. ConfigError: there is no such measurement for this model.
        """
        likelihood, output, labels = self._parts(model, batch)
        self._outputs = output.shape[-1] if output.dim() > 1 else 1
        self._check_measure(likelihood)
        mismatch = likelihood.mismatch(output, labels)
        if mismatch is not None:
            raise DataError(mismatch)

    def _parts(self, model: nn.Module, batch: Any) -> tuple[Likelihood, Tensor, Tensor]:
        output, labels = self.output(model, batch), self.targets(batch)
        return self.likelihood(model, output.shape[-1] if output.dim() > 1 else 1, labels), output, labels

    def _check_labels(self, model: nn.Module, index: int, labels: Tensor) -> None:
        problem = self.likelihood(model, self._outputs, labels).problem(labels, self._outputs)
        if problem is not None:
            raise DataError(f"row {index}: {problem}")

    def _check_measure(self, likelihood: Likelihood) -> None:
        if self.measure != "loss" and not likelihood.has_odds:
            raise ConfigError(f"measurement={self.measure!r} is not defined for a regression, which has no log-odds; choose 'loss'.")


def known_measure(measurement: str, allowed: tuple[str, ...]) -> str:
    """Return `measurement` if it is allowed.

    Raises:
        ConfigError: it is not.
    """
    if measurement not in allowed:
        raise ConfigError(f"measurement={measurement!r} is not known; choose {' or '.join(map(repr, allowed))}.")
    return measurement
