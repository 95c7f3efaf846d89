from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.calibrate import calibrate, ridge_grid
from whence.refit.linear import Linearised
from whence.refit.predict import Target, predict
from whence.refit.solve import RefitOptions, refit_groups
from whence.refit.subsets import bernoulli, groups_of

MEASURED = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0], dtype=torch.float64)
GRID = ridge_grid(RefitOptions(), [0.1, 1.0, 10.0, 100.0])


def test_the_ridge_that_made_the_measurements_is_found() -> None:
    train, valid = (
        Linearised(
            outputs=torch.randn(count),
            gradients=torch.randn(count, 6),
            example=torch.arange(count),
            weights=torch.ones(count),
            examples=count,
        )
        for count in (60, 40)
    )
    groups = groups_of([place % 12 for place in range(60)])
    subsets, target = bernoulli(groups, count=8), Target(linear=valid)

    def estimate(options: RefitOptions) -> Tensor:
        return predict(target, refit_groups(train, groups.numbers, subsets.members, options).w).of("loss")

    base = RefitOptions(tolerance=1e-8)
    truth = estimate(RefitOptions(ridge=3.0, tolerance=1e-8)) + 1e-4 * torch.randn(8)
    found = calibrate(estimate, truth, ridge_grid(base, [0.3, 1.0, 3.0, 10.0, 30.0], steps=[None, 1]), constant=1.0)
    assert found.options.ridge == 3.0
    assert found.options.steps is None
    assert not found.at_edge
    assert found.error < 5e-4 < found.mean_error
    assert len(found.table) == 20
    assert json.loads(json.dumps(found.to_json()))["runs"] == 8


@pytest.mark.parametrize("seed", range(12))
def test_held_out_errors_are_those_of_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    estimates = {ridge: 2 * torch.randn(5, dtype=torch.float64, generator=generator) + 3 for ridge in (0.1, 1.0, 10.0, 100.0)}
    found = calibrate(lambda options: estimates[options.ridge], MEASURED, GRID, constant=0.0, adjust=["shift"])

    def held_out(ridge: float, run: int, among: list[int]) -> float:
        rest = [one for one in among if one != run]
        return float(MEASURED[rest].mean() - estimates[ridge][rest].mean() + estimates[ridge][run] - MEASURED[run]) ** 2

    means = {ridge: sum(held_out(ridge, run, list(range(5))) for run in range(5)) / 5 for ridge in estimates}
    assert [one.rmse for one in found.table] == pytest.approx([means[ridge] ** 0.5 for ridge in estimates])
    assert found.options.ridge == min(means, key=lambda ridge: means[ridge])
    nested = 0.0
    for run in range(5):
        rest = [one for one in range(5) if one != run]
        others = {ridge: sum(held_out(ridge, one, rest) for one in rest) for ridge in estimates}
        nested += held_out(min(others, key=lambda ridge: others[ridge]), run, list(range(5))) / 5
    assert found.error == pytest.approx(nested**0.5)
    assert found.mean_error == pytest.approx(
        (sum((float(MEASURED[[one for one in range(5) if one != run]].mean() - MEASURED[run])) ** 2 for run in range(5)) / 5) ** 0.5
    )
    assert found.constant_error == pytest.approx(float(MEASURED.square().mean().sqrt()))


def test_shift_and_slope_bring_estimates_to_the_units() -> None:
    found = calibrate(lambda _: (MEASURED - 5) / 3, MEASURED, GRID[:1], constant=0.0, adjust=["none", "shift", "affine"])
    assert found.adjust == "affine"
    assert torch.allclose(found.apply((MEASURED - 5) / 3), MEASURED)
    assert found.error < 1e-12
    shifted = calibrate(lambda _: MEASURED - 5, MEASURED, GRID[:1], constant=0.0, adjust=["none", "shift"])
    assert (shifted.adjust, shifted.slope) == ("shift", 1.0)
    assert shifted.shift == pytest.approx(5)


def test_a_slope_below_zero_is_never_taken() -> None:
    falling = {0.1: -MEASURED, 1.0: MEASURED + torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0])}
    found = calibrate(lambda options: falling[options.ridge], MEASURED, GRID[:2], constant=0.0, adjust=["shift", "affine"])
    assert found.slope > 0
    assert found.options.ridge == 1.0, "the mirror image of the measurements is no estimate of them"
    with pytest.raises(DataError, match="no slope above 0 fits; allow adjust='shift'"):
        calibrate(lambda _: -MEASURED, MEASURED, GRID[:1], constant=0.0, adjust=["affine"])


def test_the_edge_of_the_grid_is_told() -> None:
    assert calibrate(lambda options: MEASURED + options.ridge, MEASURED, GRID, constant=0.0, adjust=["none"]).at_edge


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(ConfigError, match="nothing to choose from"):
        calibrate(lambda _: MEASURED, MEASURED, [], constant=0.0)
    with pytest.raises(ConfigError, match="1 fine-tunes cannot"):
        calibrate(lambda _: MEASURED, MEASURED[:1], GRID, constant=0.0)
    with pytest.raises(ConfigError, match="give 5 or more"):
        calibrate(lambda _: MEASURED, MEASURED[:4], GRID, constant=0.0, adjust=["affine"])
    with pytest.raises(ConfigError, match="give 4 or more"):
        calibrate(lambda _: MEASURED, MEASURED[:3], GRID, constant=0.0)
    with pytest.raises(ConfigError, match="adjust='spline'"):
        calibrate(lambda _: MEASURED, MEASURED, GRID, constant=0.0, adjust=["spline"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="give 5 finite numbers"):
        calibrate(lambda _: MEASURED[:2], MEASURED, GRID, constant=0.0)
