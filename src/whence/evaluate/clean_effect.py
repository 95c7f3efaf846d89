"""What dropping rows bought: train again without them, and measure the queries.

Three kinds of training set, on the same seeds: all rows; the rows that stay; and, because fewer rows alone change a model,
all rows without as many random ones, from the same classes, drawn anew for every repeat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.evaluate.decision import Decision
from whence.evaluate.estimates import mean_estimate
from whence.evaluate.retrain import Procedure, RetrainSpec, Running, repeat_seed, retrain_all

ALL, CLEANED, RANDOM = "all rows", "cleaned", "random rows dropped"


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a kind of training set changes a figure against training on all rows.

    Attributes:
        mean: mean over queries and repeats with this training set.
        change: less that with all rows.
        low, high: 95% bootstrap interval of the change over queries, the trained models taken as they are; NaN with one query.
    """

    mean: float
    change: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return the figures as JSON values, null for the ends of an interval that is not there."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class CleaningEffect:
    """What the queries' measurements are after training on all rows, on the rows that stay, and without random rows.

    Attributes:
        measurements: for each kind of training set, float64 `[repeat, query]`; lower is better.
        margin: the measurement is minus the log-odds of the label, so that below 0 the query is read right.
        resamples, seed: of the bootstrap.
    """

    measurements: Mapping[str, Tensor]
    margin: bool = False
    resamples: int = 1000
    seed: int = 0

    def measurement(self, kind: str) -> Change:
        """Return the change of the mean measurement; below 0 is better."""
        return self._change({name: values.mean(0) for name, values in self.measurements.items()}, kind)

    def accuracy(self, kind: str) -> Change | None:
        """Return the change of the share of queries that are read right; None unless the measurement is a margin."""
        if not self.margin:
            return None
        return self._change({name: (values < 0).double().mean(0) for name, values in self.measurements.items()}, kind)

    def _change(self, per_query: Mapping[str, Tensor], kind: str) -> Change:
        values = per_query[kind]
        change = mean_estimate(values - per_query[ALL], resamples=self.resamples, seed=self.seed)
        return Change(mean=float(values.mean()), change=change.value, low=change.low, high=change.high)

    def lines(self) -> list[str]:
        """Return the table for people."""
        repeats, queries = self.measurements[ALL].shape
        lines = [f"trained again {repeats} times on each, {queries} queries; change against all rows with its 95% interval"]
        figures = {"measurement": (self.measurement, ".4f", "lower is better"), "accuracy": (self.accuracy, ".2%", "higher is better")}
        for name, (figure, digits, better) in figures.items():
            found = {kind: change for kind in self.measurements if (change := figure(kind)) is not None}
            lines += [f"{name} ({better})"] if found else []
            for kind, one in found.items():
                interval = "" if math.isnan(one.low) else f" [{one.low:+{digits}}, {one.high:+{digits}}]"
                told = "" if kind == ALL else f"  {one.change:+{digits}}{interval}"
                lines.append(f"  {kind:<20} {one.mean:>10{digits}}{told}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            kind: {
                "measurement": self.measurement(kind).to_json(),
                "accuracy": None if (one := self.accuracy(kind)) is None else one.to_json(),
            }
            for kind in self.measurements
        }


def retrain_cleaned(
    procedure: Procedure,
    decision: Decision,
    *,
    repeats: int = 3,
    margin: bool = False,
    seed: int = 0,
    **running: Unpack[Running],
) -> CleaningEffect:
    """Train on all rows, on the rows that stay, and without as many random rows; measure the queries after each.

    Args:
        procedure: trains and measures; its training rows are those of the decision.
        decision: which rows go.
        repeats: trainings of each kind, with the same seeds for all kinds.
        margin: as of `CleaningEffect`.
        seed: of the trainings, the random rows and the bootstrap.
        running: see `whence.evaluate.retrain.Running`.

    Raises:
        ConfigError: no row is dropped, or there is no repeat.
    """
    if not decision.dropped or repeats < 1:
        raise ConfigError(f"{len(decision.dropped)} rows are dropped and repeats={repeats!r}; to compare, one of each is needed at least.")
    every = tuple(range(len(decision.scores)))
    specs = []
    for repeat in range(repeats):
        training_seed = repeat_seed(seed, 0, repeat)
        kinds = (every, decision.kept, _without_random_rows(decision, repeat_seed(seed, 1, repeat)))
        specs += [RetrainSpec(key=procedure.key, rows=rows, seed=training_seed) for rows in kinds]
    results = retrain_all(procedure, specs, **running)
    kinds_found = {kind: torch.stack(results[place::3]) for place, kind in enumerate((ALL, CLEANED, RANDOM))}
    return CleaningEffect(measurements=kinds_found, margin=margin, seed=seed)


def _without_random_rows(decision: Decision, seed: int) -> tuple[int, ...]:
    """Return all rows but as many random ones of every class as the decision drops."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.zeros(len(decision.scores), dtype=torch.int64) if decision.classes is None else decision.classes
    lost = classes[list(decision.dropped)]
    gone: set[int] = set()
    for label in lost.unique().tolist():
        members = torch.nonzero(classes == label).flatten()
        drawn = torch.randperm(len(members), generator=generator)[: int((lost == label).sum())]
        gone |= set(members[drawn].tolist())
    return tuple(row for row in range(len(classes)) if row not in gone)
