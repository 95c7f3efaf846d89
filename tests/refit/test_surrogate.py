"""Contributions of groups beside loops, scikit-learn and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.linear import Linearised
from whence.refit.predict import Target
from whence.refit.problem import Problem
from whence.refit.solve import RefitOptions
from whence.refit.subsets import bernoulli, groups_of, single_groups
from whence.refit.surrogate import conditional_means, cross_validated_share, lasso_datamodel, ridge_datamodel

EFFECTS = torch.tensor([3.0, 0.0, -2.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)


def outcomes(subsets: int = 400, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    members = bernoulli(single_groups(8), count=subsets).members
    return members, 5 + members.double() @ EFFECTS + noise * torch.randn(subsets)


def test_conditional_means_are_those_of_a_loop() -> None:
    members, outcome = outcomes()
    found = conditional_means(members, outcome, sign=-1.0)
    for group in range(8):
        inside = [float(outcome[subset]) for subset in range(400) if members[subset, group]]
        assert float(found.values[group]) == pytest.approx(-(sum(inside) / len(inside) - float(outcome.mean())))
    assert found.order()[0] == 2
    assert found.order()[-1] == 0


@pytest.mark.parametrize("fit", [conditional_means, ridge_datamodel, lasso_datamodel])
def test_intervals_hold_what_is_true(fit) -> None:  # type: ignore[no-untyped-def]
    # A group's mean effect over random halves is half its coefficient.
    truth = EFFECTS / 2 if fit is conditional_means else EFFECTS
    held = 0
    for seed in range(10):
        torch.manual_seed(seed)
        found = fit(*outcomes(200), sign=1.0, resamples=40)
        # A penalty pulls coefficients towards 0 by about this much.
        held += int(((found.low - 0.1 <= truth) & (truth <= found.high + 0.1)).sum())
    assert held >= 68  # 76 of 80 are expected; three standard deviations less, and 40 samples are few


def test_ridge_is_that_of_scikit_learn() -> None:
    members, outcome = outcomes(50)
    found = ridge_datamodel(members, outcome, sign=1.0)
    expected = Ridge(alpha=found.settings["penalty"]).fit(members.double().numpy(), outcome.numpy()).coef_
    np.testing.assert_allclose(found.values, expected, atol=1e-10)


def test_lasso_leaves_groups_without_effect_at_nothing() -> None:
    found = lasso_datamodel(*outcomes(noise=1.0), sign=1.0, resamples=5)
    assert float(found.values[EFFECTS == 0].abs().max()) < 0.15
    np.testing.assert_allclose(found.values[EFFECTS != 0], EFFECTS[EFFECTS != 0], atol=0.3)


def problem(metric: str = "loss") -> Problem:
    def rows(count: int, shift: Tensor | float) -> Linearised:
        gradients = torch.randn(count, 4) + shift
        return Linearised(
            outputs=torch.randn(count), gradients=gradients, example=torch.arange(count), weights=torch.ones(count), examples=count
        )

    pull = torch.tensor([1.0] * 20 + [-1.0] * 20)[:, None]
    return Problem(
        train=rows(40, pull),
        groups=groups_of([number // 5 for number in range(40)]),
        target=Target(linear=rows(30, 1.0)),
        metric=metric,  # type: ignore[arg-type]
        options=RefitOptions(ridge=1.0),
    )


def test_influence_is_the_formula_by_autograd() -> None:
    given = problem()
    train, target = given.train, given.target.linear
    assert target is not None
    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(target.loss(zero).mean(), zero)
    hessian = torch.autograd.functional.hessian(lambda at: train.loss(at).sum() + 0.5 * at.square().sum(), zero.detach())
    jacobian = torch.autograd.functional.jacobian(train.loss, zero.detach())
    groups = torch.zeros(8, 4, dtype=torch.float64).index_add_(0, given.groups.numbers, jacobian)
    # Positive: it lowers the loss.
    np.testing.assert_allclose(given.influence(), groups @ torch.linalg.solve(hessian, slope), atol=1e-10)


def test_the_share_is_chosen_by_examples_that_had_no_say() -> None:
    given = problem()
    members = bernoulli(given.groups, count=100).members
    units = given.units(given.refit(members))
    found = cross_validated_share(given, members, units, [1.0, 0.5, 0.25], folds=3)
    assert [row[0] for row in found.table] == [0.25, 0.5, 1.0]
    assert found.share == min(found.table, key=lambda row: row[1])[0] != 1.0
    fold = torch.randperm(30, generator=torch.Generator().manual_seed(0)) % 3
    held = []
    for number in range(3):
        others = units[:, fold != number].mean(1)
        scores = [float(others[members[:, group]].mean()) for group in range(8)]
        best = sorted(range(8), key=lambda group: scores[group])[:4]
        chosen = torch.zeros(1, 8)
        chosen[0, best] = 1
        held.append(float(given.units(given.refit(chosen))[0, fold == number].mean()))
    assert found.table[1][1] == pytest.approx(sum(held) / 3, abs=1e-4)


def test_what_cannot_be_told() -> None:
    members, outcome = outcomes(20)
    with pytest.raises(DataError, match="group 3 is in no subset or in all of 20"):
        conditional_means(members & (torch.arange(8) != 3), outcome, sign=1.0)
    with pytest.raises(DataError, match="outcome is not finite"):
        ridge_datamodel(members, outcome / 0, sign=1.0)
    with pytest.raises(DataError, match="too few"):
        lasso_datamodel(members[:4], outcome[:4], sign=1.0)
    with pytest.raises(DataError, match="give bool"):
        ridge_datamodel(members.double(), outcome, sign=1.0)
    given = problem()
    units = torch.zeros(20, 30)
    with pytest.raises(ConfigError, match=r"shares=\(0,\)"):
        cross_validated_share(given, members, units, [0])
    with pytest.raises(ConfigError, match="folds=31 of 30"):
        cross_validated_share(given, members, units, [0.5], folds=31)
