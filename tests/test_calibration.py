"""Calibration on subsets whose answer is known: which damping is chosen, what scale comes back, and what it holds for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from cases import build, watch
from compare import assert_close
from whence import Damping, Unrolled
from whence.attributor import CANDIDATES
from whence.errors import ConfigError, DataError, MismatchError
from whence.evaluate.retrain import RetrainBank, draw_masks
from whence.tasks import Classification

TRAIN_ROWS, QUERY_ROWS, SUBSETS = 16, 5, 60


def rows(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3, strict=True))


TRAIN, QUERIES = rows(1, TRAIN_ROWS), rows(2, QUERY_ROWS)


def engine(seed: int = 0, **options: Any) -> whence.Attributor:
    model = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2

    watch(model)
    return whence.Attributor(model, Classification(measurement="margin"), device="cpu", progress=False, **options)


def bank_of(values: Tensor, factor: float, *, part: str = "calibration", offset: float = 3.0) -> RetrainBank:
    """Return the bank of a world in which leaving out row t raises measurement q by `factor * values[q, t] / N`."""
    masks = draw_masks(values.shape[1], SUBSETS)
    measured = offset + factor * (values @ (~masks).double().T) / values.shape[1]
    return RetrainBank(masks=masks, measurements=measured.T[:, None].double(), settings={"part": part})


TRUTHS: list[Any] = [0.002, 0.4, Damping(relative=0.05), Damping(relative=2.0, scope="model"), Unrolled(time=3.0)]


@pytest.mark.parametrize("truth", TRUTHS, ids=str)
@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_the_truth_is_found_among_candidates(truth: Any, strategy: Any) -> None:
    """The bank is made of the scores of one candidate: it scores 1 and is chosen, and the scale is the bank's factor."""
    attributor = engine().fit(TRAIN, strategy=strategy)
    named: dict[str, Any] = {"response": truth, "damping": 0.0} if isinstance(truth, Unrolled) else {"damping": truth}
    right = attributor.scores(QUERIES, TRAIN, **named).values
    found = attributor.calibrate(QUERIES, TRAIN, bank_of(right, 0.37), candidates=TRUTHS)
    table = {str(spectrum): score for spectrum, score in found.table}
    assert len(table) == len(TRUTHS)
    assert max(table.values()) == pytest.approx(1.0)
    assert sorted(table.values())[-2] < 1 - 1e-6, "the candidates must differ for this test to mean anything"
    chosen = found.damping
    assert chosen.response == (truth if isinstance(truth, Unrolled) else "inverse")
    assert chosen.damping == (0.0 if isinstance(truth, Unrolled) else truth)
    assert found.scale == pytest.approx(0.37)
    calibrated = attributor.scores(QUERIES, TRAIN, damping="calibrated", overwrite=True)
    assert_close(calibrated.values, right, "scores", rtol=1e-12)
    assert_close(calibrated.removal_effect(), 0.37 * right / TRAIN_ROWS, "removal", rtol=1e-9)
    assert_close(calibrated.removal_effect(scale=2.0), 2.0 * right / TRAIN_ROWS, "own scale", rtol=1e-12)
    own = attributor.self_influence(TRAIN, damping="calibrated")
    assert_close(own, attributor.self_influence(TRAIN, **named, overwrite=True), "self-influence", rtol=1e-12)


def test_a_calibration_is_kept_with_the_run(tmp_path: Path) -> None:
    first = engine(run_dir=tmp_path).fit(TRAIN)
    right = first.scores(QUERIES, TRAIN, damping=0.4).values
    first.calibrate(QUERIES, TRAIN, bank_of(right, 1.9), candidates=[0.1, 0.4, 4.0])
    again = engine(run_dir=tmp_path).scores(QUERIES[:2], TRAIN, damping="calibrated", name="again", train_rows=[3, 1])
    assert_close(again.values, right[:2, [3, 1]], "scores", rtol=1e-12)
    assert_close(again.removal_effect(), 1.9 * right[:2, [3, 1]] / TRAIN_ROWS, "removal", rtol=1e-9)
    kept = json.loads((tmp_path / "calibration" / "ekfac.json").read_text(encoding="utf-8"))
    assert kept["spectrum"]["damping"] == 0.4


def test_a_calibration_belongs_to_its_model(tmp_path: Path) -> None:
    first = engine(run_dir=tmp_path).fit(TRAIN)
    right = first.scores(QUERIES, TRAIN, damping=0.4).values
    first.calibrate(QUERIES, TRAIN, bank_of(right, 1.0), candidates=[0.1, 0.4])
    other = engine(seed=7, run_dir=tmp_path)
    for call in (
        lambda: other.scores(QUERIES, TRAIN, strategy="ekfac", damping="calibrated"),
        lambda: other.self_influence(TRAIN, strategy="ekfac", damping="calibrated"),
    ):
        with pytest.raises(MismatchError, match=r"ekfac.json was found for another model. Call attributor.calibrate"):
            call()


def test_a_calibration_belongs_to_its_strategy_and_solver() -> None:
    attributor = engine().fit(TRAIN, strategy="kfac").fit(TRAIN, strategy="ekfac")
    kfac = attributor.scores(QUERIES, TRAIN, strategy="kfac", damping=4.0).values
    attributor.calibrate(QUERIES, TRAIN, bank_of(kfac, 1.0), strategy="kfac", candidates=[0.4, 4.0])
    found = attributor.scores(QUERIES, TRAIN, strategy="kfac", damping="calibrated", overwrite=True).values
    assert_close(found, kfac, "kfac", rtol=1e-12)
    for options in ({"strategy": "ekfac"}, {}, {"solver": "exact"}, {"strategy": "kfac", "solver": "cg"}):
        with pytest.raises(ConfigError, match=r"damping='calibrated' needs a calibration.*attributor.calibrate\(queries, train, bank\)"):
            attributor.scores(QUERIES, TRAIN, damping="calibrated", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"damping='calibrated' needs a calibration"):
        engine().self_influence(TRAIN, strategy="identity", damping="calibrated")


@pytest.mark.parametrize("solver", ["exact", whence.ConjugateGradients(iterations=40, tolerance=1e-10)], ids=str)
def test_solvers_are_calibrated_too(solver: Any) -> None:
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN, solver=solver, damping=Damping(relative=3.0)).values
    candidates = [0.01, Damping(relative=3.0), Damping(relative=30.0, scope="model")]
    found = attributor.calibrate(QUERIES, TRAIN, bank_of(right, 0.8), solver=solver, candidates=candidates)
    assert found.damping.damping == Damping(relative=3.0)
    again = attributor.scores(QUERIES, TRAIN, solver=solver, damping="calibrated", overwrite=True)
    assert_close(again.values, right, "scores", rtol=1e-9)
    assert_close(again.removal_effect(), 0.8 * right / TRAIN_ROWS, "removal", rtol=1e-6)
    with pytest.raises(ConfigError, match="solver='direct'"):
        attributor.calibrate(QUERIES, TRAIN, bank_of(right, 0.8), solver=solver, candidates=[Unrolled(time=1.0)])


def test_a_query_subset_stands_for_the_banks_columns() -> None:
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN, damping=0.4, query_rows=[4, 1, 2]).values
    found = attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0), candidates=[0.001, 0.4, 40.0], query_rows=[4, 1, 2], batch_size=3)
    assert found.damping.damping == 0.4
    with pytest.raises(DataError, match=r"scores are of 5 queries, measurements of 3"):
        attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0))


def test_the_default_candidates_are_sensible() -> None:
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN, damping=Damping(relative=0.3, scope="model")).values
    found = attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0))
    assert found.damping.damping == Damping(relative=0.3, scope="model")
    assert len(found.table) == len(CANDIDATES) == 14
    assert {candidate.scope for candidate in CANDIDATES} == {"layer", "model"}


def test_reported_subsets_choose_nothing() -> None:
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN).values
    with pytest.raises(ConfigError, match=r"these subsets are to be reported, so nothing may be chosen by them"):
        attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0, part="reported"))
    with pytest.raises(ConfigError, match=r"no damping to choose from"):
        attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0), candidates=[])
    with pytest.raises(DataError, match=r"the subsets are of 16 rows"):
        attributor.calibrate(QUERIES, TRAIN[:9], bank_of(right, 1.0))
    with pytest.raises(ConfigError, match=r"damping=-1"):
        attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0), candidates=[-1])
    with pytest.raises(ConfigError, match=r"calibrated"):
        attributor.scores(QUERIES, TRAIN, damping="calibrated", name="fresh")


def test_a_calibrated_damping_is_no_silent_answer_to_another_response() -> None:
    """What was calibrated for the inverse says nothing about a finite run, and a response that is asked for is not dropped."""
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN, damping=0.4).values
    attributor.calibrate(QUERIES, TRAIN, bank_of(right, 1.0), candidates=[0.1, 0.4])
    with pytest.raises(ConfigError, match="response"):
        attributor.scores(QUERIES, TRAIN, damping="calibrated", response=Unrolled(time=0.1), name="other")


def test_normalised_scores_know_no_removal() -> None:
    attributor = engine().fit(TRAIN)
    right = attributor.scores(QUERIES, TRAIN, damping=0.4).values
    attributor.calibrate(QUERIES, TRAIN, bank_of(right, 2.0), candidates=[0.1, 0.4])
    for options in ({"normalize": "cosine"}, {"aggregate": "rows"}, {"aggregate": "both"}):
        scores = attributor.scores(QUERIES, TRAIN, damping="calibrated", overwrite=True, **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="do not predict the removal of a row"):
            scores.removal_effect()
    summed = attributor.scores(QUERIES, TRAIN, damping="calibrated", aggregate="queries", overwrite=True)
    assert_close(summed.removal_effect(), 2.0 * right.sum(0, keepdim=True) / TRAIN_ROWS, "removal", rtol=1e-9)
