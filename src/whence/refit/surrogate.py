"""What each group contributes, from outcomes of many subsets (estimated or real): conditional means, and linear datamodels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.estimates import bootstrap_weights
from whence.refit.problem import Problem

Fit = Callable[[Tensor], Tensor]
"""Gives contributions `[group]` for weights of subsets, `[subset]`, that sum to 1."""


@dataclass(frozen=True, kw_only=True)
class Contributions:
    """What groups contribute; higher is better, whatever the metric.

    Attributes:
        values: float64 `[group]`, in the metric's units; 0: neither helps nor harms.
        low, high: 95% bootstrap intervals over subsets, `[group]`; NaN where there are none.
        settings: how they were made, JSON.
    """

    values: Tensor
    low: Tensor
    high: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def order(self) -> list[int]:
        """Return the groups, best first; of equals the first."""
        return self.values.argsort(descending=True, stable=True).tolist()

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; intervals that are not there are null."""
        ends = {name: [None if math.isnan(value) else value for value in getattr(self, name).tolist()] for name in ("low", "high")}
        return {"values": self.values.tolist(), **ends, "settings": self.settings}


def plain_contributions(values: Tensor, settings: dict[str, Any]) -> Contributions:
    """Return contributions without intervals."""
    nothing = torch.full_like(values, torch.nan)
    return Contributions(values=values, low=nothing, high=nothing, settings=settings)


def conditional_means(members: Tensor, outcomes: Tensor, *, sign: float, resamples: int = 1000, seed: int = 0) -> Contributions:
    """Return the mean outcome of the subsets with each group, less that of all: the random ensemble of the published method.

    Args:
        members: bool `[subset, group]`; outcomes: the metric, `[subset]`.
        sign: 1 where a high outcome is good, -1 where a low one is.
        resamples: bootstrap samples over subsets; seed: of them.

    Raises:
        DataError: sizes do not fit, or a group is in no subset or in all, so that nothing can be told about it.
    """
    inside, outcome = _checked(members, outcomes)
    if (wrong := members.all(0) | ~members.any(0)).any():
        raise DataError(
            f"group {int(wrong.nonzero()[0])} is in no subset or in all of {len(members)}, so that what it contributes cannot be told; "
            "draw more subsets."
        )

    def fit(weights: Tensor) -> Tensor:
        # A bootstrap sample may leave out all subsets with a group; then it says nothing: 0.
        mass = weights @ inside
        return torch.where(mass > 0, (weights * outcome) @ inside / mass.clamp(min=1e-300) - weights @ outcome, 0.0)

    return _bootstrapped(fit, len(members), sign, resamples, seed, {"method": "conditional means", "subsets": len(members)})


def ridge_datamodel(members: Tensor, outcomes: Tensor, *, sign: float, resamples: int = 200, seed: int = 0) -> Contributions:
    """Return the coefficients of a ridge regression of outcomes on membership (A. Ilyas et al., "Datamodels", 2022).

    The penalty is chosen by generalised cross-validation on all subsets, and kept in the bootstrap.

    Raises:
        DataError: sizes do not fit.
    """
    from sklearn.linear_model import RidgeCV

    inside, outcome = _checked(members, outcomes)
    penalty = float(RidgeCV(alphas=np.logspace(-4, 4, 33)).fit(inside.numpy(), outcome.numpy()).alpha_)
    count, identity = len(members), torch.eye(members.shape[1], dtype=torch.float64)

    def fit(weights: Tensor) -> Tensor:
        x, y = inside - weights @ inside, outcome - weights @ outcome
        loads = count * weights[:, None] * x
        return torch.linalg.solve(loads.T @ x + penalty * identity, loads.T @ y)

    settings = {"method": "ridge datamodel", "subsets": count, "penalty": penalty}
    return _bootstrapped(fit, count, sign, resamples, seed, settings)


def lasso_datamodel(members: Tensor, outcomes: Tensor, *, sign: float, resamples: int = 50, seed: int = 0) -> Contributions:
    """Return the coefficients of a LASSO of outcomes on membership; its penalty by 5-fold cross-validation, kept in the bootstrap.

    Raises:
        DataError: sizes do not fit, or there are fewer than 5 subsets.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso, LassoCV

    inside, outcome = _checked(members, outcomes)
    if len(members) < 5:
        raise DataError(f"{len(members)} subsets are too few for a cross-validated LASSO; give 5 or more.")
    spread = float(outcome.std(correction=0)) or 1.0
    y = ((outcome - outcome.mean()) / spread).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the smallest penalties, which are not chosen unless good
        penalty = float(LassoCV(cv=5, random_state=seed).fit(inside.numpy(), y).alpha_)

        def fit(weights: Tensor) -> Tensor:
            used = weights > 0
            model = Lasso(alpha=penalty).fit(inside[used].numpy(), y[used.numpy()], sample_weight=weights[used].numpy())
            return torch.from_numpy(model.coef_ * spread)

        settings = {"method": "LASSO datamodel", "subsets": len(members), "penalty": penalty}
        return _bootstrapped(fit, len(members), sign, resamples, seed, settings)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How many of the best groups to keep, by cross-validation over validation examples.

    Attributes:
        share: of the groups, chosen.
        table: each share with its mean held-out metric and the standard error over folds.
    """

    share: float
    table: tuple[tuple[float, float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"share": self.share, "table": [list(row) for row in self.table]}


def cross_validated_share(
    problem: Problem, members: Tensor, units: Tensor, shares: Sequence[float], *, folds: int = 5, seed: int = 0
) -> Threshold:
    """Choose the share of groups to keep by the validation examples that had no say in the groups' order.

    In each fold conditional means are taken from the other validation examples; the best groups by them are refit, and looked at on
    the fold. Of equal shares the smaller is chosen.

    Args:
        problem: what is selected from.
        members: bool `[subset, group]`.
        units: the metric of every subset and validation example or query, `[subset, unit]`.
        shares: of the groups, above 0 to 1.
        folds: of the validation examples; seed: of their draw.

    Raises:
        ConfigError: a share is out of range, or there are fewer than 2 folds, or more than validation examples.
    """
    count, groups = units.shape[1], members.shape[1]
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"shares={tuple(shares)!r}: give one or more, above 0 to 1.")
    if not 2 <= folds <= count:
        raise ConfigError(f"folds={folds!r} of {count} validation examples: give 2 or more, and not more than examples.")
    fold = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % folds
    shares = sorted(set(shares))
    chosen = torch.zeros(folds, len(shares), groups, dtype=torch.bool)
    for number in range(folds):
        outcomes = units[:, fold != number].mean(1)
        order = conditional_means(members, outcomes, sign=problem.sign, resamples=2).order()
        for place, share in enumerate(shares):
            chosen[number, place, order[: max(1, round(share * groups))]] = True
    found = problem.units(problem.refit(chosen.flatten(0, 1))).unflatten(0, (folds, len(shares)))
    held_out = torch.stack([found[number][:, fold == number].mean(1) for number in range(folds)])
    means, errors = held_out.mean(0), held_out.std(0) / folds**0.5
    best = int((problem.sign * means).argmax())
    return Threshold(share=shares[best], table=tuple(zip(shares, means.tolist(), errors.tolist(), strict=True)))


def _checked(members: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    if members.dtype != torch.bool or members.dim() != 2 or outcomes.shape != members.shape[:1] or len(members) < 2:
        raise DataError(
            f"members is {members.dtype} {tuple(members.shape)}, outcomes {tuple(outcomes.shape)}; give bool [subset, group] and [subset] "
            "of 2 subsets or more."
        )
    if not torch.isfinite(outcomes).all():
        raise DataError("an outcome is not finite; leave its subset out, or find out where it comes from.")
    return members.double(), outcomes.double().cpu()


def _bootstrapped(fit: Fit, subsets: int, sign: float, resamples: int, seed: int, settings: dict[str, Any]) -> Contributions:
    values = sign * fit(torch.full((subsets,), 1 / subsets, dtype=torch.float64))
    weights = bootstrap_weights(subsets, resamples=resamples, seed=seed)
    samples = sign * torch.stack([fit(own) for own in weights])
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return Contributions(values=values, low=low, high=high, settings=settings | {"resamples": resamples, "seed": seed})
