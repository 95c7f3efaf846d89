"""How well are fine-tunes on subsets predicted, without making them?

    python bench/first_order.py instruct checkpoints/flan --name flan --by cluster:40 --subsets 40 --repeats 1

Groups the checkpoint's training rows, draws subsets of groups with half of the rows (`--shares 0.25 0.75`: as many of other sizes too, a
fourth each), fine-tunes on each from the recipe's start, and compares the validation loss, of all queries and of every group of
queries, with estimates. The first `--calibration` fine-tunes choose ridge and shift (and slope, from six on) of every estimate; the
others judge. Predictors: `constant` (the model as it is) and `mean` (of the calibration runs) are trivial; `size` is a line through
the number of rows; `cosine` the mean cosine of the subset's gradients with the queries'; `gradient`, `influence` (one Newton step,
TRAK's form), `refit`, each with the projections asked for; `gradex` the published recipe in output space; `datamodel` a ridge
regression of the loss on group membership, on the calibration runs. Writes results/first_order_NAME.json.

What is in the run folder already is read. `costs` has seconds of what this run made alone: of the gradients (null where some were
there), of so many fine-tunes out of all, of each predictor's calibration and of its estimates of the held-out subsets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from support.common import environment, print_table, write_results
from torch import Tensor

from whence.attributor import Attributor
from whence.evidence.calibrating import EstimateSettings, Method, calibrated, in_units, raw_estimates
from whence.evidence.estimating import SubsetSettings
from whence.evidence.first_order import FineTunes, GradientSettings, Linear, fine_tune, linearise_recipe
from whence.recipes.base import Recipe, load_recipe
from whence.refit.subsets import Subsets
from whence.refit.trust import trust

METHODS: tuple[Method, ...] = ("gradient", "influence", "refit", "gradex")
Predictor = Callable[[Subsets], Tensor]


def drawn(linear: Linear, options: argparse.Namespace) -> Subsets:
    """Return the subsets of every share, the halves first."""
    parts = [SubsetSettings(seed=options.seed, design=options.design).draw_real(linear.groups, options.subsets)]
    for place, share in enumerate(options.shares):
        settings = SubsetSettings(share=share, seed=options.seed + 1 + place, design=options.design)
        parts.append(settings.draw_real(linear.groups, options.subsets // 4))
    members = torch.cat([part.members for part in parts])
    if len(members.unique(dim=0)) < len(members):
        raise SystemExit("two subsets are the same, and one could calibrate what the other judges; ask for fewer, or make smaller groups.")
    return replace(parts[0], members=members)


def line(feature: Predictor, real: FineTunes, metric: str) -> Predictor:
    """Return a straight line through a feature, fitted on real fine-tunes."""
    x, y = feature(real.subsets).numpy(), real.metric(metric).mean(1).numpy()
    slope, shift = np.polyfit(x, y, 1) if np.ptp(x) > 0 else (0.0, y.mean())
    return lambda subsets: shift + slope * feature(subsets)


def cosine(linear: Linear, metric: str) -> Predictor:
    """Return the mean cosine between a subset's example gradients and the queries', of a group of queries where the metric has one."""
    assert linear.target.linear is not None

    def unit(one: Any) -> Tensor:
        gradients = one.example_sums(one.gradients.double().T).T
        return gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1e-12)

    queries = unit(linear.target.linear)
    if "/" in metric:
        queries = queries[torch.tensor([own == metric.split("/", 1)[1] for own in linear.target.groups or ()])]
    products = unit(linear.train) @ queries.mean(0)
    return lambda subsets: subsets.example_masks().double() @ products / subsets.sizes.double()


def datamodel(real: FineTunes, metric: str) -> Predictor:
    fitted = RidgeCV(alphas=np.logspace(-2, 4, 25)).fit(real.subsets.members.double().numpy(), real.metric(metric).mean(1).numpy())
    return lambda subsets: torch.from_numpy(fitted.predict(subsets.members.double().numpy()))


def first_order(linear: Linear, real: FineTunes, settings: EstimateSettings, metric: str) -> tuple[Predictor, dict[str, Any]]:
    start = time.perf_counter()
    found = calibrated(linear, real, settings)
    seconds = time.perf_counter() - start
    options = found[settings.metric].options
    kept = {"ridge": options.ridge, "adjust": found[metric].adjust, "at_edge": found[settings.metric].at_edge, "slope": found[metric].slope}
    kept["calibration_seconds"] = seconds
    return lambda subsets: in_units(raw_estimates(linear, subsets, options, settings), found).of(metric), kept


def judged(predictor: Predictor, real: FineTunes, metric: str, constant: float, mean: float) -> dict[str, Any]:
    start = time.perf_counter()
    estimates = predictor(real.subsets)
    seconds = time.perf_counter() - start
    return {**trust(estimates, real.metric(metric), constant=constant, mean=mean).to_json(), "estimates_seconds": seconds}


def report(linears: dict[str, Linear], calibration: FineTunes, held_out: FineTunes, metric: str) -> dict[str, Any]:
    """Return every predictor's figures on one metric."""
    first = next(iter(linears.values()))
    constant, mean = float(first.start.of(metric)[0]), float(calibration.metric(metric).mean())
    predictors: dict[str, tuple[Predictor, dict[str, Any]]] = {
        "size": (line(lambda subsets: subsets.sizes.double(), calibration, metric), {}),
        "datamodel": (datamodel(calibration, metric), {}),
    }
    for name, linear in linears.items():
        predictors[f"cosine {name}"] = (line(cosine(linear, metric), calibration, metric), {})
        for method in METHODS:
            settings = EstimateSettings(method=method, metric="loss", calibration=len(calibration.subsets))
            predictors[f"{method} {name}"] = first_order(linear, calibration, settings, metric)
    return {name: {**judged(one, held_out, metric, constant, mean), **kept} for name, (one, kept) in predictors.items()}


def linearised(recipe: Recipe, run: Path, options: argparse.Namespace, costs: dict[str, Any]) -> tuple[dict[str, Linear], Attributor]:
    """Return the recipe's model to first order by variant, all with the first one's groups, and the last attributor."""
    linears: dict[str, Linear] = {}
    groups = None
    for variant in options.variants:
        projection, _, kind = variant.partition(":")
        folder = run / variant.replace(":", "-")
        begun = (folder / "linearised").exists()
        attributor = Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=folder, collate=recipe.collate)
        settings = GradientSettings(
            projection=projection, dimension=options.dimension, per_token=kind == "token", by=options.by, seed=options.seed
        )
        start = time.perf_counter()
        linear = linearise_recipe(attributor, recipe, settings)
        costs[f"gradients {variant}"] = None if begun else time.perf_counter() - start
        groups = groups or linear.groups
        linears[variant] = replace(linear, groups=groups)
    return linears, attributor


def fine_tuned(
    recipe: Recipe, linear: Linear, attributor: Attributor, run: Path, options: argparse.Namespace, costs: dict[str, Any]
) -> FineTunes:
    """Return real fine-tunes; their cost is that of those which were not there."""
    subsets, folder = drawn(linear, options), run / "retrain"
    there = len(list(folder.rglob("*.safetensors")))
    start = time.perf_counter()
    running: Any = {"folder": folder, "n_jobs": options.jobs, "stages": attributor.stages}
    real = fine_tune(recipe, linear, subsets, repeats=options.repeats, seed=options.seed, **running)
    made = len(list(folder.rglob("*.safetensors"))) - there
    seconds = time.perf_counter() - start
    costs["fine-tunes"] = {"of": len(subsets) * options.repeats, "made": made, "seconds": seconds if made else None}
    return real


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--by", default="cluster:40")
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--shares", type=float, nargs="*", default=[])
    parser.add_argument("--design", default="rows", choices=["groups", "rows"], help="subsets of half of the groups or of the rows")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=8)
    parser.add_argument("--dimension", type=int, default=400)
    parser.add_argument("--variants", nargs="*", default=["pca:mean", "random:mean"], help="projection:mean or projection:token")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    run = options.run_dir or Path("runs") / f"first-order-{options.name}"
    costs: dict[str, Any] = {}
    linears, attributor = linearised(recipe, run, options, costs)
    first = linears[options.variants[0]]
    real = fine_tuned(recipe, first, attributor, run, options, costs)
    order = list(range(len(real.subsets)))
    calibration, held_out = real.take(order[: options.calibration]), real.take(order[options.calibration :])
    metrics = [name for name in first.start.metrics if name.split("/")[0] == "loss"]
    results = {metric: report(linears, calibration, held_out, metric) for metric in metrics}
    figures = ("spearman", "r2", "error", "constant_error", "mean_error")
    rows = [
        [metric, name, *("" if one[figure] is None else f"{one[figure]['value']:.4f}" for figure in figures)]
        for metric, found in results.items()
        for name, one in found.items()
    ]
    header = ["metric", "predictor", "Spearman", "R2", "error", "constant", "mean"]
    print_table(f"{len(held_out.subsets)} held-out fine-tunes", header, rows)
    write_results(
        f"first_order_{options.name}",
        {
            "environment": environment(),
            "settings": {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}, "train": len(recipe.train)},
            "costs": costs,
            "measured": {"sizes": real.subsets.sizes.tolist(), **{metric: real.metric(metric).tolist() for metric in metrics}},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
