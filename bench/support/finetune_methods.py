"""The methods that `finetune_lds.py` compares, each a function from a setting to scores `[query, train]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from support.finetune_setting import Setting
from whence.curvature.basis import Damping
from whence.curvature.refine import ConjugateGradients, Exact
from whence.evaluate.baselines import BASELINES
from whence.evidence.baselines import baseline_scores

Method = Callable[[Setting], Tensor]


def baseline(setting: Setting, name: str) -> Tensor:
    """Return one of the baselines of every table."""
    if not setting.kept:
        setting.kept.update(baseline_scores(setting.attributor("baselines"), setting.recipe))
    return setting.kept[name]


def fitted(setting: Setting, *, strategy: str = "ekfac", run: str | None = None, fit: dict[str, Any] | None = None, adam: bool = False,
           precision: str = "float32", **options: Any) -> Tensor:  # fmt: skip
    """Score with the fitted curvature of the one model."""
    folder = run or "-".join([strategy, *(["adam"] if adam else []), *([precision] if precision != "float32" else [])])
    attributor = setting.attributor(folder, adam=adam, precision=precision)
    attributor.fit(setting.recipe.train, strategy=strategy, **(fit or {}))
    return attributor.scores(setting.recipe.queries, setting.recipe.train, strategy=strategy, **options, name="last", overwrite=True).values


def solved(setting: Setting, solver: Any, *, adam: bool = False, **options: Any) -> Tensor:
    """Score with the Gauss-Newton matrix itself."""
    attributor = setting.attributor("ekfac-adam" if adam else "ekfac", adam=adam)
    attributor.fit(setting.recipe.train, strategy="ekfac")
    return attributor.scores(setting.recipe.queries, setting.recipe.train, solver=solver, **options, name="last", overwrite=True).values


def models(setting: Setting, *, strategy: str = "ekfac", adam: bool = False, **options: Any) -> Tensor:
    """Score with the mean over models of other seeds."""
    checkpoints = setting.over_models(f"models{'-adam' if adam else ''}", adam=adam).fit(setting.recipe.train, strategy=strategy)
    return checkpoints.scores(
        setting.recipe.queries, setting.recipe.train, strategy=strategy, **options, name="last", overwrite=True
    ).values


def run_mean(setting: Setting, *, strategy: str = "ekfac", adam: bool = False, first: int | None = None, **options: Any) -> Tensor:
    """Score with the mean over the run's own snapshots; with identity that is TracIn (G. Pruthi et al., 2020)."""
    checkpoints = setting.over_run(f"run{'-adam' if adam else ''}", first=first, adam=adam).fit(setting.recipe.train, strategy=strategy)
    return checkpoints.scores(
        setting.recipe.queries, setting.recipe.train, strategy=strategy, **options, name="last", overwrite=True
    ).values


def segments(setting: Setting, *, adam: bool = False, stretch: float = 1.0, **options: Any) -> Tensor:
    """Score for the whole run, segment by segment (SOURCE)."""
    checkpoints = setting.over_run(f"run{'-adam' if adam else ''}", adam=adam).fit(setting.recipe.train)
    times = [stretch * time for _, time in setting.recipe.snapshots]
    return checkpoints.unrolled_scores(setting.recipe.queries, setting.recipe.train, times, overwrite=True, **options).values


def relative(amount: float, scope: str = "model") -> Damping:
    return Damping(relative=amount, scope=scope)


METHODS: dict[str, Method] = {name: partial(baseline, name=name) for name in BASELINES} | {
    "identity": partial(fitted, strategy="identity"),
    "diagonal": partial(fitted, strategy="diagonal"),
    "kfac": partial(fitted, strategy="kfac"),
    "ekfac": fitted,
    "ekfac, rank 32": partial(fitted, query_rank=32),
    "ekfac, bfloat16": partial(fitted, precision="bfloat16"),
    **{f"ekfac, {amount:g} of the model's mean": partial(fitted, damping=relative(amount)) for amount in (0.1, 1.0, 10.0, 100.0)},
    "ekfac, relatif": partial(fitted, normalize="relatif"),
    "identity, first snapshot": partial(run_mean, strategy="identity", first=1),
    "gradient cosine, mean over the run": partial(run_mean, strategy="identity", normalize="cosine"),
    "ekfac, first snapshot": partial(run_mean, first=1),
    "ekfac, relatif, mean over the run": partial(run_mean, normalize="relatif"),
    "identity, Adam": partial(fitted, strategy="identity", adam=True),
    "ekfac, Adam": partial(fitted, adam=True),
    "ekfac, Adam, 10 of the model's mean": partial(fitted, adam=True, damping=relative(10.0)),
    "ekfac, unrolled": partial(fitted, response="unrolled"),
    "ekfac, unrolled, Adam": partial(fitted, response="unrolled", adam=True),
    "identity, mean over the run": partial(run_mean, strategy="identity"),
    "identity, mean over the run, Adam": partial(run_mean, strategy="identity", adam=True),
    "ekfac, mean over the run": run_mean,
    "ekfac, mean over the run, 10 of the model's mean": partial(run_mean, damping=relative(10.0)),
    "ekfac, mean over the run, Adam": partial(run_mean, adam=True),
    "ekfac, segments": segments,
    "ekfac, segments, Adam": partial(segments, adam=True),
    "identity, models": partial(models, strategy="identity"),
    "ekfac, models": models,
    "exact": partial(solved, solver="exact"),
    "exact, 1 of the model's mean": partial(solved, solver=Exact(), damping=relative(1.0)),
    "exact, 300 of the model's mean": partial(solved, solver=Exact(), damping=relative(300.0)),
    "cg": partial(solved, solver="cg"),
    "cg, 1 label drawn": partial(solved, solver=ConjugateGradients(draws=1)),
}  # fmt: skip
