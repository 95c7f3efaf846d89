"""Triplets: their making, their coordinates, and how their bytes are spent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import case_named
from whence.capture.pair import Basis
from whence.index import factors
from whence.index.cut import make_cut
from whence.index.factors import FactorRows, Triplets
from whence.index.pilot import best_spent

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def product(found: Triplets) -> Tensor:
    return (found.left * found.values.unsqueeze(-1)).mT @ found.right


def test_the_range_finder_finds_the_leading_triplets() -> None:
    g, a = drawn(3, 60, 80), drawn(3, 60, 90)
    a *= 0.7 ** torch.arange(60)[:, None]  # a spectrum that falls, as gradients have
    found = factors._of_pair(g, a, 4)  # so few that nothing is decomposed whole
    whole = torch.linalg.svd(g.mT @ a)
    torch.testing.assert_close(found.values, whole.S[:, :4], rtol=1e-4, atol=1e-4)
    best = (whole.U[..., :4] * whole.S[:, None, :4]) @ whole.Vh[:, :4]
    assert (product(found) - best).norm() < 0.02 * best.norm()


def test_a_pair_of_few_positions_is_taken_apart_whole() -> None:
    g, a = drawn(2, 5, 30), drawn(2, 5, 20)
    torch.testing.assert_close(product(factors._of_pair(g, a, 5)), g.mT @ a, rtol=1e-4, atol=1e-5)


def test_cuts_keep_the_coordinates_with_most_energy() -> None:
    basis = Basis(outputs=torch.eye(40)[None], inputs=torch.eye(20)[None])
    energy = torch.zeros(1, 40, 20)
    energy[0, 8:28] = 1
    energy[0, :, 3] += 1
    cut = make_cut((1, 40, 20), basis, energy, 0.5)
    assert cut.outputs is not None
    assert cut.outputs.tolist() == list(range(8, 28))
    assert cut.inputs is not None
    assert len(cut.inputs) == 16  # never fewer than sixteen
    assert 3 in cut.inputs.tolist()
    assert cut.sizes == (20, 16)
    values = drawn(2, 1, 40, 20)
    torch.testing.assert_close(cut.of(values), values[:, 0][:, cut.outputs][..., cut.inputs])
    rotated = cut.basis(basis).rotate(values)
    torch.testing.assert_close(rotated[:, 0], cut.of(values))


def test_what_cannot_be_cut_stays_whole() -> None:
    basis = Basis(outputs=torch.eye(40)[None], inputs=None)
    assert make_cut((1, 40, 90), basis, torch.ones(1, 40, 90), 0.5).sizes == (20, 90)  # one-hot inputs have no eigenvectors
    assert make_cut((1, 40, 90), basis, None, 0.5).sizes == (40, 90)
    assert make_cut((3, 4, 5), Basis(), torch.ones(3, 4, 5), 0.5).sizes == (3, 20)


def test_the_candidate_that_keeps_most_is_taken() -> None:
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    index = attributor.index(ROWS, keep=0.5)
    made = index.settings["rows"]
    assert made["coordinates"] in (1.0, 0.5, 0.25, 0.125)
    assert made["dtype"] in ("int8", "int4")
    projection, _ = attributor.index_queries(QUERIES, None, index.settings)
    assert isinstance(projection, FactorRows)
    assert projection.settings.to_json() == made


@pytest.mark.parametrize("dtype", ["int8", "int4", "auto"])
def test_fixed_settings_are_kept(dtype: str) -> None:
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    made = attributor.index(ROWS, keep=0.5, dtype=dtype).settings["rows"]
    assert dtype == "auto" or made["dtype"] == dtype
    # Without eigenvectors there is nothing to choose from.
    plain = attributor.index(ROWS, keep=0.5, strategy="identity", name="plain").settings["rows"]
    assert plain["coordinates"] == 1.0


def test_worth_is_what_is_kept() -> None:
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    rows = attributor._rows(ROWS, "training", None, 5)
    projection, _ = attributor.index_queries(QUERIES, None, attributor.index(ROWS, keep=1).settings)
    assert isinstance(projection, FactorRows)
    less = replace(projection, settings=replace(projection.settings, keep=0.1))  # not every layer's triplet fits
    with attributor._session(rows, train=ROWS) as (recorder, _):
        assert best_spent(recorder, rows, [less, projection]) is projection
        assert best_spent(recorder, rows, [projection, less]) is projection
        assert best_spent(recorder, rows, [less]) is less
