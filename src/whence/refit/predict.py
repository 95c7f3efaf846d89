"""What refits predict of validation examples: losses, and which of several answers a model would choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.linear import Linearised

Metric = Literal["loss", "accuracy", "probability"]
"""`loss`: mean over an example's tokens of the cross-entropy. `accuracy`: whether the option with the least mean token loss is
gold. `probability`: of the gold option, where options have the chances `softmax(-loss)`: a smooth stand-in for accuracy."""

_VALUES = 2**22
"""Outputs `[subset, row]` held at a time."""


@dataclass(frozen=True, kw_only=True)
class OptionRows:
    """Options of queries to first order: every option of a query is an example, the same prompt with another answer.

    Attributes:
        linear: the options' rows.
        query: int64 `[option]`, which query an option is of, from 0.
        gold: bool `[option]`; one of each query is.

    Raises:
        DataError: sizes do not fit, or a query has not one gold option and another.
    """

    linear: Linearised
    query: Tensor
    gold: Tensor

    def __post_init__(self) -> None:
        options = self.linear.examples
        if self.query.shape != (options,) or self.gold.shape != (options,) or self.gold.dtype != torch.bool:
            raise DataError(f"query {tuple(self.query.shape)} and gold {tuple(self.gold.shape)}: give both for each of {options} options.")
        if self.query.dtype != torch.int64 or int(self.query.min()) < 0:
            raise DataError("query must be int64 numbers from 0.")
        golds, counts = self.query[self.gold].bincount(minlength=self.queries), self.query.bincount()
        if (wrong := (golds != 1) | (counts < 2)).any():
            first = int(wrong.nonzero()[0])
            raise DataError(
                f"query {first} has {int(counts[first])} options, {int(golds[first])} of them gold; a query has 2 or more, 1 gold."
            )

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return int(self.query.max()) + 1

    def units(self, w: Tensor, metric: Metric) -> Tensor:
        """Return `accuracy` or `probability` of every query, `[..., query]`, for `w` `[..., k]`.

        Where options tie for the least loss, gold among them, a query has its share: 1 over how many tie.
        """
        return chosen(self.linear.loss(w), self.query, self.gold, metric)


def chosen(losses: Tensor, query: Tensor, gold: Tensor, metric: Metric) -> Tensor:
    """Return `accuracy` or `probability` of every query, `[..., query]`, of the options' mean token losses `[..., option]`.

    Args:
        losses: of options, estimated or measured.
        query, gold: as of `OptionRows`.
        metric: which.
    """
    scores, right = -losses, gold.to(losses)
    index = query.to(losses.device).expand_as(scores)
    empty = scores.new_zeros(*scores.shape[:-1], int(query.max()) + 1)
    top = torch.full_like(empty, -torch.inf).scatter_reduce(-1, index, scores, "amax")
    if metric == "accuracy":
        first = (scores >= top.gather(-1, index)).to(losses)
        return empty.scatter_add(-1, index, first * right) / empty.scatter_add(-1, index, first)
    mass = (scores - top.gather(-1, index)).exp()
    return empty.scatter_add(-1, index, mass * right) / empty.scatter_add(-1, index, mass)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Validation examples and what is to be known of them.

    Attributes:
        linear: their rows (with the gold answer); None where there are options only.
        options: of queries that are chosen among; None where there are none.
        groups: name of each validation example's group, or none.
        query_groups: the same of each query.
        split: which split of the data they are; it is recorded with whatever they are used for.
    """

    linear: Linearised | None = None
    options: OptionRows | None = None
    groups: Sequence[str] | None = None
    query_groups: Sequence[str] | None = None
    split: str = "validation"

    def __post_init__(self) -> None:
        if self.linear is None and self.options is None:
            raise ConfigError("there is nothing to predict: give validation rows, options, or both.")
        counts = (self.linear.examples if self.linear else 0, self.options.queries if self.options else 0)
        for name, count in zip(("groups", "query_groups"), counts, strict=True):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise DataError(f"{name} has {len(given)} entries for {count} validation examples; give one for each.")

    def check(self, metric: str) -> None:
        """Check that a metric can be predicted.

        Raises:
            ConfigError: there is no such metric, or no rows for it.
        """
        if metric not in get_args(Metric):
            raise ConfigError(f"metric={metric!r}: choose {', '.join(get_args(Metric))}.")
        if (self.linear if metric == "loss" else self.options) is None:
            raise ConfigError(f"metric={metric!r} needs {'validation rows' if metric == 'loss' else 'options'}, which were not given.")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What can be predicted."""
        return tuple(metric for metric in get_args(Metric) if (self.linear if metric == "loss" else self.options) is not None)

    def names(self, metric: Metric) -> Sequence[str] | None:
        """Return the group of each unit of a metric, or None."""
        return self.groups if metric == "loss" else self.query_groups

    def units(self, w: Tensor, metric: Metric) -> Tensor:
        """Return a metric of every validation example or query, `[..., unit]`, for `w` `[..., k]`; differentiable.

        Raises:
            ConfigError: as for `check`.
        """
        self.check(metric)
        if metric == "loss":
            assert self.linear is not None
            return self.linear.loss(w)
        assert self.options is not None
        return self.options.units(w, metric)


def higher_is_better(metric: str) -> bool:
    """Return whether a metric, or a group's (`loss/GROUP`), is the better the higher."""
    return metric.split("/", 1)[0] != "loss"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted metrics of subsets.

    Attributes:
        metrics: names: `loss`, `accuracy`, `probability`, each also as `NAME/GROUP`.
        values: float64 `[subset, metric]`; means over validation examples, or over a group's.
        split: of the data they are about.
        unconverged: of how many subsets the refit was given up before it converged.
    """

    metrics: tuple[str, ...]
    values: Tensor
    split: str
    unconverged: int = 0

    def of(self, metric: str) -> Tensor:
        """Return one metric, float64 `[subset]`.

        Raises:
            ConfigError: there is no such metric.
        """
        if metric not in self.metrics:
            raise ConfigError(f"metric={metric!r}: there are {', '.join(self.metrics)}.")
        return self.values[:, self.metrics.index(metric)]

    def table(self) -> list[dict[str, Any]]:
        """Return the long table: `{"subset", "metric", "value"}` for each."""
        return [
            {"subset": subset, "metric": metric, "value": value}
            for subset, own in enumerate(self.values.tolist())
            for metric, value in zip(self.metrics, own, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"split": self.split, "metrics": list(self.metrics), "values": self.values.tolist(), "unconverged": self.unconverged}


def predict(target: Target, w: Tensor, metrics: Sequence[Metric] | None = None) -> Predictions:
    """Return predicted metrics of subsets, each over all validation examples and over each of their groups.

    Args:
        target: validation examples.
        w: float64 `[subset, k]`, of `refit`.
        metrics: which; None: all that the target has rows for.

    Raises:
        ConfigError: a metric is unknown or has no rows. DataError: `w` does not fit.
    """
    names: list[str] = []
    columns: list[Tensor] = []
    for metric in metrics or target.metrics:
        units = unit_values(target, w, metric)
        names.append(metric)
        columns.append(units.mean(1))
        groups = target.names(metric)
        for group in dict.fromkeys(groups or ()):
            inside = torch.tensor([own == group for own in groups or ()])
            names.append(f"{metric}/{group}")
            columns.append(units[:, inside].mean(1))
    return Predictions(metrics=tuple(names), values=torch.stack(columns, 1).cpu(), split=target.split)


def unit_values(target: Target, w: Tensor, metric: Metric) -> Tensor:
    """Return a metric of every validation example or query at many `w`, `[subset, unit]`, some subsets at a time."""
    target.check(metric)
    linear = target.linear if metric == "loss" or target.options is None else target.options.linear
    step = max(1, _VALUES // (1 if linear is None else linear.rows))
    return torch.cat([target.units(part, metric) for part in w.split(step)])
