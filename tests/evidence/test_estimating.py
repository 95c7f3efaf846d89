"""Estimates of fine-tunes on subsets against the fine-tunes: exact where the model is linear, honest where it is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import logistic
from whence.attributor import Attributor
from whence.errors import ConfigError, MismatchError, NumericalError
from whence.evidence.calibrating import EstimateSettings, raw_estimates, raw_options
from whence.evidence.estimating import Estimation, SubsetSettings, estimate
from whence.evidence.first_order import GradientSettings, check_recipe, linearise_recipe
from whence.recipes.base import Options, Recipe
from whence.refit.gradex import gradex
from whence.refit.subsets import groups_of, load_subsets
from whence.refit.trust import trust
from whence.tasks import Classification, Task

WHOLE = GradientSettings(projection="none")
GIVEN = EstimateSettings(ridge=logistic.RIDGE, calibration=4, held_out=5)


@pytest.fixture(autouse=True)
def fresh() -> None:
    logistic.CALLS.clear()
    logistic.STOP_AT.clear()


def bound(recipe: Recipe, folder: Path) -> Attributor:
    return Attributor(recipe.model, recipe.task, run_dir=folder, progress=False, device="cpu", collate=recipe.collate)


def estimated(folder: Path, recipe: Recipe | None = None, **options: Any) -> Estimation:
    recipe = logistic.mine() if recipe is None else recipe
    usual: dict[str, Any] = {"gradients": WHOLE, "subsets": SubsetSettings(count=30), "settings": GIVEN, "folder": folder / "retrain"}
    return estimate(bound(recipe, folder), recipe, **(usual | options))


def truth(members: torch.Tensor, groups: list[str]) -> torch.Tensor:
    """Return the losses of real refits, `[subset, query]`."""
    names = list(dict.fromkeys(groups))
    rows = [[place for place, group in enumerate(groups) if own[names.index(group)]] for own in members.tolist()]
    return torch.stack([logistic.query_losses(logistic.fitted(one)) for one in rows])


def test_of_a_linear_model_estimates_are_the_real_refits(tmp_path: Path) -> None:
    found = estimated(tmp_path, logistic.mine(query_groups=logistic.PARTS))
    real = truth(found.subsets.members, logistic.groups())
    torch.testing.assert_close(found.predictions.of("loss"), real.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.predictions.of("loss/early"), real[:, :5].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.predictions.of("loss/late"), real[:, 5:].mean(1), rtol=1e-4, atol=1e-5)
    for metric in ("loss", "loss/early", "loss/late"):
        report = found.trust[metric]
        assert (report.subsets, report.repeats) == (5, 1)
        assert report.error is not None
        assert report.error.value < 1e-3
        assert report.spearman.value == pytest.approx(1)
        assert report.beats
    assert found.lines()[1].startswith("estimated ")


def test_every_projection_that_keeps_the_rows_is_exact(tmp_path: Path) -> None:
    for projection in ("pca", "random"):
        found = estimated(tmp_path / projection, gradients=GradientSettings(projection=projection, dimension=64))
        real = truth(found.subsets.members, logistic.groups()).mean(1)
        # Random directions are no isometry, so that the ridge is another; the leading ones of eight parameters are all.
        limit = 0.15 if projection == "random" else 0.08
        assert float((found.predictions.of("loss") - real).abs().max() / real.mean()) < limit


def test_calibration_comes_near_the_ridge_of_the_training(tmp_path: Path) -> None:
    found = estimated(tmp_path, settings=EstimateSettings(calibration=4, held_out=4))
    options = found.calibration["loss"].options
    assert abs(math.log10(options.ridge / logistic.RIDGE)) < 0.5
    assert found.trust["loss"].spearman.value > 0.9


def test_trust_is_made_of_held_out_fine_tunes_alone(tmp_path: Path) -> None:
    none = estimated(tmp_path, settings=EstimateSettings(ridge=logistic.RIDGE, calibration=4))
    assert none.trust == {}
    before = len(logistic.CALLS)
    found = estimated(tmp_path, settings=EstimateSettings(ridge=logistic.RIDGE, calibration=4, held_out=4))
    assert len(logistic.CALLS) == before + 4, "those that calibrate are read, and are the same"
    assert found.calibration == none.calibration, "what judges has no say in the choice"
    held_out = logistic.CALLS[before:]
    assert not {tuple(rows) for rows in held_out} & {tuple(rows) for rows in logistic.CALLS[:before]}
    measured = torch.stack([logistic.query_losses(logistic.fitted(rows)) for rows in held_out]).mean(1)
    start = float(logistic.query_losses(logistic.network().double()).mean())
    mean = float(torch.stack([logistic.query_losses(logistic.fitted(rows)) for rows in logistic.CALLS[:before]]).mean())
    by_hand = trust(measured, measured, constant=start, mean=mean)
    report = found.trust["loss"]
    assert report.constant_rmse == pytest.approx(by_hand.constant_rmse, rel=1e-5)
    assert report.mean_rmse == pytest.approx(by_hand.mean_rmse, rel=1e-5)


def test_real_fine_tunes_are_on_different_subsets_of_the_same_design(tmp_path: Path) -> None:
    groups = groups_of("aabbccdd")
    for settings in (SubsetSettings(), SubsetSettings(design="rows"), SubsetSettings(design="bernoulli"), SubsetSettings(seed=3)):
        few, many = settings.draw_real(groups, 3), settings.draw_real(groups, 6)
        assert len({tuple(own) for own in many.members.tolist()}) == 6
        assert torch.equal(many.members[:3], few.members), "a larger number adds subsets"
    with pytest.raises(ConfigError, match=r"7 real fine-tunes need as many different subsets, and there are 6\."):
        SubsetSettings().draw_real(groups, 7)
    left_out = SubsetSettings(design="leave-one-out").draw_real(groups, 3)
    assert left_out.members.sum(1).tolist() == [3, 3, 3]
    file = tmp_path / "subsets.txt"
    file.write_text("a,b\nc\na,b\nd,a,b\n", encoding="utf-8")
    listed = SubsetSettings(file=file)
    assert len(listed.draw(groups)) == 4
    assert sorted(listed.draw_real(groups, 3).members.sum(1).tolist()) == [1, 2, 3]
    with pytest.raises(ConfigError, match="4 real fine-tunes need as many different subsets, and there are 3"):
        listed.draw_real(groups, 4)


def test_interrupted_fine_tunes_continue(tmp_path: Path) -> None:
    logistic.STOP_AT.append(3)
    with pytest.raises(KeyboardInterrupt):
        estimated(tmp_path)
    assert len(logistic.CALLS) == 3
    logistic.STOP_AT.clear()
    found = estimated(tmp_path)
    assert len(logistic.CALLS) == 9, "four and five in all, each once"
    assert torch.equal(found.predictions.values, estimated(tmp_path / "anew").predictions.values)


def test_no_number_without_what_is_known_of_its_error(tmp_path: Path) -> None:
    alone = estimated(tmp_path, settings=EstimateSettings(ridge=logistic.RIDGE, calibration=0))
    assert logistic.CALLS == []
    assert alone.calibration == {}
    assert alone.lines()[1:] == [
        "not compared with any real fine-tune: only the order of subsets may mean something. Give --calibration 6."
    ]
    far = estimated(tmp_path, settings=EstimateSettings(ridge=1e7, calibration=4, held_out=5))
    assert not far.trust["loss"].beats
    assert far.lines()[1].startswith("Do not use the estimates")
    assert not any(line.startswith("estimated") for line in far.lines())
    worse = estimated(tmp_path, settings=EstimateSettings(ridge=1e7, calibration=4))
    assert worse.lines()[1] == "The estimates are no better than a trivial predictor:"


def test_ridges_whose_refits_do_not_converge_are_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from whence.evidence import calibrating

    real, least = calibrating.refit_groups, [0.0]

    def stubborn(linear: Any, groups: Any, members: Any, options: Any) -> Any:
        found = real(linear, groups, members, options)
        return found if options.ridge >= least[0] else replace(found, converged=torch.zeros_like(found.converged))

    monkeypatch.setattr(calibrating, "refit_groups", stubborn)
    settings = EstimateSettings(calibration=4)
    free = estimated(tmp_path, settings=settings)
    assert free.to_json()["unconverged"] == 0
    least[0] = 2 * free.calibration["loss"].options.ridge
    bound_above = estimated(tmp_path, settings=settings)
    assert bound_above.calibration["loss"].options.ridge >= least[0]
    assert all(one.options.ridge >= least[0] for one in bound_above.calibration["loss"].table)
    given = estimated(tmp_path, settings=EstimateSettings(ridge=least[0] / 2, calibration=4))
    assert given.predictions.unconverged == given.to_json()["unconverged"] == 30
    assert given.lines()[-1] == "30 refits did not converge: do not use their estimates; give a greater ridge."
    least[0] = 1e30
    with pytest.raises(NumericalError, match="has refits that converge on the calibration runs; give a greater ridge"):
        estimated(tmp_path, settings=settings)


class Still:
    """A procedure whose models all lose the same."""

    key = "still"

    def __call__(self, rows: Any, seed: int) -> torch.Tensor:
        return torch.full((logistic.QUERIES,), 0.1)


def test_a_metric_that_does_not_move_has_no_report_and_it_is_said_why(tmp_path: Path) -> None:
    found = estimated(tmp_path, logistic.mine(retraining=Still()))
    assert found.trust == {}
    assert found.unreported == {"loss": "loss is 0.1 in all 5 held-out fine-tunes"}
    assert found.lines()[1] == "No report: loss is 0.1 in all 5 held-out fine-tunes."
    assert found.to_json()["unreported"] == found.unreported


@pytest.mark.parametrize("method", ["influence", "gradient", "gradex"])
def test_other_methods_rank_too(tmp_path: Path, method: Any) -> None:
    found = estimated(tmp_path, settings=EstimateSettings(method=method, calibration=6, held_out=8))
    assert torch.isfinite(found.predictions.values).all()
    # The published recipe keeps the direction of a subset alone; here it ranks nothing.
    assert method == "gradex" or found.trust["loss"].spearman.value > 0.5


def test_the_published_move_is_as_long_as_the_weights_say(tmp_path: Path) -> None:
    recipe = logistic.mine()
    norm = float(torch.cat([parameter.detach().flatten() for parameter in recipe.model.parameters()]).norm())
    whole = linearise_recipe(bound(recipe, tmp_path), recipe, WHOLE)
    assert (whole.parameters, whole.directions) == (8, None)
    assert whole.weight_norm == pytest.approx(norm)
    members = SubsetSettings(count=3).draw(whole.groups).example_masks()
    from whence.evidence import calibrating

    settings = EstimateSettings(method="gradex", scale=0.2)
    w = gradex(whole.train, members, calibrating._gradex(whole, settings))
    torch.testing.assert_close(w.norm(dim=1), torch.full((3,), 0.2 * norm, dtype=torch.float64))
    leading = linearise_recipe(bound(recipe, tmp_path / "pca"), recipe, GradientSettings(dimension=3))
    assert (leading.train.dimensions, leading.directions) == (3, 12), "chosen among four times as many"
    w = gradex(leading.train, members, calibrating._gradex(leading, settings))
    torch.testing.assert_close(w.norm(dim=1) * math.sqrt(8 / 12), torch.full((3,), 0.2 * norm, dtype=torch.float64))


def test_a_ridge_above_everything_orders_as_products_of_gradients(tmp_path: Path) -> None:
    recipe = logistic.mine()
    linear = linearise_recipe(bound(recipe, tmp_path), recipe, WHOLE)
    subsets = SubsetSettings(count=20).draw(linear.groups)
    settings = EstimateSettings(method="gradient")
    found = raw_estimates(linear, subsets, raw_options(linear, settings), settings).of("loss")
    train, queries = linear.train, linear.target.linear
    assert queries is not None
    pulls = torch.sigmoid(-train.outputs.double())[:, None] * train.gradients.double()
    slope = -(torch.sigmoid(-queries.outputs.double())[:, None] * queries.gradients.double()).mean(0)
    assert torch.equal(found.argsort(), (subsets.example_masks().double() @ pulls @ slope).argsort())


def test_what_is_kept(tmp_path: Path) -> None:
    found = estimated(tmp_path)
    found.save(tmp_path / "estimates")
    rows = parquet.read_table(tmp_path / "estimates" / "estimates.parquet").to_pylist()
    assert rows == found.predictions.table()
    subsets = load_subsets(tmp_path / "estimates" / "subsets.json")
    assert torch.equal(subsets.members, found.subsets.members)
    written = json.loads((tmp_path / "estimates" / "estimate.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found.to_json()))
    assert written["settings"]["options"]["ridge"] == logistic.RIDGE
    assert written["trust"]["loss"]["subsets"] == 5
    assert written["start"]["values"] == found.start.values.tolist()


def test_gradients_are_measured_once_and_others_refused(tmp_path: Path) -> None:
    first = estimated(tmp_path)
    few = EstimateSettings(ridge=logistic.RIDGE, calibration=4, held_out=4)
    again = estimated(tmp_path, subsets=SubsetSettings(design="leave-one-out"), settings=few)
    assert len(again.subsets) == logistic.GROUPS
    assert len(first.subsets) == 30
    with pytest.raises(MismatchError, match="projection"):
        estimated(tmp_path, gradients=GradientSettings(dimension=4))
    assert len(estimated(tmp_path, gradients=GradientSettings(dimension=4), overwrite=True).subsets) == 30
    rows = estimated(tmp_path, gradients=GradientSettings(dimension=4, by="row"))
    clustered = estimated(tmp_path, gradients=GradientSettings(dimension=4, by="cluster:5"))
    assert (len(rows.subsets.groups), len(clustered.subsets.groups)) == (40, 5)


UNUSABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "by": (GradientSettings, {"by": "cluster:1"}, "give 'column', 'row' or 'cluster:N'"),
    "dimension": (GradientSettings, {"dimension": 0}, r"dimension=0 cannot be used"),
    "projection": (GradientSettings, {"projection": "pac"}, "projection='pac' is not known"),
    "design": (SubsetSettings, {"design": "half"}, "design='half': choose groups, rows, bernoulli, leave-one-out"),
    "count": (SubsetSettings, {"count": 0}, "count=0"),
    "share": (SubsetSettings, {"share": 1.0}, r"share=1\.0"),
    "file": (SubsetSettings, {"file": Path("nowhere.json")}, r"nowhere\.json: there is no such file"),
    "method": (EstimateSettings, {"method": "trak"}, "method='trak': choose refit, influence, gradient, gradex"),
    "nothing to choose by": (EstimateSettings, {"calibration": 0}, "leaves nothing to choose the ridge by"),
    "one run": (EstimateSettings, {"calibration": 3}, "0 or 4 and more to calibrate"),
    "two to judge": (EstimateSettings, {"held_out": 2}, "0 or 3 and more to judge"),
    "repeats": (EstimateSettings, {"repeats": 0}, "1 repeat or more"),
    "ridge 0": (EstimateSettings, {"ridge": 0.0}, r"ridge=0\.0: give a number above 0"),
    "scale": (EstimateSettings, {"scale": -1.0}, r"scale=-1\.0"),
    "ridge of gradex": (EstimateSettings, {"method": "gradex", "ridge": 1.0}, "gradex has none"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_settings_that_cannot_be_used(name: str) -> None:
    kind, fields, message = UNUSABLE[name]
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


class Own(Task):
    """A task of one's own, of which nothing is known."""


class Unmeasured(Classification):
    """A task that does not say what it measures."""

    measure = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        vars(self).pop("measure", None)


class Bare:
    """A procedure that measures no options."""

    key = "bare"


CHOICES = Options(rows=[0, 1], query=torch.tensor([0, 0]), gold=torch.tensor([True, False]))
LACKING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no groups": ({"groups": None}, {}, "the rows of recipe mine are of no group; group them by='cluster:40', or by='row'"),
    "metric": ({}, {"metric": "los"}, "metric='los': choose loss, accuracy, probability"),
    "no options": ({}, {"metric": "accuracy"}, "metric='accuracy': the queries of recipe mine choose from no options"),
    "group": (
        {"query_groups": logistic.PARTS},
        {"metric": "loss/noon"},
        "no query of recipe mine is of group 'noon'; groups of queries: early, late",
    ),
    "no retraining": ({"retraining": None}, {}, "recipe mine cannot be trained again"),
    "margin": ({"task": Classification(measurement="margin")}, {}, "recipe mine measures margin, and fine-tunes are compared by loss"),
    "unknown task": ({"task": Own()}, {}, "Own, does not say how many labels of a row are trained"),
    "no measure": ({"task": Unmeasured()}, {}, "Unmeasured, does not say what it measures"),
    "options unmeasured": ({"options": CHOICES, "retraining": Bare()}, {}, "its retraining measures none; give it a field with_options"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_a_recipe_lacks_is_said_before_any_work(tmp_path: Path, name: str) -> None:
    fields, settings, message = LACKING[name]
    recipe = logistic.mine(**fields)
    with pytest.raises(ConfigError, match=message):
        estimated(tmp_path / "run", recipe, settings=EstimateSettings(**settings))
    assert not (tmp_path / "run").exists()


def test_without_fine_tunes_no_retraining_is_asked_for() -> None:
    check_recipe(logistic.mine(retraining=None, query_groups=logistic.PARTS), by="column", metric="loss/late", fine_tunes=False)
