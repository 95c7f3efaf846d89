"""The verbs of evaluate on models that `whence train` trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import done, refused
from finetuned import NAMES, Place
from whence.recipes.base import load_recipe

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("offline_and_quick")


BASELINES = {"random", "bm25", "embedding", "gradient cosine", "loss"}


@pytest.mark.parametrize("name", ["sst2", "wikitext"])
def test_lds(run: Any, place: Place, name: str) -> None:
    names = "ekfac,identity" if name == "sst2" else "ekfac"
    options = ["evaluate", "lds", *place.options(name), "--scores", names, "--masks", 3, "--repeats", 2 if name == "sst2" else 1]
    result = done(run, *options, "--json")
    methods = result.data["methods"]
    assert result.data["subsets"] == 3
    assert {*names.split(","), *BASELINES} <= set(methods)
    assert sum("signed" in method for method in methods) == (2 if name == "sst2" else 0)
    assert all(-1 <= one["lds"] <= 1 for one in methods.values())
    assert (result.data["reliability"] is None) == (name == "wikitext"), "one repeat tells nothing of the noise"


def test_lds_as_a_table(run: Any, place: Place) -> None:
    """From the retrains of the test before, if it ran: finished ones are found again."""
    options = ["evaluate", "lds", *place.options("wikitext"), "--scores", "ekfac", "--masks", 3, "--repeats", 1]
    text = done(run, *options)
    assert text.out.startswith("LDS on 3 subsets, 1 retrains each, ")
    assert "reliability unknown with one repeat" in text.out
    assert all(f"\n{method} " in text.out for method in ("ekfac", *BASELINES))
    assert "nan" not in text.out


def test_counterfactual_of_all_queries(run: Any, here: Path, place: Place) -> None:
    options = ["evaluate", "counterfactual", *place.options("wikitext"), "--scores", "ekfac", "--remove", "2,4", "--mode", "sum"]
    result = done(run, *options, "--repeats", 1, "--plot", "removed.svg", "--json")
    assert {effect["method"] for effect in result.data["effects"]} >= {"ekfac", "bm25", "random"}
    assert all(effect["perplexity"] is not None for effect in result.data["effects"])
    assert (here / "removed.svg").stat().st_size > 1000
    assert "Perplexity" in done(run, *options, "--repeats", 1).out


def test_counterfactual_of_each_query(run: Any, place: Place) -> None:
    found = load_recipe("glue", checkpoint_dir=place.models / "sst2")
    assert found.collate is not None
    with torch.no_grad():
        margins = found.task.measurement(found.model, found.collate(list(found.queries)))
    chosen = margins.argsort()[:2].tolist()  # what is read rightly, or nearly
    options = ["evaluate", "counterfactual", *place.options("sst2"), "--scores", "ekfac", "--remove", 3, "--repeats", 1]
    result = done(run, *options, "--queries", f"{chosen[0]},{chosen[1]}", "--json")
    assert {*result.data["queries"], *result.data["left_out"]} == set(chosen)
    assert all(effect["flipped"] is not None for effect in result.data["effects"])
    worst = int(margins.argmax())
    message = refused(run, *options, "--queries", worst)
    assert "none of 1 queries is classified right" in message


def test_agreement_draws(run: Any, here: Path, place: Place) -> None:
    folders = [place.runs / "sst2" / "scores" / name for name in ("ekfac", "identity")]
    result = done(run, "evaluate", "agreement", *folders, "--plot", "both.png", "--query", "0,2", "--json")
    assert -1 <= result.data["spearman"]["mean"] <= 1
    assert (here / "both.png").stat().st_size > 1000
    same = done(run, "evaluate", "agreement", folders[0], folders[0])
    assert "1.0000" in same.out
    message = refused(run, "evaluate", "agreement", *folders, "--query", 99)
    assert "--query 99: there are 8 queries, numbered from 0 to 7." in message


def test_mislabeled(run: Any, here: Path, place: Place) -> None:
    options = ["evaluate", "mislabeled", *place.options("sst2")]
    result = done(run, *options, "--plot", "found.png", "--json")
    assert result.data["flipped"] == 6
    assert set(result.data["rankings"]) == {"self-influence", "gradient norm", "loss", "random"}
    assert all(0 <= one["auc"] <= 1 for one in result.data["rankings"].values())
    assert (here / "found.png").stat().st_size > 1000
    assert done(run, *options).out.startswith("6 of 24 labels are wrong;")


@pytest.mark.parametrize("name", NAMES)
def test_tail_patch(run: Any, place: Place, name: str) -> None:
    options = ["evaluate", "tail-patch", *place.options(name), "--scores", "ekfac", "--k", 3, "--queries", "0,1"]
    result = done(run, *options, "--json")
    assert result.data["recipe"]
    text = done(run, *options).out
    assert text.startswith("2 queries, their measurement ")
    assert "gradient cosine" in text


@pytest.mark.parametrize("name", NAMES)
def test_duplicates(run: Any, place: Place, name: str) -> None:
    options = ["evaluate", "duplicates", *place.options(name), "--count", 5]
    result = done(run, *options, "--json")
    assert set(result.data["scores"]) == {"ekfac", "gradient cosine", "random"}
    assert result.data["scores"]["gradient cosine"]["queries"] == 5
    assert "gradient cosine" in done(run, *options).out


def test_scores_that_are_not_there(run: Any, place: Place) -> None:
    message = refused(run, "evaluate", "lds", *place.options("sst2"), "--scores", "ekfacc")
    assert "there are no scores 'ekfacc' in " in message
    assert re.search(r"; it has [\w, -]*ekfac, [\w, -]*identity\. Run whence score first\.", message)
    message = refused(run, "evaluate", "tail-patch", *place.options("sst2"), "--scores", "ekfac", "--max-train-rows", 5)
    assert "holds scores of 8 queries and 24 rows; recipe glue-sst2 has 8 and 5. Score all of them again." in message
    message = refused(run, "evaluate", "tail-patch", *place.options("sst2"), "--scores", "ekfac", "--queries", "0,99")
    assert "99" in message


def test_wrong_labels_that_nobody_made(run: Any, place: Place) -> None:
    message = refused(run, "evaluate", "mislabeled", *place.options("swag"))
    assert "recipe swag-swag has no labels that were made wrong on purpose. Train one with whence train --flip 0.1." in message
