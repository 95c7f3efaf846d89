"""Files of a run folder that do not belong or are damaged, and runs that broke off and go on."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from cases import case_named, watch
from whence.errors import MismatchError, StorageError
from whence.tasks import Classification

CASE = case_named("mlp")
ROWS, QUERIES = CASE.data()
STAGES = ["fit", "scores", "self_influence"]
CALLS: dict[str, float] = {"made": 0, "allowed": float("inf")}


class Counted(Classification):
    """Counts how often the model is run for it, and breaks off when told to."""

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        if CALLS["made"] >= CALLS["allowed"]:
            raise KeyboardInterrupt
        CALLS["made"] += 1
        return super().output(model, batch)


class Doubled(Classification):
    """Another task."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return 2.0 * super().loss(model, batch)


def attributor(model: nn.Module | None = None, **options: Any) -> whence.Attributor:
    """Return the engine on the small MLP, or on the given model."""
    return CASE.attributor(CASE.model() if model is None else model, **options)


def replaced(rows: list, index: int, row: Any) -> list:
    return [*rows[:index], row, *rows[index + 1 :]]


def counted(monkeypatch: pytest.MonkeyPatch, allowed: float = float("inf")) -> dict[str, float]:
    """Start counting anew; break off at the call after `allowed`."""
    monkeypatch.setitem(CALLS, "made", 0)
    monkeypatch.setitem(CALLS, "allowed", allowed)
    return CALLS


def other_weights() -> nn.Module:
    model = CASE.model()
    with torch.no_grad():
        model[2].bias[0] += 1e-9
    return watch(model)


@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_factors_of_another_checkpoint(strategy: str, tmp_path: Path) -> None:
    attributor(run_dir=tmp_path).fit(ROWS, strategy=strategy, empirical=True)
    changed = attributor(other_weights(), run_dir=tmp_path)
    for work in (
        partial(changed.fit, ROWS, strategy=strategy, empirical=True),
        partial(changed.scores, QUERIES, ROWS, strategy=strategy),
        partial(changed.self_influence, ROWS, strategy=strategy),
    ):
        with pytest.raises(MismatchError, match=r"\bmodel\b"):
            work()
    assert changed.fit(ROWS, strategy=strategy, empirical=True, overwrite=True).self_influence(ROWS).shape == (13,)


def test_factors_of_other_training_data(tmp_path: Path) -> None:
    attributor(run_dir=tmp_path).fit(ROWS, empirical=True)
    changed = replaced(ROWS, 4, (ROWS[4][0], (ROWS[4][1] + 1) % 3))
    with pytest.raises(MismatchError, match=r"\btrain\b"):
        attributor(run_dir=tmp_path).fit(changed, empirical=True)


@pytest.mark.parametrize(
    ("field", "options"),
    [("empirical", {"empirical": False}), ("max_examples", {"max_examples": 6}), ("seed", {"seed": 5, "empirical": False})],
)
def test_factors_of_other_settings(field: str, options: dict, tmp_path: Path) -> None:
    first = {"empirical": field != "seed"}
    attributor(run_dir=tmp_path).fit(ROWS, **first)
    options = first | options
    changed = attributor(run_dir=tmp_path, seed=options.pop("seed", 0))
    with pytest.raises(MismatchError, match=rf"\b{field}\b"):
        changed.fit(ROWS, **options)


def test_another_task(tmp_path: Path) -> None:
    attributor(run_dir=tmp_path).fit(ROWS, empirical=True)
    with pytest.raises(MismatchError, match=r"\btask\b"):
        attributor(run_dir=tmp_path, task=Doubled()).fit(ROWS, empirical=True)


def test_other_batch_sizes_are_the_same_run(tmp_path: Path) -> None:
    wanted = attributor(run_dir=tmp_path).fit(ROWS, empirical=True, batch_size=4).scores(QUERIES, ROWS).values
    found = attributor(run_dir=tmp_path).fit(ROWS, empirical=True, batch_size=7).scores(QUERIES, ROWS, batch_size=3).values
    assert torch.equal(found, wanted)


def test_factors_are_found_by_a_fresh_attributor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = attributor(run_dir=tmp_path, task=Counted()).fit(ROWS, empirical=True).scores(QUERIES, ROWS).values
    shutil.rmtree(tmp_path / "scores")
    assert torch.equal(attributor(run_dir=tmp_path, task=Counted()).scores(QUERIES, ROWS).values, wanted)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_damaged_factor_file(how: str, tmp_path: Path) -> None:
    attributor(run_dir=tmp_path).fit(ROWS, empirical=True)
    for path in sorted((tmp_path / "factors").rglob("*.safetensors")):
        whole = path.read_bytes()
        damage(path, how)
        with pytest.raises(StorageError) as caught:
            attributor(run_dir=tmp_path).scores(QUERIES, ROWS)
        assert path.name in str(caught.value)
        assert "delete" in str(caught.value).lower() or "again" in str(caught.value).lower(), "the remedy is missing"
        assert not isinstance(caught.value, MismatchError)
        path.write_bytes(whole)


# ---------------------------------------------------------------------------------------------- breaking off and going on


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of four rows instead of hundreds, each saved when it is done."""
    monkeypatch.setattr("whence.capture.passes.BLOCK", 4)
    monkeypatch.setattr("whence.curvature.fit.CHECKPOINT_SECONDS", -1.0)


def files(folder: Path) -> dict[str, bytes]:
    """Return all files but locks and the log of commands, which holds times."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def work(stage: str, folder: Path) -> Any:
    """Fit, or score with factors that are there already, two rows at a time."""
    ready = attributor(run_dir=folder, task=Counted())
    if stage == "fit":
        return ready.fit(ROWS, batch_size=2)
    if stage == "scores":
        return ready.scores(QUERIES, ROWS, batch_size=2, query_batch_size=3, per_layer=True).values
    return ready.self_influence(ROWS, batch_size=2)


def prepared(stage: str, folder: Path) -> Path:
    if stage != "fit":
        attributor(run_dir=folder, task=Counted()).fit(ROWS, batch_size=2)
    return folder


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_broke_off_ends_with_the_same_files(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off after every possible number of batches, and a second time while going on."""
    smooth = prepared(stage, tmp_path / "smooth")
    calls = counted(monkeypatch)
    result = work(stage, smooth)
    wanted, total = files(smooth), int(calls["made"])
    assert total >= 7, "13 rows in twos are seven batches"
    for allowed in range(total):
        counted(monkeypatch)
        broken = prepared(stage, tmp_path / f"broken{allowed}")
        for budget in (allowed, 3):
            counted(monkeypatch, budget)
            if budget == 3 and allowed == total - 1:
                break
            with pytest.raises(KeyboardInterrupt):
                work(stage, broken)
            if total - allowed < 8:
                break
        counted(monkeypatch)
        again = work(stage, broken)
        found = files(broken)
        assert sorted(found) == sorted(wanted), f"broken off after {allowed} of {total} calls"
        changed = [name for name in wanted if found[name] != wanted[name]]
        assert changed == [], f"broken off after {allowed} of {total} calls"
        if stage != "fit":
            assert torch.equal(again, result)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("stage", STAGES)
def test_finished_work_is_not_done_again(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of four rows (two batches), what is lost is at most the block at work and the looks taken before it."""
    calls = counted(monkeypatch)
    work(stage, prepared(stage, tmp_path / "smooth"))
    smooth = prepared(stage, tmp_path / "again")
    calls = counted(monkeypatch)
    work(stage, smooth)
    total = int(calls["made"])
    calls = counted(monkeypatch)
    work(stage, smooth)
    looks = int(calls["made"])
    assert looks <= 5, "a finished run is read, not repeated; two small looks at the model, one of the task and a check of two rows stay"
    for allowed in range(looks, total):
        counted(monkeypatch)
        broken = prepared(stage, tmp_path / f"broken{allowed}")
        counted(monkeypatch, allowed)
        with pytest.raises(KeyboardInterrupt):
            work(stage, broken)
        calls = counted(monkeypatch)
        work(stage, broken)
        # The four queries (two batches) are run anew before the training rows; then comes the block that was at work.
        repeated = calls["made"] - (total - allowed)
        assert repeated <= looks + 4, f"broken off after {allowed} of {total} calls, {repeated:.0f} were made twice"


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_a_layer_called_only_before_the_break_is_kept(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is open in rows 2 and 3 alone; whoever goes on after them never sees the branch called."""
    case = case_named("branch_not_always_taken")
    rows = case.data()[0]
    for index, (x, _) in enumerate(rows):
        x[0] = x[0].abs() if index in (2, 3) else -x[0].abs()

    def fit(folder: str) -> whence.Attributor:
        ready = case.attributor(case.model(), task=Counted(), run_dir=tmp_path / folder)
        return ready.fit(rows, strategy=strategy, empirical=True, batch_size=2)

    calls = counted(monkeypatch)
    wanted = fit("smooth")
    total = int(calls["made"])
    for allowed in range(3, total):
        counted(monkeypatch, allowed)
        with pytest.raises(KeyboardInterrupt):
            fit(f"broken{allowed}")
        counted(monkeypatch)
        found = fit(f"broken{allowed}")
        assert found.coverage.tracked == wanted.coverage.tracked, f"broken off after {allowed} of {total} calls"
        assert files(tmp_path / f"broken{allowed}") == files(tmp_path / "smooth"), f"broken off after {allowed} of {total} calls"
    assert "branch" in wanted.coverage.tracked
