"""Banks of retrains: exact subsets, jobs that depend on their content alone, nothing done twice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from joblib.externals.loky import get_reusable_executor

from whence.errors import ConfigError, DataError, MismatchError, NumericalError, StorageError
from whence.evaluate.retrain import RetrainBank, RetrainSpec, draw_masks, repeat_seed, retrain, retrain_bank
from whence.recipes.digits import DigitsRetraining, DigitsSettings
from whence.runtime.progress import Stages


@dataclass
class Counting:
    """Measures (sum of rows, seed, threads), and remembers what it was asked; stops at a given call, as Ctrl-C would."""

    key: str = "sums"
    stop_at: int | None = None
    calls: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    def __call__(self, rows, seed):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((tuple(rows), seed))
        return torch.tensor([float(sum(rows)), seed % 1000, torch.get_num_threads()])


def test_masks_have_exactly_the_share_and_more_of_them_keep_the_first():
    masks = draw_masks(101, 30, share=0.3, seed=1)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [30] * 30
    assert torch.equal(draw_masks(101, 10, share=0.3, seed=1), masks[:10])
    assert not torch.equal(draw_masks(101, 30, share=0.3, seed=2), masks)
    # Each row is in 30 subsets of 100 or so: binomial with standard deviation 2.5, five of those.
    assert (draw_masks(101, 100, share=0.3).sum(0) - 30 * 100 / 101).abs().max() < 23


@pytest.mark.parametrize("given", [{"rows": 1}, {"share": 0.0}, {"share": 1.0}, {"count": 0}, {"share": 0.01}])
def test_masks_that_cannot_be(given):
    with pytest.raises(ConfigError, match="of some rows but not all"):
        draw_masks(**{"rows": 20, "count": 2, **given})


def test_a_job_is_known_by_its_content():
    spec = RetrainSpec.from_mask(torch.tensor([True, False, True, True]), key="k", seed=3)
    assert spec.rows == (0, 2, 3)
    same = RetrainSpec(key="k", rows=(0, 2, 3), seed=3)
    assert spec == same
    assert spec.digest == same.digest
    others = [replace(spec, key="l"), replace(spec, rows=(0, 2)), replace(spec, seed=4)]
    assert len({spec.digest, *(other.digest for other in others)}) == 4
    for rows in ((), (1, 1), (2, 1), (-1, 2)):
        with pytest.raises(ConfigError, match=r"one row or more, from 0, rising"):
            RetrainSpec(key="k", rows=rows, seed=0)


def test_every_repeat_of_every_subset_has_a_seed_of_its_own_that_the_size_of_the_bank_leaves_alone():
    seeds = {repeat_seed(base, subset, repeat) for base in range(2) for subset in range(20) for repeat in range(5)}
    assert len(seeds) == 200
    masks, procedure = draw_masks(10, 4), Counting()
    small = retrain_bank(procedure, masks[:2], repeats=2)
    large = retrain_bank(procedure, masks, repeats=3)
    assert torch.equal(large.measurements[:2, :2], small.measurements)


def test_subsets_can_share_the_seeds_of_their_repeats():
    bank = retrain_bank(Counting(), draw_masks(10, 4), repeats=2, seed=5, common_seeds=True)
    seeds = bank.measurements[:, :, 1]
    assert torch.equal(seeds, seeds[:1].expand(4, 2))
    assert seeds[0, 0] != seeds[0, 1]


def test_a_bank_holds_what_each_job_measured_on_one_thread():
    masks, before = draw_masks(10, 3), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bank = retrain_bank(Counting(), masks, repeats=2, seed=5)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert bank.measurements.shape == (3, 2, 3)
    assert bank.measurements.dtype == torch.float64
    for subset, mask in enumerate(masks):
        for repeat in range(2):
            wanted = [float(mask.nonzero().sum()), repeat_seed(5, subset, repeat) % 1000, 1]
            assert bank.measurements[subset, repeat].tolist() == wanted
    assert torch.equal(bank.mean, bank.measurements.mean(1))
    assert bank.settings == {"key": "sums", "repeats": 2, "seed": 5, "common_seeds": False}


def test_nothing_is_done_twice(tmp_path):
    masks = draw_masks(10, 4)
    first, second = Counting(), Counting()
    plain = retrain_bank(first, masks[:3], repeats=2, folder=tmp_path)
    again = retrain_bank(second, masks[:3], repeats=2, folder=tmp_path)
    assert (len(first.calls), len(second.calls)) == (6, 0)
    assert torch.equal(plain.measurements, again.measurements)
    retrain_bank(second, masks, repeats=3, folder=tmp_path)
    assert len(second.calls) == 4 * 3 - 6, "more subsets and repeats only add to what is there"
    assert not set(first.calls) & set(second.calls)
    other = Counting(key="another procedure")
    retrain_bank(other, masks[:1], repeats=1, folder=tmp_path)
    assert len(other.calls) == 1


def test_the_same_subset_and_seed_is_one_job(monkeypatch):
    monkeypatch.setattr("whence.evaluate.retrain.repeat_seed", lambda *_: 0)
    procedure = Counting()
    bank = retrain_bank(procedure, draw_masks(10, 1).repeat(3, 1), repeats=2)
    assert len(procedure.calls) == 1
    assert bank.measurements.shape == (3, 2, 3)


def test_an_interrupted_bank_continues_where_it_stopped(tmp_path):
    masks, whole = draw_masks(10, 4), Counting()
    with pytest.raises(KeyboardInterrupt):
        retrain_bank(interrupted := Counting(stop_at=5), masks, repeats=2, folder=tmp_path)
    resumed = retrain_bank(rest := Counting(), masks, repeats=2, folder=tmp_path)
    assert len(interrupted.calls) == 5
    assert len(rest.calls) == 3
    assert torch.equal(resumed.measurements, retrain_bank(whole, masks, repeats=2).measurements)


def test_no_job_at_a_time_is_an_error():
    with pytest.raises(ConfigError, match=r"n_jobs=0 trains nothing; give how many trainings run at a time, or -1"):
        retrain_bank(Counting(), torch.ones(1, 3, dtype=torch.bool), repeats=1, n_jobs=0)


def test_a_damaged_job_is_found(tmp_path):
    masks = draw_masks(10, 1)
    retrain_bank(Counting(), masks, repeats=1, folder=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="is altered"):
        retrain_bank(Counting(), masks, repeats=1, folder=tmp_path)


def test_progress_counts_what_is_left_to_do(tmp_path, monkeypatch):
    stages, seen = Stages(), []
    original = Stages.track
    monkeypatch.setattr(Stages, "track", lambda self, total, text: (seen.append((total, text)), original(self, total, text))[1])
    retrain_bank(Counting(), draw_masks(10, 1), repeats=2, folder=tmp_path, stages=stages)
    retrain_bank(Counting(), draw_masks(10, 3), repeats=2, folder=tmp_path, stages=stages)
    assert seen == [(2, "Retraining"), (4, "Retraining")]
    assert [(row.name, row.calls) for row in stages.rows()] == [("Retrain", 2)]


def test_procedures_that_cannot_be():
    spec = RetrainSpec(key="k", rows=(0, 1), seed=7)

    def returning(value):
        procedure = Counting(key="k")
        procedure.__class__ = type("Fixed", (Counting,), {"__call__": lambda self, rows, seed: value})
        return procedure

    with pytest.raises(ConfigError, match="of procedure 'k', but 'sums' was given"):
        retrain(Counting(), spec)
    with pytest.raises(DataError, match=r"returned shape \(\)"):
        retrain(returning(torch.tensor(1.0)), spec)
    with pytest.raises(NumericalError, match=r"on 2 rows with seed 7: the measurement of query 1 is nan"):
        retrain(returning(torch.tensor([1.0, float("nan")])), spec)
    for masks in (torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(0, 3, dtype=torch.bool)):
        with pytest.raises(ConfigError, match=r"give bool \[subset, train\]"):
            retrain_bank(Counting(), masks)
    with pytest.raises(ConfigError, match="repeats=0"):
        retrain_bank(Counting(), draw_masks(4, 1), repeats=0)


def made_bank(subsets: int = 6) -> RetrainBank:
    return RetrainBank(masks=draw_masks(40, subsets), measurements=torch.randn(subsets, 2, 3).double(), settings={"key": "k"})


def test_a_bank_comes_back_from_its_folder(tmp_path):
    bank = made_bank()
    bank.save(tmp_path / "bank")
    again = RetrainBank.load(tmp_path / "bank")
    assert torch.equal(again.masks, bank.masks)
    assert torch.equal(again.measurements, bank.measurements)
    assert again.settings == bank.settings
    made_bank(2).save(tmp_path / "bank")
    assert len(RetrainBank.load(tmp_path / "bank").masks) == 2
    retrain_bank(Counting(), draw_masks(4, 1), repeats=1, folder=tmp_path / "jobs")
    (jobs,) = (tmp_path / "jobs").iterdir()
    with pytest.raises(MismatchError, match="holds 'retrains', but 'retrain_bank' was asked for"):
        RetrainBank.load(jobs)


def test_calibration_and_reported_subsets_are_apart():
    bank = made_bank()
    calibration, reported = bank.split(calibration=2)
    assert torch.equal(torch.cat([calibration.masks, reported.masks]), bank.masks)
    assert torch.equal(torch.cat([calibration.measurements, reported.measurements]), bank.measurements)
    assert (calibration.settings["part"], reported.settings["part"]) == ("calibration", "reported")
    assert "part" not in bank.settings
    for count in (0, 6, -1):
        with pytest.raises(ConfigError, match="1 to 5 can be set aside"):
            bank.split(calibration=count)
    with pytest.raises(DataError, match="1 subsets would be used to calibrate and to report"):
        replace(bank, masks=bank.masks[[0, 1, 2, 3, 4, 0]]).split(calibration=2)


@pytest.mark.parametrize(
    ("masks", "measurements"),
    [(torch.ones(2, 3), (2, 1, 1)), (torch.ones(2, 3, dtype=torch.bool), (3, 1, 1)), (torch.ones(2, 3, dtype=torch.bool), (2, 1))],
)
def test_banks_that_cannot_be(masks, measurements):
    with pytest.raises(DataError, match=r"masks, bool \[subset, train\], and measurements \[subset, repeat, query\]"):
        RetrainBank(masks=masks, measurements=torch.zeros(measurements))


QUICK = DigitsRetraining(settings=DigitsSettings(epochs=1), queries=7)


def test_the_digits_are_a_procedure():
    rows = list(range(0, 1200, 10))
    first, again, other = QUICK(rows, 1), QUICK(rows, 1), QUICK(rows, 2)
    assert first.shape == (7,)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    margin = replace(QUICK, measurement="margin")
    # The loss is the softplus of minus the log-odds.
    torch.testing.assert_close(torch.nn.functional.softplus(margin(rows, 1)), first)
    keys = {p.key for p in (QUICK, margin, replace(QUICK, queries=8), replace(QUICK, settings=DigitsSettings(seed=1)))}
    assert len(keys) == 4


def test_processes_beside_each_other_give_the_same_bank(tmp_path):
    masks = draw_masks(1200, 2, share=0.1)
    alone = retrain_bank(QUICK, masks, repeats=2)
    try:
        beside = retrain_bank(QUICK, masks, repeats=2, n_jobs=2, folder=tmp_path)
    finally:
        get_reusable_executor().shutdown(wait=True)
    assert torch.equal(alone.measurements, beside.measurements)
