"""From a recipe to what first-order estimates are made of: outputs and gradients, groups, and real fine-tunes to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError, DataError
from whence.evaluate.retrain import Running, retrain_bank
from whence.evidence.retraining import measure_of, procedure_of
from whence.recipes.base import Options, Recipe
from whence.refit.linear import Linearised
from whence.refit.predict import Metric, OptionRows, Predictions, Target, predict
from whence.refit.projection import Kind
from whence.refit.subsets import Groups, Subsets, gradient_clusters, groups_of, single_groups
from whence.tasks import CausalLM, Seq2SeqLM
from whence.tasks.likelihoods import IGNORE


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """How outputs and gradients are measured.

    Attributes:
        projection, dimension: see `whence.refit.projection.ProjectionOptions`.
        per_token: a row for each trained token; else one for each example, the mean over its tokens.
        by: what training rows are grouped by: a column (`"column"`, as the recipe has it), `"row"`, or clusters of gradients
            (`"cluster:N"`).
        seed: of the random directions and of clusters.
    """

    projection: Kind = "pca"
    dimension: int = 400
    per_token: bool = False
    by: str = "column"
    seed: int = 0

    def __post_init__(self) -> None:
        clusters(self.by)


def clusters(by: str) -> int | None:
    """Return the number of clusters that training rows are grouped into; None: they are grouped otherwise.

    Raises:
        ConfigError: it says no grouping.
    """
    kind, colon, number = by.partition(":")
    if by in ("column", "row"):
        return None
    if kind != "cluster" or not colon or not number.isdecimal() or int(number) < 2:
        raise ConfigError(f"by={by!r} groups nothing; give 'column', 'row' or 'cluster:N' with N of 2 or more.")
    return int(number)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A recipe's model to first order.

    Attributes:
        train: training rows.
        groups: theirs.
        target: validation rows, and their options where they choose from any.
        tokens: trained tokens of each training row, int64 `[example]`.
        query_tokens: those of each query.
    """

    train: Linearised
    groups: Groups
    target: Target
    tokens: Tensor
    query_tokens: Tensor


def linearise_recipe(attributor: Attributor, recipe: Recipe, settings: GradientSettings, *, overwrite: bool = False) -> Linear:
    """Measure a recipe's training rows, queries and options; what is in the run folder already is read.

    Raises:
        ConfigError: the recipe has no groups, or its rows cannot be measured so. Others of `Attributor.linearise`.
    """
    if settings.by == "column" and recipe.groups is None:
        raise ConfigError(f"the rows of recipe {recipe.name} are of no group; group them by='cluster:40', or by='row'.")
    common: dict[str, Any] = {"per_token": settings.per_token, "overwrite": overwrite}
    train = attributor.linearise(recipe.train, projection=settings.projection, dimension=settings.dimension, seed=settings.seed, **common)
    queries = attributor.linearise(recipe.queries, like=train, **common)
    options = None
    if recipe.options is not None:
        linear = attributor.linearise(recipe.options.rows, like=train, name="options", **common)
        options = OptionRows(linear=linear, query=recipe.options.query, gold=recipe.options.gold)
    target = Target(linear=queries, options=options, groups=recipe.query_groups, query_groups=recipe.query_groups if options else None)
    tokens, query_tokens = (trained_tokens(recipe, rows) for rows in (recipe.train, recipe.queries))
    return Linear(train=train, groups=_groups(recipe, train, settings), target=target, tokens=tokens, query_tokens=query_tokens)


def _groups(recipe: Recipe, train: Linearised, settings: GradientSettings) -> Groups:
    count = clusters(settings.by)
    if count is not None:
        return gradient_clusters(train, count, seed=settings.seed)
    return single_groups(train.examples) if settings.by == "row" else groups_of(list(recipe.groups or ()))


def trained_tokens(recipe: Recipe, rows: Sequence[Any]) -> Tensor:
    """Return how many labels of each row are trained, int64 `[row]`; one where a row has one label."""
    if not isinstance(recipe.task, CausalLM | Seq2SeqLM):
        return torch.ones(len(rows), dtype=torch.int64)
    # The first token of a decoder's row is never predicted.
    first = 1 if isinstance(recipe.task, CausalLM) else 0
    return torch.tensor([sum(int(label) != IGNORE for label in _labels(row)[first:]) for row in (rows[i] for i in range(len(rows)))])


def _labels(row: Any) -> Sequence[int]:
    found = row.get("labels")
    return row["input_ids"] if found is None else found


@dataclass(frozen=True, kw_only=True)
class FineTunes:
    """Real fine-tunes on subsets.

    Attributes:
        subsets: what they were made on.
        losses: mean loss per trained token of every query, float64 `[subset, repeat, query]`.
        option_losses: the same of every option `[subset, repeat, option]`; None without options.
        options: which these are.
        groups: of each query, or none.
    """

    subsets: Subsets
    losses: Tensor
    option_losses: Tensor | None
    options: Options | None
    groups: Sequence[str] | None

    def metric(self, name: str) -> Tensor:
        """Return a metric of `Predictions`, `[subset, repeat]`.

        Raises:
            ConfigError: it was not measured.
        """
        metric, slash, group = name.partition("/")
        units = self._units(metric)
        if not slash:
            return units.mean(-1)
        inside = torch.tensor([own == group for own in self.groups or ()])
        if not inside.any():
            raise ConfigError(f"metric={name!r}: no query is of group {group!r}.")
        return units[..., inside].mean(-1)

    def take(self, places: Sequence[int]) -> FineTunes:
        """Return some of them."""
        some = list(places)
        options = None if self.option_losses is None else self.option_losses[some]
        return replace(self, subsets=self.subsets.take(some), losses=self.losses[some], option_losses=options)

    def _units(self, metric: str) -> Tensor:
        """Return a metric of every query, `[subset, repeat, query]`."""
        if metric == "loss":
            return self.losses
        if self.option_losses is None or self.options is None or metric not in ("accuracy", "probability"):
            raise ConfigError(f"metric={metric!r} was not measured: the queries choose from no options.")
        # Options as rows of one output each, whose loss is what was measured, so that one code judges both sides.
        outputs = -torch.log(torch.expm1(self.option_losses.clamp(min=1e-12)))
        count = outputs.shape[-1]
        found = []
        for own in outputs.flatten(0, 1).float():
            linear = Linearised(
                outputs=own, gradients=torch.zeros(count, 1), example=torch.arange(count), weights=torch.ones(count), examples=count
            )
            rows = OptionRows(linear=linear, query=self.options.query, gold=self.options.gold)
            kind: Metric = "accuracy" if metric == "accuracy" else "probability"
            found.append(rows.units(torch.zeros(1, 1, dtype=torch.float64), kind)[0])
        return torch.stack(found).unflatten(0, outputs.shape[:2])


def fine_tune(recipe: Recipe, linear: Linear, subsets: Subsets, *, repeats: int, seed: int = 0, **running: Unpack[Running]) -> FineTunes:
    """Fine-tune on subsets, each from the recipe's start with the same seeds, and measure queries and options.

    Those that were made before are read from the folder in `running`.

    Raises:
        ConfigError: the recipe cannot be trained again, or does not measure its loss.
    """
    if measure_of(recipe) not in ("loss", None):
        raise ConfigError(
            f"recipe {recipe.name} measures {measure_of(recipe)}, and fine-tunes are compared by loss; open it with --measurement loss."
        )
    procedure: Any = procedure_of(recipe)
    if recipe.options is not None:
        procedure = replace(procedure, with_options=True)
    bank = retrain_bank(procedure, subsets.example_masks(), repeats=repeats, seed=seed, common_seeds=True, **running)
    queries = len(recipe.queries)
    options = 0 if recipe.options is None else len(recipe.options.rows)
    if bank.measurements.shape[-1] != queries + options:
        raise DataError(f"retraining returned {bank.measurements.shape[-1]} measurements for {queries} queries and {options} options.")
    return FineTunes(
        subsets=subsets,
        losses=bank.measurements[..., :queries] / linear.query_tokens.double(),
        option_losses=bank.measurements[..., queries:] if options else None,
        options=recipe.options,
        groups=recipe.query_groups,
    )


def at_the_start(linear: Linear) -> Predictions:
    """Return the metrics of the model as it is, `w = 0`."""
    return predict(linear.target, torch.zeros(1, linear.train.dimensions, dtype=torch.float64))
