"""From a recipe to what first-order estimates are made of: outputs and gradients, groups, and real fine-tunes to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast, get_args

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.errors import ConfigError, DataError
from whence.evaluate.embeddings import only_looking
from whence.evaluate.retrain import Running, retrain_bank
from whence.evidence.retraining import measure_of, procedure_of
from whence.recipes.answers import option_losses
from whence.recipes.base import Options, Recipe
from whence.refit.linear import Linearised
from whence.refit.predict import Metric, OptionRows, Predictions, Target, chosen, predict
from whence.refit.projection import Kind, ProjectionOptions
from whence.refit.subsets import Groups, Subsets, gradient_clusters, groups_of, single_groups
from whence.runtime.batches import iterate_batches
from whence.tasks.likelihoods import IGNORE
from whence.tasks.modelled import ModelledTask
from whence.workbench import Size

_BATCH = 8  # of forward passes: logits of a large vocabulary are large


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
        ProjectionOptions(projection=self.projection, dimension=self.dimension, seed=self.seed)


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
        start: metrics of the model as it is, measured.
        weight_norm: norm of the parameters that are trained, as they are.
        parameters: how many parameters gradients are of.
        directions: how many random directions they were projected to first, where k are chosen from these.
    """

    train: Linearised
    groups: Groups
    target: Target
    tokens: Tensor
    query_tokens: Tensor
    start: Predictions
    weight_norm: float
    parameters: int
    directions: int | None


def check_recipe(recipe: Recipe, *, by: str, metric: str, fine_tunes: bool) -> None:
    """Check before any work that a recipe has what estimates need.

    Args:
        recipe: the recipe.
        by: of `GradientSettings`.
        metric: of `Predictions`: `loss`, `accuracy`, `probability`, or one of them as `NAME/GROUP`.
        fine_tunes: whether real fine-tunes are to be made.

    Raises:
        ConfigError: it has not.
    """
    if by == "column" and recipe.groups is None:
        raise ConfigError(f"the rows of recipe {recipe.name} are of no group; group them by='cluster:40', or by='row'.")
    name, slash, group = metric.partition("/")
    if name not in get_args(Metric):
        raise ConfigError(f"metric={metric!r}: choose {', '.join(get_args(Metric))}, or one of them for a group of queries, as loss/GROUP.")
    if name != "loss" and recipe.options is None:
        raise ConfigError(f"metric={metric!r}: the queries of recipe {recipe.name} choose from no options; choose loss.")
    if slash and group not in (recipe.query_groups or ()):
        known = ", ".join(dict.fromkeys(recipe.query_groups or ())) or "none"
        raise ConfigError(f"metric={metric!r}: no query of recipe {recipe.name} is of group {group!r}; groups of queries: {known}.")
    check_counted(recipe)
    if not fine_tunes:
        return
    procedure = procedure_of(recipe)
    if recipe.options is not None and not hasattr(procedure, "with_options"):
        raise ConfigError(
            f"the queries of recipe {recipe.name} choose from options, and its retraining measures none; give it a field with_options, as "
            "whence.recipes.retraining.Retraining has, or a recipe without options."
        )
    if measure_of(recipe) is None:
        raise ConfigError(
            f"the task of recipe {recipe.name}, {type(recipe.task).__name__}, does not say what it measures, and fine-tunes are compared "
            "by loss; use one of whence.tasks, or a subclass of whence.tasks.modelled.ModelledTask with measure='loss'."
        )
    if measure_of(recipe) != "loss":
        raise ConfigError(
            f"recipe {recipe.name} measures {measure_of(recipe)}, and fine-tunes are compared by loss; open it with --measurement loss."
        )


def linearise_recipe(
    attributor: Attributor, recipe: Recipe, settings: GradientSettings, *, batch_size: Size = "auto", overwrite: bool = False
) -> Linear:
    """Measure a recipe's training rows, queries and options; what is in the run folder already is read.

    Raises:
        ConfigError: the recipe has no groups, or its rows cannot be measured so. Others of `Attributor.linearise`.
    """
    check_recipe(recipe, by=settings.by, metric="loss", fine_tunes=False)
    common: dict[str, Any] = {"per_token": settings.per_token, "batch_size": batch_size, "overwrite": overwrite}
    train = attributor.linearise(recipe.train, projection=settings.projection, dimension=settings.dimension, seed=settings.seed, **common)
    queries = attributor.linearise(recipe.queries, like=train, **common)
    options = None
    if recipe.options is not None:
        linear = attributor.linearise(recipe.options.rows, like=train, name="options", **common)
        options = OptionRows(linear=linear, query=recipe.options.query, gold=recipe.options.gold)
    groups, split = recipe.query_groups, recipe.query_split or "validation"
    target = Target(linear=queries, options=options, groups=groups, query_groups=groups if options else None, split=split)
    tokens, query_tokens = (trained_tokens(recipe, rows) for rows in (recipe.train, recipe.queries))
    trained = [parameter.detach().double().norm() for parameter in recipe.model.parameters() if parameter.requires_grad]
    return Linear(
        train=train,
        groups=_groups(recipe, train, settings),
        target=target,
        tokens=tokens,
        query_tokens=query_tokens,
        start=_start(attributor, recipe, predict(target, torch.zeros(1, train.dimensions, dtype=torch.float64)), query_tokens),
        weight_norm=float(torch.stack(trained).norm()),
        parameters=sum(attributor.coverage.tracked.values()),
        directions=None if train.basis is None else len(train.basis),
    )


def _groups(recipe: Recipe, train: Linearised, settings: GradientSettings) -> Groups:
    count = clusters(settings.by)
    if count is not None:
        return gradient_clusters(train, count, seed=settings.seed)
    return single_groups(train.examples) if settings.by == "row" else groups_of(list(recipe.groups or ()))


def check_counted(recipe: Recipe) -> ModelledTask:
    """Return a recipe's task, of which trained labels can be counted.

    Raises:
        ConfigError: they cannot, so that the mean loss per label is not known.
    """
    if isinstance(recipe.task, ModelledTask):
        return recipe.task
    raise ConfigError(
        f"the task of recipe {recipe.name}, {type(recipe.task).__name__}, does not say how many labels of a row are trained, so that its "
        "mean loss is not known; use one of whence.tasks, or a subclass of whence.tasks.modelled.ModelledTask."
    )


def trained_tokens(recipe: Recipe, rows: Sequence[Any]) -> Tensor:
    """Return how many labels of each row are trained, int64 `[row]`.

    Raises:
        ConfigError: the task does not say.
    """
    task = check_counted(recipe)
    batches = iterate_batches(rows, range(len(rows)), batch_size=_BATCH, collate=recipe.collate, device="cpu")
    return torch.cat([(labels.reshape(len(labels), -1) != IGNORE).sum(1) for labels in (task.targets(batch.data) for batch in batches)])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses of queries and options as models really have them.

    Attributes:
        losses: mean loss per trained token of every query, float64 `[..., query]`.
        option_losses: the same of every option `[..., option]`; None without options.
        options: which these are.
        groups: of each query, or none.
    """

    losses: Tensor
    option_losses: Tensor | None
    options: Options | None
    groups: Sequence[str] | None

    def metric(self, name: str) -> Tensor:
        """Return a metric of `Predictions`, `[...]`: the mean over queries, or over those of a group.

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

    def _units(self, metric: str) -> Tensor:
        """Return a metric of every query, `[..., query]`."""
        if metric == "loss":
            return self.losses
        if self.option_losses is None or self.options is None or metric not in get_args(Metric):
            raise ConfigError(f"metric={metric!r} was not measured: the queries choose from no options.")
        return chosen(self.option_losses, self.options.query, self.options.gold, cast(Metric, metric))


@dataclass(frozen=True, kw_only=True)
class FineTunes(Measured):
    """Real fine-tunes on subsets; losses are `[subset, repeat, query]` and `[subset, repeat, option]`.

    Attributes:
        subsets: what they were made on.
    """

    subsets: Subsets

    def take(self, places: Sequence[int]) -> FineTunes:
        """Return some of them."""
        some = list(places)
        options = None if self.option_losses is None else self.option_losses[some]
        return replace(self, subsets=self.subsets.take(some), losses=self.losses[some], option_losses=options)


def fine_tune(recipe: Recipe, linear: Linear, subsets: Subsets, *, repeats: int, seed: int = 0, **running: Unpack[Running]) -> FineTunes:
    """Fine-tune on subsets, each from the recipe's start with the same seeds, and measure queries and options.

    Those that were made before are read from the folder in `running`.

    Raises:
        ConfigError: the recipe cannot be trained again, or does not measure its loss.
    """
    check_recipe(recipe, by="row", metric="loss", fine_tunes=True)
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


def _start(attributor: Attributor, recipe: Recipe, at_zero: Predictions, query_tokens: Tensor) -> Predictions:
    """Measure the model as it is: estimates at `w = 0` are not that, where log-odds are averaged over tokens."""
    found, options = [], None
    with only_looking(recipe.model, attributor.device):
        batches = iterate_batches(
            recipe.queries, range(len(recipe.queries)), batch_size=_BATCH, collate=recipe.collate, device=attributor.device
        )
        for batch in batches:
            found.append(recipe.task.loss(recipe.model, batch.data).double().cpu())
        if recipe.options is not None and recipe.collate is not None:
            options = option_losses(recipe.model, recipe.options, recipe.collate, batch_size=_BATCH)
    losses = torch.cat(found) / query_tokens.double()
    measured = Measured(losses=losses, option_losses=options, options=recipe.options, groups=recipe.query_groups)
    return replace(at_zero, values=torch.stack([measured.metric(name) for name in at_zero.metrics])[None])
