"""The methods that `digits_lds.py` compares: a name, and a function from a setting to scores `[query, train]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from support.digits_setting import Setting, random_scores
from whence import ConjugateGradients, Damping, Unrolled
from whence.evaluate.lds import Calibration, calibrate
from whence.recipes.digits import predict, stack

Method = Callable[[Setting], Tensor]

GRID = [Damping(relative=relative, scope=scope) for scope in ("layer", "model") for relative in (0.01, 0.1, 1.0)]
FINE_GRID = [Damping(relative=relative, scope=scope) for scope in ("layer", "model") for relative in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
MODELS = range(5)


def ours(setting: Setting, *, strategy: str, damping: Damping | str = "auto") -> Tensor:
    """Return the engine's scores."""
    return setting.scores(strategy=strategy, damping=damping)


# --- cheap baselines ---


def by_label(setting: Setting) -> Tensor:
    """Return 1 for rows with the query's label and -1 for the others."""
    ours_, theirs = (torch.tensor([row.label for row in rows]) for rows in (setting.queries, setting.train))
    return (ours_[:, None] == theirs).double() * 2 - 1


def by_features(setting: Setting) -> Tensor:
    """Return the cosine of the last hidden layer, counted against rows with another label than the query's."""
    with torch.no_grad():
        query, train = (F.normalize(setting.network[:-1](stack(rows)[0]), dim=1) for rows in (setting.queries, setting.train))
    return by_label(setting) * (query @ train.T)


def by_loss(setting: Setting) -> Tensor:
    """Return minus the loss of each training row, the same for all queries."""
    return -predict(setting.network, setting.train)[1].expand(len(setting.queries), -1)


def by_gradient_norm(setting: Setting) -> Tensor:
    """Return minus the squared norm of each training row's gradient, the same for all queries."""
    return -setting.attributor.self_influence(setting.train, strategy="identity", overwrite=True).expand(len(setting.queries), -1)


def gradient_cosine(setting: Setting) -> Tensor:
    """Return the cosine of gradients, up to a factor of each query, of which rank correlation knows nothing."""
    norms = setting.attributor.self_influence(setting.train, strategy="identity", overwrite=True).sqrt()
    return ours(setting, strategy="identity") / norms.clamp(min=1e-12)


# --- choices made by the calibration subsets ---


@cache
def chosen_damping(setting: Setting) -> Calibration[Damping]:
    """Choose the damping of ekfac by the subsets that are set aside."""
    return calibrate(lambda damping: ours(setting, strategy="ekfac", damping=damping), FINE_GRID, setting.calibration)


def calibrated(setting: Setting) -> Tensor:
    """Return ekfac scores at the damping that the calibration subsets chose."""
    return ours(setting, strategy="ekfac", damping=chosen_damping(setting).damping)


# --- several models ---


def average(setting: Setting, method: Method) -> Tensor:
    """Return the mean of a method's scores over models that differ in their seed."""
    return torch.stack([method(replace(setting, seed=seed)) for seed in MODELS]).mean(0)


# --- beyond the fitted curvature ---


def exact(setting: Setting, *, relative: float) -> Tensor:
    """Return scores with the damped Gauss-Newton matrix inverted exactly; `relative` to the model's mean eigenvalue."""
    return setting.scores(strategy="identity", solver="exact", damping=Damping(relative=relative, scope="model"))


def cg(setting: Setting, *, relative: float, iterations: int, draws: int | None) -> Tensor:
    """Return scores refined by conjugate gradients on all rows, with labels drawn or with all columns."""
    solver = ConjugateGradients(iterations=iterations, max_examples=None, draws=draws)
    return setting.scores(strategy="ekfac", solver=solver, damping=Damping(relative=relative, scope="model"))


def unrolled(setting: Setting, *, time: float) -> Tensor:
    """Return scores that weigh each direction by what a run of that length could do along it."""
    return setting.scores(strategy="ekfac", response=Unrolled(time=time))


def along_the_run(setting: Setting, *, adam: bool) -> Tensor:
    """Return unrolled scores over four segments of the run, in Adam's own coordinates or not."""
    return setting.unrolled(adam=adam)


# --- the peer ---


def peer(setting: Setting, *, damping: float | None, empirical: bool = False) -> Tensor:
    """Return Kronfluence's ekfac scores."""
    from support.digits_peer import kronfluence

    return kronfluence(setting, damping=damping, empirical=empirical)


def _name(strategy: str, damping: Damping) -> str:
    return f"{strategy}, {damping.relative:g} of the {damping.scope}'s mean"


METHODS: dict[str, Method] = {
    "random": random_scores,
    "loss of the row": by_loss,
    "gradient norm of the row": by_gradient_norm,
    "same label": by_label,
    "features, signed by label": by_features,
    "gradient cosine": gradient_cosine,
    "identity": partial(ours, strategy="identity"),
    **{f"{name}, auto": partial(ours, strategy=name) for name in ("diagonal", "kfac", "ekfac")},
    **{_name(name, damping): partial(ours, strategy=name, damping=damping) for name in ("diagonal", "kfac", "ekfac") for damping in GRID},
    "ekfac, calibrated": calibrated,
    "identity, 5 models": partial(average, method=partial(ours, strategy="identity")),
    "ekfac, auto, 5 models": partial(average, method=partial(ours, strategy="ekfac")),
    "ekfac, 0.1 of the model's mean, 5 models": partial(
        average, method=partial(ours, strategy="ekfac", damping=Damping(relative=0.1, scope="model"))
    ),
    "exact, 30 times the model's mean": partial(exact, relative=30.0),
    **{
        f"cg, {steps} steps, {'1 label drawn' if draws else 'all columns'}": partial(cg, relative=30.0, iterations=steps, draws=draws)
        for steps, draws in ((3, 1), (10, 1), (3, None), (10, None))
    },
    **{f"ekfac, unrolled, time {time:g}": partial(unrolled, time=time) for time in (1.0, 10.0, 100.0, 1000.0)},
    "ekfac, unrolled over 4 segments": partial(along_the_run, adam=False),
    "ekfac, unrolled over 4 segments, Adam": partial(along_the_run, adam=True),
    "Kronfluence ekfac, damping None": partial(peer, damping=None),
    "Kronfluence ekfac, damping 1e-8": partial(peer, damping=1e-8),
    "Kronfluence ekfac, damping None, empirical": partial(peer, damping=None, empirical=True),
    "Kronfluence ekfac, damping 1e-8, empirical": partial(peer, damping=1e-8, empirical=True),
}
REFERENCE = "ekfac, auto"
