"""What stands between scores and a judgement of them: whose scores they are, which baselines there can be, early refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from whence.attributor import Attributor
from whence.errors import ConfigError, DataError, MismatchError
from whence.evaluate.clean_effect import retrain_cleaned
from whence.evidence import clean as cleaning
from whence.evidence.baselines import baseline_scores, row_losses
from whence.evidence.clean import clean_recipe
from whence.evidence.compare import (
    check_counterfactual,
    check_lds,
    counterfactual_of,
    duplicates_of,
    suspicious_orders,
)
from whence.evidence.saved import check_same_rows, saved_scores
from whence.recipes.base import Recipe
from whence.report.picture_files import check_picture
from whence.scores.matrix import Scores
from whence.storage.run import fingerprint_model
from whence.tasks import Classification

Row = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class Sums:
    """Measures how many rows there were, and how the seed fell."""

    key: str = "sums"

    def __call__(self, rows: Any, seed: int) -> torch.Tensor:
        return torch.full((3,), float(len(rows))) + seed % 7


def rows_of(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, generator=generator), number % 2) for number in range(count)]


def made(measurement: Any = "loss", dropout: float = 0.0) -> Recipe:
    torch.manual_seed(0)
    return Recipe(
        name="mine",
        model=nn.Sequential(nn.Linear(4, 5), nn.Dropout(dropout), nn.Linear(5, 2)).eval(),
        task=Classification(measurement=measurement),
        train=rows_of(8, 1),
        queries=rows_of(3, 2),
        raw=[{"number": number} for number in range(8)],
        retraining=Sums(),
    )


def bound(recipe: Recipe, folder: Path, **options: Any) -> Attributor:
    return Attributor(recipe.model, recipe.task, run_dir=folder, progress=False, device="cpu", **options)


def scored(folder: Path) -> tuple[Recipe, Attributor, Scores]:
    recipe = made()
    attributor = bound(recipe, folder)
    return recipe, attributor, attributor.scores(recipe.queries, recipe.train, strategy="identity")


# --------------------------------------------------------------------------------------- saved scores


def test_scores_of_this_model_and_these_rows_are_read(tmp_path: Path) -> None:
    recipe, attributor, scores = scored(tmp_path)
    assert torch.equal(saved_scores(attributor, recipe, ["identity"])["identity"], scores.values)
    with pytest.raises(ConfigError, match=r"there are no scores 'ekfac' in .*; it has identity\. Run whence score first\."):
        saved_scores(attributor, recipe, ["identity", "ekfac"])


def test_scores_of_another_model_or_other_rows_are_refused(tmp_path: Path) -> None:
    recipe, attributor, _ = scored(tmp_path)
    for change, what in (
        ({"train": rows_of(8, 5)}, "other training rows"),
        ({"queries": rows_of(3, 5)}, "other queries"),
        ({"train": rows_of(8, 5), "queries": rows_of(3, 5)}, "other training rows and other queries"),
    ):
        with pytest.raises(
            MismatchError, match=rf"holds scores of {what} than recipe mine has now\. Score anew, or give the run folder of this model\."
        ):
            saved_scores(attributor, replace(recipe, **change), ["identity"])
    with torch.no_grad():
        recipe.model[0].weight += 1  # type: ignore[index]
    with pytest.raises(MismatchError, match="holds scores of another model than"):
        saved_scores(attributor, recipe, ["identity"])


def test_scores_over_a_run_are_of_the_model_it_led_to(tmp_path: Path) -> None:
    recipe, attributor, scores = scored(tmp_path)
    end = {"model": fingerprint_model(recipe.model), "snapshots": 4}
    settings = scores.settings | {"model": "of the first snapshot"}
    for name, given in (("mean", settings | {"over run": end}), ("other", settings | {"over run": end | {"model": "x"}}), ("bare", {})):
        replace(scores, settings=given).save(tmp_path / "scores" / name)
    assert set(saved_scores(attributor, recipe, ["mean", "bare"])) == {"mean", "bare"}, "what says nothing is taken as it is"
    with pytest.raises(MismatchError, match="holds scores of another model"):
        saved_scores(attributor, recipe, ["other"])


def test_scores_of_some_rows_are_refused(tmp_path: Path) -> None:
    recipe, attributor, _ = scored(tmp_path)
    attributor.scores(recipe.queries, recipe.train, strategy="identity", query_rows=[2, 1, 0], name="turned")
    with pytest.raises(MismatchError, match=r"holds scores of chosen rows \(--query-rows or --train-rows\)\. Score all of them again\."):
        saved_scores(attributor, recipe, ["turned"])
    with pytest.raises(MismatchError, match="holds scores of 3 queries and 8 rows; recipe mine has 3 and 7"):
        saved_scores(attributor, replace(recipe, train=recipe.train[:7]), ["identity"])


def test_only_scores_of_the_same_rows_agree() -> None:
    values = torch.arange(6.0).view(2, 3)
    check_same_rows(Scores(values=values), Scores(values=values, query_rows=[0, 1], train_rows=[0, 1, 2]))
    with pytest.raises(MismatchError, match="different queries"):
        check_same_rows(Scores(values=values, query_rows=[1, 2]), Scores(values=values, query_rows=[3, 4]))
    with pytest.raises(MismatchError, match="different training rows"):
        check_same_rows(Scores(values=values), Scores(values=values, train_rows=[0, 1, 5]))


# ------------------------------------------------------------------------------------------ baselines


def test_a_baseline_that_is_named_must_be_possible(tmp_path: Path) -> None:
    recipe = made()
    attributor = bound(recipe, tmp_path)
    assert set(baseline_scores(attributor, recipe, names=["random", "loss"])) == {"random", "loss"}
    assert set(baseline_scores(attributor, recipe)) == {"random", "embedding", "gradient cosine", "loss"}
    with pytest.raises(ConfigError, match=r"the baseline 'bm25' needs rows that are text \(input_ids\), which recipe mine does not have"):
        baseline_scores(attributor, recipe, names=["random", "bm25"])
    with pytest.raises(ConfigError, match="the baseline 'embedding signed' needs classes of rows and queries"):
        baseline_scores(attributor, recipe, names=["embedding signed"])


def test_losses_of_a_model_in_training_are_without_dropout_and_leave_it_in_training(tmp_path: Path) -> None:
    recipe = made(dropout=0.5)
    attributor = bound(recipe, tmp_path)
    expected = row_losses(attributor, recipe)
    recipe.model.train()
    state = torch.get_rng_state()
    torch.testing.assert_close(row_losses(attributor, recipe), expected)
    assert recipe.model.training
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------- refusals before anything is done


def test_counterfactuals_that_cannot_be_are_refused_before_anything_is_trained() -> None:
    recipe = made("margin")
    check_counterfactual(recipe, remove=[1, 7], mode="each", queries=[0, 2])
    check_counterfactual(made("loss"), remove=[1], mode="sum")
    with pytest.raises(ConfigError, match=r"mode='each' follows queries .* 'loss' does not tell\. Give --mode sum"):
        check_counterfactual(made("loss"), remove=[1], mode="each")
    for change, text in (({"remove": [8]}, r"remove=\[8\] of 8 training rows"), ({"queries": [3]}, "queries: 3 is no row")):
        with pytest.raises(ConfigError, match=text):
            check_counterfactual(recipe, **{"remove": [1], "mode": "each", **change})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="recipe mine cannot be trained again"):
        check_counterfactual(replace(recipe, retraining=None), remove=[1], mode="each")


def test_the_library_call_checks_too(tmp_path: Path) -> None:
    recipe = made("loss")
    with pytest.raises(ConfigError, match="mode='each' follows queries"):
        counterfactual_of(bound(recipe, tmp_path), recipe, {"a": torch.ones(3, 8)}, mode="each", remove=[1])


def test_subsets_that_cannot_be_are_refused_before_anything_is_trained() -> None:
    check_lds(made(), masks=3, share=0.5)
    for masks, share, text in ((2, 0.5, "masks=2: no correlation"), (3, 1.0, "subsets of 8 rows"), (3, 0.0, "subsets of 0 rows")):
        with pytest.raises(ConfigError, match=text):
            check_lds(made(), masks=masks, share=share)


def test_pictures_that_cannot_be_are_refused_before_they_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    check_picture(None)
    check_picture(tmp_path / "a.svg")
    with pytest.raises(ConfigError, match=r"'a\.pdf' is no picture that can be drawn; give a name that ends in \.png or \.svg"):
        check_picture(tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere to draw into"):
        check_picture(tmp_path / "nowhere" / "a.png")


# -------------------------------------------------------------------------------- orders of suspicion


def test_suspicion_leaves_what_self_keeps_and_takes_the_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made()
    attributor = bound(recipe, tmp_path).fit(recipe.train, strategy="kfac")
    attributor.self_influence(recipe.train, strategy="kfac", damping=1.0)
    folder = tmp_path / "self_influence" / "kfac"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    plain = suspicious_orders(attributor, recipe, strategy="kfac", damping="auto")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    kept = attributor.self_influence(recipe.train, strategy="kfac", damping="auto", name="again").double()
    torch.testing.assert_close(plain["self-influence"], kept)

    asked = []
    original = Attributor.scores
    monkeypatch.setattr(Attributor, "scores", lambda self, *a, **o: asked.append(o.get("response")) or original(self, *a, **o))
    duplicates_of(attributor, recipe, count=2, strategy="kfac", damping=0.1, response="inverse")
    assert asked == ["inverse", None]
    with pytest.raises(ConfigError, match="unrolled"):
        suspicious_orders(attributor, recipe, strategy="kfac", response="unrolled")


# ---------------------------------------------------------------------------------------------- clean


def test_shares_that_cannot_be_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    recipe = made()
    attributor = bound(recipe, tmp_path / "run")
    for options, text in (
        ({"fraction": 2.0}, r"fraction=2\.0 is no share"),
        ({"fraction": 0.01}, "less than one row"),
        ({"keep_share": 3.0}, r"keep_share=3\.0 is no share of a class"),
        ({"fraction": 0.5, "n_jobs": 0, "repeats": 1}, "n_jobs=0 trains nothing"),
    ):
        with pytest.raises(ConfigError, match=text):
            clean_recipe(recipe, attributor, out=tmp_path / "a.jsonl", strategy="identity", **{"fraction": 0.5, **options})  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "self_influence").exists()


def test_the_rows_are_written_before_anything_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made()
    attributor = bound(recipe, tmp_path / "run", seed=3)
    seen = []

    def watched(*given: Any, **options: Any) -> Any:
        seen.append(((tmp_path / "a.jsonl").exists(), options["seed"], options["folder"]))
        return retrain_cleaned(*given, **options)

    monkeypatch.setattr(cleaning, "retrain_cleaned", watched)
    result = clean_recipe(recipe, attributor, out=tmp_path / "a.jsonl", fraction=0.25, strategy="identity", repeats=2)
    assert seen == [(True, 3, tmp_path / "run" / "retrain")]
    record = json.loads(result.written.provenance.read_text(encoding="utf-8"))
    assert result.effect is not None
    assert record["origin"]["effect"] == json.loads(json.dumps(result.effect.to_json()))

    monkeypatch.setattr(cleaning, "retrain_cleaned", lambda *given, **options: (_ for _ in ()).throw(DataError("no more")))
    with pytest.raises(DataError, match="no more"):
        clean_recipe(recipe, attributor, out=tmp_path / "b.jsonl", fraction=0.25, strategy="identity", repeats=2)
    assert len((tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()) == 6
