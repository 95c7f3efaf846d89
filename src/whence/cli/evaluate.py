"""The verbs of `whence evaluate`: evidence for and against scores, with the cheap baselines in every table."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe
from whence.cli.options import DataOptions, InverseOptions, RetrainOptions, RunOptions
from whence.cli.values import Count, Names, Numbers, Share, Switch, parse_damping, parse_response
from whence.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from whence.attributor import Attributor
    from whence.evaluate.estimates import Estimate
    from whence.recipes.base import Recipe

ScoreNames = Annotated[Names, Parameter(help="Scores to judge, by the names of their folders in the run folder: ekfac,identity.")]
_MEASURES = {"Spearman": "spearman", "Pearson": "pearson", "overlap of the top": "overlap"}
Baselines = Annotated[
    Names | None, Parameter(help="Baselines to compare with, separated by commas, for example random,bm25,loss. Default: all.")
]
Plot = Annotated[Path | None, Parameter(help="Also draw the result into this file, .png or .svg.")]


def lds(
    recipe: RecipeName,
    /,
    *,
    scores: ScoreNames,
    baselines: Baselines = None,
    masks: Count = 100,
    share: Share = 0.5,
    retraining: Annotated[RetrainOptions, Flat] = RetrainOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Linear datamodeling score: do scores rank models that were trained on random subsets? Interrupted, it continues.

    Args:
        masks: How many subsets.
        share: Share of the training rows in each.
    """
    from whence.evidence.compare import check_lds, lds_table

    again = retraining.given(repeats=5)
    check = partial(check_lds, masks=masks, share=share)
    attributor, found, orders = _orders(recipe, run, data, scores, baselines, check)
    made = lds_table(attributor, found, orders, masks=masks, share=share, seed=run.seed, **again)
    figures = made.to_json()
    rows = [
        [name, f"{one['lds']:.3f}", _interval(one["interval"]), _difference(one["minus_first"])] for name, one in figures["methods"].items()
    ]
    trust, ceiling = figures["reliability"], figures["ceiling"]
    known = "reliability unknown with one repeat" if trust is None else f"reliability {trust:.3f}, ceiling {ceiling:.3f}"
    lines = [
        f"LDS on {figures['subsets']} subsets, {figures['repeats']} retrains each, {figures['queries']} queries; {known}",
        *output.table(["scores", "LDS", "95% interval", f"less {scores[0]}"], rows),
    ]
    output.data(lines, {"recipe": found.name, **figures}, as_json=run.json, keep=attributor.run.sub("evaluations", "lds.json"))
    output.stage_table(attributor.stages)


def counterfactual(
    recipe: RecipeName,
    /,
    *,
    scores: ScoreNames,
    baselines: Baselines = None,
    remove: Numbers,
    mode: Literal["each", "sum"] = "each",
    queries: Numbers | None = None,
    plot: Plot = None,
    retraining: Annotated[RetrainOptions, Flat] = RetrainOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Remove the training rows that helped most, train again, and see how much worse queries get.

    Args:
        remove: How many rows, for example 20,40,60.
        mode: each: for every query its own rows. sum: the rows of the scores' sum over the queries, once for all.
        queries: Queries to take, for example 0,3,7. Default: all.
    """
    from whence.evidence.compare import check_counterfactual, counterfactual_of
    from whence.report.counterfactual import counterfactual_picture
    from whence.report.picture_files import check_picture

    check_picture(plot)
    again = retraining.given(repeats=3)
    check = partial(check_counterfactual, remove=remove, mode=mode, queries=queries)
    attributor, found, orders = _orders(recipe, run, data, scores, baselines, check)
    result = counterfactual_of(attributor, found, orders, remove=remove, mode=mode, queries=queries, seed=run.seed, **again)
    kept = attributor.run.sub("evaluations", "counterfactual.json")
    output.data(output.rendered(result.table()), {"recipe": found.name, **result.to_json()}, as_json=run.json, keep=kept)
    if plot is not None:
        counterfactual_picture(plot, result)
    output.stage_table(attributor.stages)


def agreement(first: Path, second: Path, /, *, query: Numbers | None = None, plot: Plot = None, json: Switch = False) -> None:
    """How well two files of scores agree, for example of float32 and bfloat16: correlation per query, overlap of the top ten.

    Args:
        first: Folder of scores, for example runs/mine/scores/ekfac.
        second: Folder of scores of the same queries and rows.
        query: Queries to draw. Default: the first.
        json: Print the data as JSON.
    """
    from whence.evaluate.agreement import agreement as agree
    from whence.evidence.saved import check_same_rows
    from whence.report.picture_files import check_picture
    from whence.report.scatter import scatter_picture
    from whence.scores.matrix import Scores

    check_picture(plot)
    left, right = Scores.load(first), Scores.load(second)
    one, other = left.values, right.values
    found = agree(one, other)
    check_same_rows(left, right)
    chosen = query or [0]
    if max(chosen) >= len(one):
        raise ConfigError(f"--query {max(chosen)}: there are {len(one)} queries, numbered from 0 to {len(one) - 1}.")
    figures = found.to_json()
    rows = [[name, f"{figures[key]['mean']:.4f}", _interval(figures[key]["interval"])] for name, key in _MEASURES.items()]
    lines = [
        f"{figures['queries']} queries, {found.left_out} left out",
        *output.table(["mean over queries", "value", "95% interval"], rows),
    ]
    output.data(lines, figures, as_json=json)
    if plot is not None:
        title = f"{'query' if len(chosen) == 1 else 'queries'} {', '.join(map(str, chosen[:8]))}"
        scatter_picture(plot, one[chosen].flatten(), other[chosen].flatten(), x_label=str(first), y_label=str(second), title=title)


def mislabeled(
    recipe: RecipeName,
    /,
    *,
    inverse: Annotated[InverseOptions, Flat] = InverseOptions(),  # noqa: B008
    plot: Plot = None,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """How well self-influence finds labels that were made wrong on purpose (whence train --flip), next to loss and chance."""
    from whence.evaluate.mislabeled import recall_curve, roc_area
    from whence.evidence.compare import suspicious_orders
    from whence.report.picture_files import check_picture
    from whence.report.recall import recall_picture

    check_picture(plot)
    options = _inverse(inverse)
    attributor, found = open_recipe(recipe, run, data)
    flipped = _flipped(found)
    orders = suspicious_orders(attributor, found, batch_size=run.batch_size, **options)
    curves = {name: recall_curve(values, flipped) for name, values in orders.items()}
    marks = (0.05, 0.1, 0.2, 0.3)
    figures = {name: {"auc": roc_area(orders[name], flipped)} | {f"{m:.0%}": curve.at(m) for m in marks} for name, curve in curves.items()}
    rows = [[name, f"{one['auc']:.3f}", *(f"{one[f'{m:.0%}']:.1%}" for m in marks)] for name, one in figures.items()]
    lines = [
        f"{int(flipped.sum())} of {len(flipped)} labels are wrong; share of them among the rows that are looked at first",
        *output.table(["ranking", "AUC", *(f"first {m:.0%}" for m in marks)], rows),
    ]
    values = {"recipe": found.name, "flipped": int(flipped.sum()), "rankings": figures}
    output.data(lines, values, as_json=run.json, keep=attributor.run.sub("evaluations", "mislabeled.json"))
    if plot is not None:
        recall_picture(plot, curves)
    output.closing(attributor)


def tail_patch(
    recipe: RecipeName,
    /,
    *,
    scores: ScoreNames,
    baselines: Baselines = None,
    k: Count = 10,
    learning_rate: float = 1e-3,
    queries: Numbers | None = None,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Take one more step on each query's strongest rows: how far does its measurement fall? A check of minutes, without retraining.

    Args:
        k: Rows per query.
        learning_rate: Of the one step of plain gradient descent.
        queries: Queries to take, for example 0,3,7. Default: the first twenty.
    """
    from whence.evidence.compare import tail_patch_of

    attributor, found, orders = _orders(recipe, run, data, scores, baselines)
    result = tail_patch_of(
        attributor, found, orders, k=k, learning_rate=learning_rate, queries=queries, seed=run.seed, batch_size=run.batch_size
    )
    rows = [[name, *_with_interval(result.fall(name))] for name in result.falls]
    lines = [
        f"{len(result.before)} queries, their measurement {float(result.before.mean()):.4g} on average",
        *output.table(["order", f"fall after a step on {k} rows", "95% interval"], rows),
    ]
    output.data(
        lines, {"recipe": found.name, **result.to_json()}, as_json=run.json, keep=attributor.run.sub("evaluations", "tail-patch.json")
    )
    output.stage_table(attributor.stages)


def duplicates(
    recipe: RecipeName,
    /,
    *,
    inverse: Annotated[InverseOptions, Flat] = InverseOptions(),  # noqa: B008
    count: Count = 20,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Ask for training rows themselves: is each one's own copy at the top? A check of seconds.

    Args:
        count: Training rows that are asked for, drawn with the seed.
    """
    from whence.evidence.compare import duplicates_of

    options = _inverse(inverse)
    attributor, found = open_recipe(recipe, run, data)
    results = duplicates_of(attributor, found, count=count, seed=run.seed, batch_size=run.batch_size, **options)
    rows = [
        [name, f"{one.recall(1).value:.1%}", f"{one.recall(10).value:.1%}", f"{one.mean_reciprocal.value:.3f}"]
        for name, one in results.items()
    ]
    lines = output.table(["scores", "itself first", "in the first 10", "mean reciprocal rank"], rows)
    values = {"recipe": found.name, "scores": {name: one.to_json() for name, one in results.items()}}
    output.data(lines, values, as_json=run.json, keep=attributor.run.sub("evaluations", "duplicates.json"))
    output.closing(attributor)


def _orders(
    recipe: str,
    run: RunOptions,
    data: DataOptions,
    names: list[str],
    baselines: list[str] | None,
    check: Callable[[Recipe], None] | None = None,
) -> tuple[Attributor, Recipe, dict[str, Tensor]]:
    """Open a recipe, check what is asked of it, read the scores to be judged, and only then make the baselines."""
    from whence.evidence.baselines import baseline_scores
    from whence.evidence.saved import saved_scores

    attributor, found = open_recipe(recipe, run, data)
    if check is not None:
        check(found)
    saved = saved_scores(attributor, found, names)
    return attributor, found, saved | baseline_scores(attributor, found, names=baselines, seed=run.seed, batch_size=run.batch_size)


def _inverse(inverse: InverseOptions) -> dict[str, Any]:
    damping, response = parse_damping(inverse.damping), parse_response(inverse.response)
    return {"strategy": inverse.strategy or "ekfac", "damping": damping, "response": response}


def _flipped(found: Recipe) -> Tensor:
    if found.flipped is None or not found.flipped.any():
        raise ConfigError(f"recipe {found.name} has no labels that were made wrong on purpose. Train one with whence train --flip 0.1.")
    return found.flipped


def _interval(ends: list[float] | None) -> str:
    return "" if ends is None else "[{:.3f}, {:.3f}]".format(*ends)


def _difference(three: list[float] | None) -> str:
    return "" if three is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*three)


def _with_interval(estimate: Estimate) -> list[str]:
    return [f"{estimate.value:.4g}", "" if math.isnan(estimate.low) else _interval([estimate.low, estimate.high])]


VERBS: dict[str, Any] = {
    "lds": lds,
    "counterfactual": counterfactual,
    "agreement": agreement,
    "mislabeled": mislabeled,
    "tail-patch": tail_patch,
    "duplicates": duplicates,
}
