"""Random projections: inner products are kept on average, with the variance of a dense matrix of signs, whatever falls together how."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.refit import principal
from whence.refit.projection import PARTS, ProjectionOptions, Signs, Whole, projector, signs_of
from whence.refit.stored import COUNTS, GRADIENTS

SHAPES = {"one": (1, 7, 9), "two": (2, 3, 5), "three": (1, 40, 6)}
CPU = torch.device("cpu")


def gradients(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([values.flatten(1) for values in found.values()], dim=1)


def projected(made: Signs | Whole, found: dict[str, Tensor]) -> Tensor:
    into = torch.zeros(len(found["one"]), made.dimension, dtype=torch.float64)
    for name, values in found.items():
        made.add(into, name, values)
    return into


def signs(dimension: int, seed: int) -> Signs:
    return Signs(dimension=dimension, seed=seed, device=CPU)


@pytest.mark.parametrize("dimension", [3, 30, 57, 600])
def test_inner_products_are_kept_on_average(dimension: int) -> None:
    """200 seeds; the mean within four of its standard errors, and the variance at most that of dense signs, within its own noise."""
    found, seeds = gradients(2), 200
    x, y = flat(found)
    products = torch.stack([rows @ rows.T for rows in (projected(signs(dimension, seed), found) for seed in range(seeds))])
    for values, wanted, bound in (
        (products[:, 0, 1], x @ y, (x @ x * (y @ y) + (x @ y) ** 2) / dimension),
        (products[:, 0, 0], x @ x, 2 * (x @ x) ** 2 / dimension),
    ):
        assert (values.mean() - wanted).abs() < 4 * values.std() / math.sqrt(seeds)
        assert 0.2 * bound < values.var() < 1.4 * bound


def test_distances_of_many_rows_are_kept() -> None:
    """The lemma itself: 40 points in 500 dimensions, none of 780 distances off by more than 5 standard deviations of a single one."""
    found = gradients(40)
    exact, kept = (torch.cdist(rows, rows) for rows in (flat(found), projected(signs(500, 1), found)))
    places = torch.triu_indices(40, 40, 1)
    ratio = (kept / exact)[places[0], places[1]].square()
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / 500)


@pytest.mark.parametrize("dimension", [1, 3, 10, 57])
def test_every_coordinate_goes_to_one_number_of_every_part(dimension: int) -> None:
    places, drawn = signs_of("layer", 123, dimension, 5)
    assert places.shape == drawn.shape
    assert len(places) == dimension
    used = places[drawn != 0]
    parts = min(PARTS, dimension)
    assert used.bincount(minlength=123).tolist() == [parts] * 123
    unit = torch.zeros(1, 1, 123, 1, dtype=torch.float64)
    unit[0, 0, 77] = 2.0
    into = torch.zeros(1, dimension, dtype=torch.float64)
    signs(dimension, 5).add(into, "layer", unit)
    assert float(into.norm()) == pytest.approx(2.0)
    assert set(drawn.flatten().tolist()) <= {-1, 0, 1}


def test_what_is_drawn_depends_on_seed_and_layer_alone() -> None:
    """These very numbers: a store that is made today must be of use tomorrow."""
    places, drawn = signs_of("layer", 10, 8, 3)
    assert places.tolist() == PLACES
    assert drawn.tolist() == SIGNS
    for other in (signs_of("other", 10, 8, 3), signs_of("layer", 10, 8, 4)):
        assert not torch.equal(other[1], drawn)
    longer = signs_of("layer", 20, 8, 3)[0]
    assert torch.equal(longer[:, :5][drawn != 0], places[drawn != 0])


PLACES = [
    [0, 3, 4, 7, 9],
    [1, 2, 5, 6, 8],
    [0, 2, 4, 7, 9],
    [1, 3, 5, 6, 8],
    [0, 2, 5, 6, 8],
    [1, 3, 4, 7, 9],
    [1, 2, 4, 7, 9],
    [0, 3, 5, 6, 8],
]
SIGNS = [
    [-1, -1, 1, 1, 1],
    [1, 1, -1, 1, -1],
    [-1, 1, -1, -1, -1],
    [-1, -1, -1, 1, 1],
    [1, 1, -1, 1, 1],
    [1, 1, -1, 1, -1],
    [-1, 1, -1, -1, -1],
    [1, 1, -1, 1, 1],
]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    found = gradients(9)
    whole = projected(signs(20, 0), found)
    parts = torch.cat(
        [projected(signs(20, 0), {name: values[rows] for name, values in found.items()}) for rows in ([0], [1, 2, 3, 4, 5, 6, 7, 8])]
    )
    assert torch.equal(whole, parts)


def test_all_coordinates_are_in_the_layers_order() -> None:
    found = gradients(3)
    made = projector(ProjectionOptions(projection="none"), SHAPES, CPU)
    assert made.dimension == 7 * 9 + 2 * 3 * 5 + 40 * 6
    assert torch.equal(projected(made, found), flat(found))


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match=r"projection='dense' is not known; choose from 'random', 'pca', 'none'\."):
        ProjectionOptions(projection="dense")
    with pytest.raises(ConfigError, match=r"dimension=0 cannot be used; give a whole number of 1 or more\."):
        ProjectionOptions(dimension=0)
    with pytest.raises(ConfigError, match="seed=-1 cannot be used"):
        ProjectionOptions(seed=-1)
    with pytest.raises(ConfigError, match=r"keeps all of 90000 numbers for every row; at most 65536 are allowed\. Use projection='random'"):
        projector(ProjectionOptions(projection="none"), {"layer": (1, 300, 300)}, CPU)


def test_principal_directions_are_those_of_examples_that_count_once() -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(11, 8, generator=generator) * torch.arange(1, 9)
    counts = [torch.tensor([1, 4]), torch.tensor([6])]
    shards = [{GRADIENTS: rows, COUNTS: own} for rows, own in zip(wide.split([5, 6]), counts, strict=True)]
    found = principal.basis_of(shards, 3)
    basis = found["basis"].double()
    weights = torch.tensor([1.0] + 4 * [1 / 4] + 6 * [1 / 6], dtype=torch.float64)
    _, s, vt = torch.linalg.svd(wide.double() * weights.sqrt().unsqueeze(1), full_matrices=False)
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose((basis.T @ vt[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert float(found["share"]) == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    assert principal.basis_of([{GRADIENTS: wide[:2], COUNTS: torch.tensor([2])}], 5)["basis"].shape == (8, 2)
