"""Responses of finite runs against matrix exponentials, their limits, and what is said where they cannot be had."""

from __future__ import annotations

import json
import math
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import whence
from cases import build
from compare import assert_close
from whence import Damping, Unrolled
from whence.curvature.settings import Spectrum
from whence.errors import ConfigError, MismatchError
from whence.tasks import Classification

FITTED = ("diagonal", "kfac", "ekfac")
LAYERS = ("0", "2")


def model() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def rows(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (count,), generator=generator), strict=True))


TRAIN, QUERIES = rows(1, 12), rows(2, 3)
TASK = Classification(measurement="margin")


def engine(strategy: Any = "ekfac", **options: Any) -> whence.Attributor:
    return whence.Attributor(model(), TASK, device="cpu", progress=False, **options).fit(TRAIN, strategy=strategy, empirical=True)


@lru_cache
def examples() -> tuple[list[oracle.Example], list[oracle.Example]]:
    collect = partial(oracle.collect, model(), LAYERS, TASK, collate=torch.utils.data.default_collate)
    return (
        collect(QUERIES, objective=lambda m, batch, _: TASK.measurement(m, batch)),
        collect(TRAIN, objective=lambda m, batch, _: TASK.loss(m, batch)),
    )


def integral(matrix: Tensor, time: float) -> Tensor:
    """Return the integral of `exp(-s H)` for s from 0 to `time`, which also a singular H has: a corner of one exponential."""
    size = len(matrix)
    block = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    block[:size, :size], block[:size, size:] = -matrix, torch.eye(size, dtype=torch.float64)
    return torch.linalg.matrix_exp(time * block)[:size, size:]


def exponential_scores(left: list[oracle.Example], right: list[oracle.Example], strategy: str, time: float, decay: float) -> Tensor:
    """Return `g_q^T (integral of exp(-s (H + decay))) g_t`, summed over layers."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for name, curvature in oracle.fit(LAYERS, strategy, examples()[1]).items():
        dense = curvature.dense(0)
        response = integral(dense + decay * torch.eye(len(dense), dtype=torch.float64), time)
        one, other = (torch.stack([example.gradient[name].flatten() for example in side]) for side in (left, right))
        total += one @ response @ other.T
    return total


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("time", [0.01, 1.0, 40.0])
@pytest.mark.parametrize("strategy", FITTED)
def test_scores_are_those_of_matrix_exponentials(strategy: str, time: float, decay: float) -> None:
    """Damping is weight decay here: it is added to the curvature within the exponent."""
    queries, train = examples()
    attributor, response = engine(strategy), Unrolled(time=time)
    found = attributor.scores(QUERIES, TRAIN, response=response, damping=decay, per_layer=True, batch_size=5)
    assert_close(found.values, exponential_scores(queries, train, strategy, time, decay), "scores", rtol=1e-8)
    assert_close(sum(found.per_layer.values()), found.values, "layers", rtol=1e-10)
    own = attributor.self_influence(TRAIN, response=response, damping=decay)
    assert_close(own, exponential_scores(train, train, strategy, time, decay).diagonal(), "self-influence", rtol=1e-8)


def test_auto_damping_of_a_finite_run_is_none() -> None:
    attributor = engine()
    auto = attributor.scores(QUERIES, TRAIN, response=Unrolled(time=2.0)).values
    none = attributor.scores(QUERIES, TRAIN, response=Unrolled(time=2.0), damping=0.0, overwrite=True).values
    assert torch.equal(auto, none)


@pytest.mark.parametrize("damping", [0.1, Damping(relative=0.2), Damping(relative=0.2, scope="model")], ids=str)
@pytest.mark.parametrize("strategy", FITTED)
def test_a_long_run_has_converged(strategy: str, damping: Any) -> None:
    attributor = engine(strategy)
    inverse = attributor.scores(QUERIES, TRAIN, damping=damping).values
    unrolled = attributor.scores(QUERIES, TRAIN, damping=damping, response=Unrolled(time=1e9), overwrite=True).values
    assert_close(unrolled, inverse, "time to infinity", rtol=1e-10)


@pytest.mark.parametrize("strategy", FITTED)
def test_a_short_run_has_moved_along_its_gradient(strategy: str) -> None:
    plain = engine("identity").scores(QUERIES, TRAIN).values
    unrolled = engine(strategy).scores(QUERIES, TRAIN, response=Unrolled(time=1e-8)).values
    assert_close(unrolled, 1e-8 * plain, "time to zero", rtol=1e-6, atol_of_largest=1e-8)


def test_weights_of_single_eigenvalues() -> None:
    """Tiny and huge products of time and eigenvalue neither cancel nor overflow."""
    values = torch.tensor([0.0, 1e-300, 1e-18, 1e-9, 1e-3, 1.0, 50.0, 1e6, 1e300], dtype=torch.float64)
    for time in (1e-12, 0.5, 3.0, 1e9):
        expected = [time if value == 0 else -math.expm1(-value * time) / value for value in values.tolist()]
        assert_close(Unrolled(time=time).weights(values), torch.tensor(expected, dtype=torch.float64), f"time {time}", atol_of_largest=0)
        left = torch.tensor([math.exp(-value * time) for value in values.tolist()], dtype=torch.float64)
        assert_close(Unrolled(time=time).remainder(values), left, "remainder", rtol=1e-12)


# ---------------------------------------------------------------------------------------------- length of training


def test_the_length_of_training_is_known_or_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"response='unrolled' needs the length of training.*whence.Unrolled\(time=sum of the learning"):
        engine().scores(QUERIES, TRAIN, response="unrolled")
    with pytest.raises(ConfigError, match=r"response='unrolled' needs the length of training"):
        engine().self_influence(TRAIN, response="unrolled")
    known = engine(training_time=1.5)
    expected = engine().scores(QUERIES, TRAIN, response=Unrolled(time=1.5)).values
    assert_close(known.scores(QUERIES, TRAIN, response="unrolled").values, expected, "scores", rtol=1e-12)
    assert_close(
        known.self_influence(TRAIN, response="unrolled"), engine().self_influence(TRAIN, response=Unrolled(time=1.5)), "own", rtol=1e-12
    )


@pytest.mark.parametrize("time", [0.0, -1.0, math.inf, math.nan])
def test_lengths_that_cannot_be(time: float) -> None:
    with pytest.raises(ConfigError, match=r"Unrolled\(time=.*must be a positive number"):
        Unrolled(time=time)
    with pytest.raises(ConfigError, match=r"must be a positive number"):
        engine(training_time=time).scores(QUERIES, TRAIN, response="unrolled")


def test_a_response_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"response='short' is not known; choose 'inverse', 'unrolled' or whence.Unrolled"):
        engine().scores(QUERIES, TRAIN, response="short")  # type: ignore[arg-type]


def test_another_length_is_another_result(tmp_path: Any) -> None:
    engine(run_dir=tmp_path).scores(QUERIES, TRAIN, response=Unrolled(time=1.0))
    with pytest.raises(MismatchError, match="response"):
        engine(run_dir=tmp_path).scores(QUERIES, TRAIN, response=Unrolled(time=2.0))
    with pytest.raises(MismatchError, match="response"):
        engine(run_dir=tmp_path).scores(QUERIES, TRAIN, damping=0.0)


# ---------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("response", ["inverse", Unrolled(time=1 / 3)], ids=str)
@pytest.mark.parametrize("damping", [0.0, 1 / 3, Damping(relative=0.1), Damping(relative=1e-9, scope="model")], ids=str)
def test_a_spectrum_survives_json(damping: Any, response: Any, scale: float) -> None:
    spectrum = Spectrum(damping=damping, response=response, scale=scale)
    assert Spectrum.from_json(json.loads(json.dumps(spectrum.to_json()))) == spectrum
