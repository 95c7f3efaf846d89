"""Refits against independent solvers, and the limits in which they are known methods."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit import grams, solve
from whence.refit.linear import Linearised
from whence.refit.solve import RefitOptions, refit, refit_groups


def drawn(examples: int = 30, k: int = 6, *, longest: int = 4, spread: float = 1.0, centre: float = 0.0, seed: int = 0) -> Linearised:
    """Return rows of examples of 1 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (examples,), generator=generator)
    example = torch.arange(examples).repeat_interleave(lengths)
    return Linearised(
        outputs=centre + torch.randn(len(example), generator=generator),
        gradients=spread * torch.randn(len(example), k, generator=generator),
        example=example,
        weights=(1 / lengths.float())[example],
        examples=examples,
    )


def slow(linear: Linearised, weights: Tensor, ridge: float, loss: str = "logistic") -> np.ndarray:
    """Minimise the objective, written out in numpy, with scipy."""
    f0, z = linear.outputs.double().numpy(), linear.gradients.double().numpy()
    c = (weights.double()[linear.example] * linear.weights.double()).numpy()

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        f = f0 + z @ w
        values = np.logaddexp(0, -f) if loss == "logistic" else f**2 / 2
        slopes = -1 / (1 + np.exp(f)) if loss == "logistic" else f
        return float(c @ values + ridge / 2 * w @ w), z.T @ (c * slopes) + ridge * w

    found = minimize(objective, np.zeros(z.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 2000})
    return found.x


@pytest.mark.parametrize("loss", ["logistic", "squared"])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 100.0])
def test_the_exact_refit_is_that_of_scipy(loss: str, ridge: float) -> None:
    linear = drawn()
    weights = torch.rand(4, 30)
    found = refit(linear, weights, RefitOptions(ridge=ridge, loss=loss, tolerance=1e-10))
    assert found.converged.all()
    for own, w in zip(weights, found.w, strict=True):
        np.testing.assert_allclose(w.numpy(), slow(linear, own, ridge, loss), atol=1e-7)


def test_a_linear_classifier_is_refit_as_scikit_learn_does() -> None:
    # f = y x.w: flipping the rows of negative labels makes the output the log-odds of what is true.
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(80, 5, generator=generator), (torch.rand(80, generator=generator) < 0.4).double() * 2 - 1
    linear = Linearised(
        outputs=torch.zeros(80), gradients=y[:, None].float() * x, example=torch.arange(80), weights=torch.ones(80), examples=80
    )
    members = torch.rand(6, 80, generator=generator) < 0.6
    options = RefitOptions(ridge=0.5, tolerance=1e-10)
    found = refit_groups(linear, torch.arange(80), members, options)
    for own, w in zip(members, found.w, strict=True):
        sklearn = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x[own].double().numpy(), y[own].numpy())
        np.testing.assert_allclose(w.numpy(), sklearn.coef_[0], atol=1e-6)


def test_squared_loss_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(50, 5, generator=generator), torch.randn(50, generator=generator)
    linear = Linearised(outputs=-y, gradients=x, example=torch.arange(50), weights=torch.ones(50), examples=50)
    members = torch.rand(6, 50, generator=generator) < 0.6
    found = refit_groups(linear, torch.arange(50), members, RefitOptions(ridge=0.3, loss="squared", tolerance=1e-10))
    for own, w in zip(members, found.w, strict=True):
        sklearn = Ridge(alpha=0.3, fit_intercept=False).fit(x[own].double().numpy(), y[own].double().numpy())
        np.testing.assert_allclose(w.numpy(), sklearn.coef_, atol=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "squared"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("grams_pay", [False, True])
@pytest.mark.parametrize(("centre", "spread", "ridge"), [(0.0, 1.0, 1.0), (-6.0, 3.0, 0.01), (8.0, 3.0, 0.001)])
def test_many_at_once_equals_one_by_one(
    loss: str, per_example: bool, grams_pay: bool, centre: float, spread: float, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "_grams_pay", lambda *_: grams_pay)
    linear = drawn(examples=60, centre=centre, spread=spread)
    groups = torch.randint(0, 9, (60,))
    members = torch.rand(40, 9)
    members[:20] = (members[:20] < 0.5).float()
    members[0] = 0
    options = RefitOptions(ridge=ridge, per_example=per_example, loss=loss, tolerance=1e-9)
    many, single = refit_groups(linear, groups, members, options), refit(linear, members[:, groups], options)
    assert many.converged.all()
    assert single.converged.all()
    np.testing.assert_allclose(many.w.numpy(), single.w.numpy(), rtol=1e-6, atol=1e-7)
    assert (many.w[0] == 0).all()


def test_a_start_elsewhere_ends_at_the_same_point() -> None:
    linear, groups, members = drawn(examples=60), torch.arange(60) % 9, torch.rand(5, 9)
    options = RefitOptions(ridge=0.1, tolerance=1e-9)
    cold = refit_groups(linear, groups, members, options)
    warm = refit_groups(linear, groups, members, options, start=cold.w[0] + 0.01)
    np.testing.assert_allclose(warm.w.numpy(), cold.w.numpy(), atol=1e-7)


def test_a_large_ridge_gives_gradient_dot_products() -> None:
    linear = drawn()
    weights = (torch.rand(5, 30) < 0.5).double()
    found = refit(linear, weights, RefitOptions(ridge=1e7))
    residual = torch.sigmoid(-linear.outputs.double())
    each = linear.gradients.double() * (residual * linear.weights)[:, None]
    by_example = torch.zeros(30, 6, dtype=torch.float64).index_add_(0, linear.example, each)
    np.testing.assert_allclose(found.w * 1e7, weights @ by_example, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_one_newton_step_is_the_influence_function(fast: bool) -> None:
    linear = drawn()
    weights = (torch.rand(5, 30) < 0.5).double()
    options = RefitOptions(ridge=0.2, steps=1, tolerance=1e-9)
    found = refit_groups(linear, torch.arange(30), weights, options) if fast else refit(linear, weights, options)
    for own, w in zip(weights, found.w, strict=True):
        start = torch.zeros(6, dtype=torch.float64, requires_grad=True)

        def objective(at: Tensor, own: Tensor = own) -> Tensor:
            return own @ linear.loss(at) + 0.1 * at.square().sum()

        (gradient,) = torch.autograd.grad(objective(start), start)
        hessian = torch.autograd.functional.hessian(objective, start.detach())
        np.testing.assert_allclose(w, -torch.linalg.solve(hessian, gradient), atol=1e-6)


def test_weights_of_one_less_leave_one_out() -> None:
    linear = drawn()
    options = RefitOptions(ridge=0.3, tolerance=1e-10)
    found = refit(linear, 1 - torch.eye(30), options)
    for out in (0, 7, 29):
        keep = linear.example != out
        rest = Linearised(
            outputs=linear.outputs[keep],
            gradients=linear.gradients[keep],
            example=linear.example[keep] - (linear.example[keep] > out).long(),
            weights=linear.weights[keep],
            examples=29,
        )
        np.testing.assert_allclose(found.w[out], slow(rest, torch.ones(29), 0.3), atol=1e-7)


def test_more_dimensions_than_rows() -> None:
    linear = drawn(examples=8, k=40)
    members = torch.rand(3, 8)
    options = RefitOptions(ridge=0.1, tolerance=1e-10)
    for found in (refit(linear, members, options), refit_groups(linear, torch.arange(8), members, options)):
        for own, w in zip(members, found.w, strict=True):
            np.testing.assert_allclose(w, slow(linear, own, 0.1), atol=1e-6)


def test_blocks_and_grams_that_are_not_held_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, groups, members = drawn(examples=60), torch.arange(60) % 9, torch.rand(11, 9)
    options = RefitOptions(ridge=0.1, tolerance=1e-9)
    whole = refit_groups(linear, groups, members, options)
    monkeypatch.setattr(solve, "_ROWS", 3 * linear.rows)
    monkeypatch.setattr(grams, "_BYTES", 0)
    for pays in (True, False):
        monkeypatch.setattr(solve, "_grams_pay", lambda *_, pays=pays: pays)
        np.testing.assert_allclose(refit_groups(linear, groups, members, options).w, whole.w, atol=1e-8)


def test_a_given_number_of_steps_comes_nearer_and_never_goes_up() -> None:
    linear = drawn(examples=60, centre=-8.0, spread=4.0)
    members = torch.ones(1, 9)
    values = []
    for steps in (2, 4, 8, 16):
        found = refit_groups(linear, torch.arange(60) % 9, members, RefitOptions(ridge=1e-3, steps=steps))
        assert int(found.steps) <= steps
        w = found.w[0]
        values.append(float(linear.loss(w).sum() + 5e-4 * w.square().sum()))
    assert all(math.isfinite(value) for value in values)
    assert values == sorted(values, reverse=True)


def test_a_ridge_below_rounding_is_still_solved() -> None:
    linear = drawn(examples=4, k=6, longest=1)
    doubled = Linearised(
        outputs=linear.outputs.repeat_interleave(4),
        gradients=100 * linear.gradients.repeat_interleave(4, 0),
        example=torch.arange(16),
        weights=torch.ones(16),
        examples=16,
    )
    found = refit_groups(doubled, torch.arange(16), torch.ones(1, 16), RefitOptions(ridge=1e-6, loss="squared"))
    assert found.converged.all()
    assert torch.isfinite(found.w).all()


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"ridge": 0.0}, "ridge=0.0"), ({"steps": 0}, "steps=0"), ({"loss": "hinge"}, "loss='hinge'"), ({"tolerance": 2.0}, "tolerance=2.0")],
)
def test_options_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        RefitOptions(**settings)  # type: ignore[arg-type]


def test_sizes_are_checked() -> None:
    linear = drawn()
    with pytest.raises(DataError, match="of 30"):
        refit(linear, torch.ones(29), RefitOptions())
    with pytest.raises(DataError, match="0 or more"):
        refit(linear, -torch.ones(30), RefitOptions())
    with pytest.raises(DataError, match="numbered 0 to 29"):
        refit_groups(linear, torch.arange(30), torch.ones(2, 5), RefitOptions())
    with pytest.raises(DataError, match="for each of 30 examples"):
        refit_groups(linear, torch.arange(29), torch.ones(2, 30), RefitOptions())
