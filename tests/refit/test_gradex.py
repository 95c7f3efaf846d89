"""The published recipe: what it does, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from whence.errors import ConfigError, DataError
from whence.refit.gradex import GradexOptions, gradex, gradex_directions
from whence.refit.linear import Linearised


def drawn(examples: int = 60, k: int = 5) -> Linearised:
    lengths = torch.randint(1, 4, (examples,))
    example = torch.arange(examples).repeat_interleave(lengths)
    return Linearised(
        outputs=5 * torch.randn(len(example)),
        gradients=torch.randn(len(example), k) + 0.3,
        example=example,
        weights=(1 / lengths.float())[example],
        examples=examples,
    )


OPTIONS = GradexOptions(weight_norm=2.0, parameters=500, scale=0.1)


def test_the_direction_is_that_of_the_loss_written_out() -> None:
    linear, members = drawn(), torch.ones(1, 60, dtype=torch.bool)
    options = GradexOptions(weight_norm=2.0, parameters=500, inverse_ridge=0.1)
    found = gradex_directions(linear, members, options)[0].numpy()
    labels = (torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.7).numpy()
    signs = np.where(labels, 1.0, -1.0)
    means = np.stack([linear.gradients[linear.example == place].double().mean(0).numpy() for place in range(60)])

    def objective(wb: np.ndarray) -> float:
        # liblinear's: the intercept is regularised as a weight is. sign * (sign * g) = g.
        return 0.1 * float(np.logaddexp(0, -(means @ wb[:-1] + signs * wb[-1])).sum()) + 0.5 * float(wb @ wb)

    best = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(found, best[:-1], atol=1e-3)


def test_with_the_published_ridge_it_is_nearly_the_mean_gradient() -> None:
    linear, members = drawn(), torch.rand(4, 60) < 0.5
    means = linear.example_sums(linear.gradients.T).T.double()
    for own, found in zip(members, gradex_directions(linear, members, OPTIONS), strict=True):
        assert float(torch.cosine_similarity(found, means[own].mean(0), dim=0)) > 0.99


def test_outputs_at_the_start_are_dropped_and_lengths_are_fixed() -> None:
    linear, members = drawn(), torch.rand(4, 60) < 0.5
    moved = Linearised(outputs=linear.outputs + 7, gradients=linear.gradients, example=linear.example, weights=linear.weights, examples=60)
    w = gradex(linear, members, OPTIONS)
    assert torch.equal(w, gradex(moved, members, OPTIONS))
    # |P w| = sqrt(500 / 5) |w| is a tenth of the weights' norm.
    assert torch.allclose(w.norm(dim=1) * 10, torch.full((4,), 0.2, dtype=torch.float64))
    assert torch.allclose(gradex(linear, members, GradexOptions(weight_norm=2.0, parameters=500, scale=0.2)), 2 * w)


def test_length_of_the_back_projection() -> None:
    # Entries of P are +-1/sqrt(k), so that |P^T g| = |g| on average; then |P w|^2 = parameters / k |w|^2 on average.
    projection = (torch.randint(0, 2, (20_000, 5)) * 2 - 1).double() / 5**0.5
    w = torch.randn(5, dtype=torch.float64)
    assert float((projection @ w).norm() / w.norm()) == pytest.approx((20_000 / 5) ** 0.5, rel=0.03)


def test_what_cannot_be_fit() -> None:
    linear = drawn()
    one = torch.zeros(1, 60, dtype=torch.bool)
    one[0, 3] = True
    with pytest.raises(DataError, match="same random label"):
        gradex(linear, one, OPTIONS)
    with pytest.raises(DataError, match="bool"):
        gradex(linear, torch.ones(1, 60), OPTIONS)
    with pytest.raises(ConfigError, match=r"scale=0\.0"):
        GradexOptions(weight_norm=1.0, parameters=1, scale=0.0)
    with pytest.raises(ConfigError, match="positive=1"):
        GradexOptions(weight_norm=1.0, parameters=1, positive=1.0)


def test_a_basis_among_more_directions_is_as_long_as_these_make_it() -> None:
    linear, members = drawn(), torch.rand(2, 60) < 0.5
    options = GradexOptions(weight_norm=2.0, parameters=500, scale=0.1, directions=20)
    # Columns of the basis are orthonormal: |P B w| = sqrt(500 / 20) |w|.
    assert torch.allclose(gradex(linear, members, options).norm(dim=1) * 5, torch.full((2,), 0.2, dtype=torch.float64))
    with pytest.raises(ConfigError, match="directions=0"):
        GradexOptions(weight_norm=1.0, parameters=1, directions=0)
