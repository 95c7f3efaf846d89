"""From estimates to a data set: which rows are written, and with what record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import logistic
from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evidence.calibrating import EstimateSettings
from whence.evidence.first_order import GradientSettings
from whence.evidence.selecting import Selected, select_rows
from whence.recipes.base import Recipe
from whence.refit.limits import Constraints
from whence.refit.select import SelectOptions
from whence.storage.run import read_json

GIVEN = EstimateSettings(ridge=logistic.RIDGE, calibration=4)
ALONE = EstimateSettings(ridge=logistic.RIDGE, calibration=0)


def selected(folder: Path, recipe: Recipe | None = None, **options: Any) -> Selected:
    recipe = logistic.mine() if recipe is None else recipe
    folder.mkdir(exist_ok=True)
    attributor = Attributor(recipe.model, recipe.task, run_dir=folder / "run", progress=False, device="cpu")
    usual: dict[str, Any] = {
        "out": folder / "chosen.parquet",
        "gradients": GradientSettings(projection="none"),
        "settings": GIVEN,
        "how": SelectOptions(),
        "constraints": Constraints(),
        "folder": folder / "retrain",
    }
    return select_rows(attributor, recipe, **(usual | options))


def test_the_rows_of_the_chosen_groups_are_written(tmp_path: Path) -> None:
    found = selected(tmp_path)
    chosen = found.selection
    assert chosen.groups
    assert not set(logistic.WRONG) & set(chosen.groups), "groups with wrong labels harm"
    raw = logistic.mine().raw
    assert raw is not None
    wanted = [row for row, group in zip(raw, logistic.groups(), strict=True) if group in chosen.groups]
    assert parquet.read_table(found.written.path).to_pylist() == wanted
    dropped = parquet.read_table(found.written.dropped).to_pylist()
    assert {row["number"] for row in dropped} == set(range(len(raw))) - {row["number"] for row in wanted}
    record = read_json(found.written.provenance)
    assert record["origin"]["recipe"] == "mine"
    assert record["origin"]["selected"] == list(chosen.groups)
    assert record["origin"]["calibration"] == found.to_json()["calibration"]
    assert record["origin"]["trust"] is None
    assert record["settings"]["metric"] == "loss"
    assert record["settings"]["split"] == "validation"
    assert record["settings"]["gradients"]["projection"] == "none"
    assert record["cleaned"]["rows"] == len(wanted)


def test_estimates_of_a_selection_are_in_the_metrics_units(tmp_path: Path) -> None:
    how = SelectOptions(until="budget")
    raw = selected(tmp_path / "raw", settings=EstimateSettings(ridge=30.0, calibration=0), how=how).selection
    found = selected(tmp_path, settings=EstimateSettings(ridge=30.0, calibration=6), how=how)
    calibration = found.calibration
    assert calibration is not None
    assert calibration.slope > 0
    assert (calibration.shift, calibration.slope) != (0.0, 1.0)
    own = found.selection
    assert own.order == raw.order
    for name in ("estimate", "everything", "as_is", "start", "path"):
        wanted = calibration.apply(torch.tensor(getattr(raw, name), dtype=torch.float64))
        assert getattr(own, name) == pytest.approx(wanted.tolist(), rel=1e-6), name
    everything = float(logistic.query_losses(logistic.fitted(range(len(logistic.groups())))).mean())
    assert abs(own.everything - everything) < abs(raw.everything - everything)
    record = read_json(found.written.provenance)
    assert record["origin"]["estimate"] == own.estimate
    assert found.to_json()["selection"]["everything"] == own.everything


def test_the_estimate_is_that_of_the_real_fine_tune(tmp_path: Path) -> None:
    found = selected(tmp_path, settings=EstimateSettings(ridge=logistic.RIDGE, calibration=4, held_out=5))
    real = float(logistic.query_losses(logistic.fitted(found.selection.examples)).mean())
    everything = float(logistic.query_losses(logistic.fitted(range(len(logistic.groups())))).mean())
    assert found.selection.estimate == pytest.approx(real, rel=1e-4)
    assert real < everything
    assert found.start == pytest.approx(float(logistic.query_losses(logistic.network().double()).mean()), rel=1e-5)
    first, told, verdict, *_ = found.lines()
    assert first.startswith(f"{len(found.selection.groups)} of 8 groups chosen, {len(found.selection.examples)} of 40 examples")
    assert told.startswith(
        f"estimated loss on validation: {real:.4g}; with all groups {everything:.4g}; {found.start:.4g} as the model is."
    )
    assert verdict.startswith("The estimates are better than both trivial predictors on 5 held-out subsets")
    assert json.loads(json.dumps(found.to_json()))["trust"]["beats"]


def test_no_estimate_is_told_that_is_no_better_than_a_trivial_predictor(tmp_path: Path) -> None:
    alone = selected(tmp_path, settings=ALONE)
    assert alone.lines()[1:] == [
        "not compared with any real fine-tune: only the order of subsets may mean something. Give --calibration 6."
    ]
    far = EstimateSettings(ridge=1e7, calibration=4)
    assert selected(tmp_path, settings=far, overwrite=True).lines()[1] == "The estimates are no better than a trivial predictor:"
    judged = EstimateSettings(ridge=1e7, calibration=4, held_out=4)
    lines = selected(tmp_path, settings=judged, overwrite=True).lines()
    assert lines[1].startswith("Do not use the estimates")
    assert not any("estimated" in line for line in lines)


def test_why_there_is_no_report_is_said(tmp_path: Path) -> None:
    class Still(logistic.ExactRefit):
        key = "still"

        def __call__(self, rows: Any, seed: int) -> torch.Tensor:
            return torch.full((logistic.QUERIES,), 0.1)

    found = selected(tmp_path, logistic.mine(retraining=Still()), settings=EstimateSettings(ridge=1.0, calibration=4, held_out=5))
    assert found.trust is None
    assert found.lines()[1] == "No report: loss is 0.1 in all 5 held-out fine-tunes."
    assert found.to_json()["unreported"] == "loss is 0.1 in all 5 held-out fine-tunes"


@pytest.mark.parametrize("method", ["forward", "backward", "ensemble", "ridge", "lasso", "influence"])
def test_every_method_leaves_wrong_labels_out(tmp_path: Path, method: Any) -> None:
    how = SelectOptions(method=method, subsets=200)
    found = selected(tmp_path, how=how, settings=ALONE, constraints=Constraints(examples=15))
    assert 0 < len(found.selection.examples) <= 15
    assert not set(logistic.WRONG) & set(found.selection.groups)


def test_limits_are_kept(tmp_path: Path) -> None:
    least = Constraints(minimum={"source 2": 5}, examples=20)
    assert "source 2" in selected(tmp_path, constraints=least, settings=ALONE).selection.groups
    by_class = logistic.mine(groups=None, classes=torch.tensor([y for _, y in logistic.train_rows()]))
    limits = Constraints(minimum={"1": 4}, tokens=12)
    rows = GradientSettings(projection="none", by="row")
    found = selected(tmp_path, by_class, gradients=rows, constraints=limits, settings=ALONE, overwrite=True)
    assert by_class.classes is not None
    assert int(by_class.classes[list(found.selection.examples)].sum()) >= 4
    assert len(found.selection.examples) <= 12, "a label is a token"


CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no raw rows": ({"raw": None}, {}, "recipe mine has no raw row for each training row"),
    "gradex": ({}, {"settings": EstimateSettings(method="gradex")}, "method='gradex' is estimated, not selected by"),
    "a group's metric": (
        {"query_groups": logistic.PARTS},
        {"settings": EstimateSettings(metric="loss/late")},
        "metric='loss/late': a selection is made by a metric of all queries; choose loss, accuracy, probability",
    ),
    "influence on accuracy": (
        {},
        {"settings": EstimateSettings(metric="accuracy"), "how": SelectOptions(method="influence")},
        "accuracy has no derivative",
    ),
    "no options": ({}, {"settings": EstimateSettings(metric="accuracy")}, "the queries of recipe mine choose from no options"),
    "no retraining": ({"retraining": None}, {}, "recipe mine cannot be trained again"),
    "unknown class": ({}, {"constraints": Constraints(minimum={"source 9": 1})}, "minimum of 1 examples of class 'source 9': there are 0"),
    "too much of a class": ({}, {"constraints": Constraints(minimum={"source 1": 6})}, "of class 'source 1': there are 5"),
    "no classes": (
        {"groups": None},
        {"gradients": GradientSettings(by="row"), "constraints": Constraints(minimum={"a": 1})},
        "the rows of recipe mine are of no group and no class",
    ),
    "backward to no budget": (
        {},
        {"how": SelectOptions(method="backward", until="budget"), "constraints": Constraints(minimum={"source 1": 1})},
        "stops as soon as the limits are met, and there are none",
    ),
    "form of out": ({}, {"out": Path("rows.xlsx")}, r"rows\.xlsx"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_cannot_be_done_is_said_before_any_work(tmp_path: Path, name: str) -> None:
    fields, options, message = CHOICES[name]
    with pytest.raises(ConfigError, match=message):
        selected(tmp_path, logistic.mine(**fields), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_there_is_not_replaced_by_itself(tmp_path: Path) -> None:
    selected(tmp_path, settings=ALONE)
    with pytest.raises(ConfigError, match=r"chosen\.parquet exists"):
        selected(tmp_path, settings=ALONE)


def test_nothing_is_chosen_where_every_group_harms(tmp_path: Path) -> None:
    recipe = logistic.mine(model=logistic.fitted([place for place, group in enumerate(logistic.groups()) if group == "source 0"]).float())
    only = [place for place, group in enumerate(logistic.groups()) if group in logistic.WRONG]
    train, raw = recipe.train, recipe.raw
    assert raw is not None
    bad = logistic.mine(
        model=recipe.model, train=[train[row] for row in only], raw=[raw[row] for row in only], groups=["wrong"] * len(only)
    )
    with pytest.raises(ConfigError, match="no group betters the metric"):
        selected(tmp_path, bad, settings=ALONE, how=SelectOptions(method="influence"))
    assert not (tmp_path / "chosen.parquet").exists()


def test_queries_of_a_test_split_are_refused_before_any_work(tmp_path: Path) -> None:
    recipe = replace(logistic.mine(), query_split="test")
    with pytest.raises(ConfigError, match="split 'test'"):
        selected(tmp_path, recipe)
    assert not (tmp_path / "run" / "linearised").exists()
    assert selected(tmp_path, replace(recipe, query_split="train[90%:]")).selection.settings["split"] == "train[90%:]"
