"""A model's outputs to first order, and losses of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.errors import ConfigError, DataError

Loss = Literal["logistic", "squared"]
"""`logistic`: `softplus(-f)` of an output `f`, the cross-entropy where `f` is the log-odds of what is true. For labels of two
signs, flip outputs and gradients of the negative rows. `squared`: `f^2 / 2`, where `f` is the output less its target."""

_VALUES = 2**24
"""Outputs held at a time."""


@dataclass(frozen=True, kw_only=True)
class Linearised:
    """A model's outputs on some rows to first order: `outputs + gradients @ w`, for w in k projected dimensions.

    A row is a token (or an example, where tokens are averaged): its output is the log-odds of the true token against all others,
    `f = z_y - logsumexp(z_others)`, so that `softplus(-f)` is exactly the cross-entropy of the token.

    Attributes:
        outputs: float32 `[row]`.
        gradients: float32 `[row, k]`.
        example: int64 `[row]`, place of the example a row is of, rising.
        weights: float32 `[row]`, its share in its example's loss (1/T of T trained tokens: a mean; sums to 1 per example).
        examples: how many examples.

    Raises:
        DataError: shapes do not fit, a number is not finite, examples are not rising or have no row, or weights of an example are
            negative or do not sum to 1.
    """

    outputs: Tensor
    gradients: Tensor
    example: Tensor
    weights: Tensor
    examples: int

    def __post_init__(self) -> None:
        rows = len(self.outputs)
        if self.outputs.shape != (rows,) or self.gradients.dim() != 2 or len(self.gradients) != rows or rows < 1:
            raise DataError(
                f"outputs have shape {tuple(self.outputs.shape)} and gradients {tuple(self.gradients.shape)}; give [row] and [row, k]."
            )
        for name in ("example", "weights"):
            if getattr(self, name).shape != (rows,):
                raise DataError(f"{name} has shape {tuple(getattr(self, name).shape)}; give one entry for each of {rows} rows.")
        for name in ("outputs", "gradients", "weights"):
            if not (values := getattr(self, name)).is_floating_point() or not torch.isfinite(values).all():
                raise DataError(f"{name} must be finite floating-point numbers; find the rows with NaN or infinity and leave them out.")
        self._check_examples()

    def _check_examples(self) -> None:
        if self.example.dtype != torch.int64 or (self.example.diff() < 0).any() or int(self.example[0]) < 0:
            raise DataError("example must be int64, 0 or more and rising: put the rows of an example beside each other, in its order.")
        counts = self.example.bincount(minlength=self.examples)
        if len(counts) != self.examples or not counts.all():
            raise DataError(
                f"rows are of {int((counts > 0).sum())} examples, the last in place {int(self.example[-1])}, but examples={self.examples}; "
                "every example needs a row. Leave examples without trained tokens out."
            )
        sums = torch.zeros(self.examples, dtype=torch.float64).index_add_(0, self.example, self.weights.double())
        if (self.weights < 0).any() or (wrong := (sums - 1).abs() > 1e-4).any():
            first = int(wrong.nonzero()[0]) if not (self.weights < 0).any() else int(self.example[self.weights < 0][0])
            raise DataError(
                f"the weights of example {first} are negative or sum to {float(sums[first]):.6g}; give shares that sum to 1, such as 1/T."
            )

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.outputs)

    @property
    def dimensions(self) -> int:
        """How many projected dimensions, k."""
        return self.gradients.shape[1]

    def moved(self, w: Tensor) -> Tensor:
        """Return the outputs at `w`, `[row]` for `[k]` and `[subset, row]` for `[subset, k]`, in the type of `w`.

        Raises:
            DataError: `w` has not k entries.
        """
        if w.dim() not in {1, 2} or w.shape[-1] != self.dimensions:
            raise DataError(f"w has shape {tuple(w.shape)}; give [k] or [subset, k] with k={self.dimensions}.")
        return self.outputs.to(w) + w @ self.gradients.to(w).T

    def loss(self, w: Tensor, loss: Loss = "logistic") -> Tensor:
        """Return the loss of every example at `w`: `[example]` for `[k]`, `[subset, example]` for `[subset, k]`, in the type of `w`."""
        many = w.reshape(-1, w.shape[-1])
        step = max(1, _VALUES // self.rows)
        found = [self.example_sums(row_loss(self.moved(part), loss)) for part in many.split(step)] or [w.new_zeros(0, self.examples)]
        return torch.cat(found).reshape(*w.shape[:-1], self.examples)

    def example_sums(self, values: Tensor) -> Tensor:
        """Return the weighted sums over each example's rows, `[..., example]`, of values `[..., row]`."""
        sums = values.new_zeros(*values.shape[:-1], self.examples)
        return sums.index_add_(values.dim() - 1, self.example, values * self.weights.to(values))

    def group_sums(self, values: Tensor, groups: Tensor, count: int) -> Tensor:
        """Return the weighted sums over the rows of each group's examples, `[..., group]`, of values `[..., row]`.

        Args:
            values: one number for each row.
            groups: int64 `[example]`, the group of every example, below `count`.
            count: how many groups.
        """
        sums = values.new_zeros(*values.shape[:-1], count)
        return sums.index_add_(values.dim() - 1, groups[self.example], values * self.weights.to(values))


def check_loss(loss: str) -> None:
    """Check the name of a loss.

    Raises:
        ConfigError: there is no such loss.
    """
    if loss not in get_args(Loss):
        raise ConfigError(f"loss={loss!r}: choose {' or '.join(map(repr, get_args(Loss)))}.")


def row_loss(outputs: Tensor, loss: Loss) -> Tensor:
    """Return the loss of every output, of the same shape."""
    return F.softplus(-outputs) if loss == "logistic" else outputs.square() / 2


def row_slope(outputs: Tensor, loss: Loss) -> Tensor:
    """Return the derivative of the loss by the output."""
    return -torch.sigmoid(-outputs) if loss == "logistic" else outputs


def row_curvature(outputs: Tensor, loss: Loss) -> Tensor:
    """Return the second derivative of the loss by the output: `p (1 - p)`, or 1."""
    return torch.sigmoid(outputs) * torch.sigmoid(-outputs) if loss == "logistic" else torch.ones_like(outputs)
