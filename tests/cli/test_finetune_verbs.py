"""Fitting, scoring, listing and cleaning with models that `whence train` trains, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import finetuned
import whence
from commands import done, refused
from finetuned import NAMES, TINY, Place
from whence.checkpoints import load_checkpoint
from whence.errors import WhenceError
from whence.recipes.base import load_recipe

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytestmark = pytest.mark.usefixtures("offline_and_quick")


@pytest.mark.parametrize("name", NAMES)
def test_fit_and_score_leave_what_the_library_gives(run: Any, place: Place, name: str) -> None:
    result = done(run, "fit", *place.options(name), "--json")
    tracked = result.data["coverage"]["tracked"]
    assert tracked
    assert not any(layer.endswith(("_embeddings", "wte")) for layer in tracked)
    saved = whence.Scores.load(place.runs / name / "scores" / "ekfac")
    found = load_recipe(NAMES[name], checkpoint_dir=place.models / name)
    attributor = whence.Attributor(found.model, found.task, collate=found.collate, progress=False, device="cpu").fit(found.train)
    expected = attributor.scores(found.queries, found.train).values
    torch.testing.assert_close(saved.values, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    again = done(run, "score", *place.options(name), "--strategy", "ekfac", "--json")
    assert (again.data["queries"], again.data["train"]) == (len(found.queries), len(found.train))
    assert "Pairwise" not in again.err, "the second run must compute nothing"


def test_by_default_scores_are_the_mean_over_the_snapshots(run: Any, here: Path, place: Place) -> None:
    options = [*place.options("sst2")[:-1], "default"]
    made = done(run, "score", *options, "--json").data
    assert made["over_run"] is True
    assert Path(made["scores"]).name == "over-run"
    found = load_recipe("glue", checkpoint_dir=place.models / "sst2")
    assert len(found.snapshots) > 1
    parts = []
    for file, _ in found.snapshots:
        load_checkpoint(found.model, file)
        attributor = whence.Attributor(found.model, found.task, collate=found.collate, progress=False, device="cpu")
        parts.append(attributor.scores(found.queries, found.train, strategy="identity", normalize="cosine").values)
    saved = whence.Scores.load(here / made["scores"])
    torch.testing.assert_close(saved.values, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-6)
    (entry,) = done(run, "top", *options, "--query", 1, "--k", 2, "--json").data["queries"]
    assert [row["train"] for row in entry["proponents"]] == [row for row, _ in saved.top(1, 2)]
    done(run, "evaluate", "tail-patch", *options, "--scores", "over-run", "--baselines", "random", "--queries", "0")
    fitted = done(run, "score", *options, "--over-run", "--strategy", "kfac", "--json").data
    assert Path(fitted["scores"]).name == "over-run-kfac"
    assert not torch.equal(whence.Scores.load(here / fitted["scores"]).values, saved.values)
    plain = refused(run, "score", *options, "--over-run", "--strategy", "identity")
    assert "normalize" in plain, "the same folder with another normalisation"


def test_a_language_model_by_conjugate_gradients_with_drawn_labels(run: Any, here: Path, place: Place) -> None:
    options = [*place.options("wikitext"), "--solver", "cg"]
    made = done(run, "score", *options, "--draws", 1, "--query-rows", "0,1", "--json").data
    assert Path(made["scores"]).name == "ekfac-cg"
    assert whence.Scores.load(here / made["scores"]).settings["cg"]["draws"] == 1
    assert "--draws 1 is for --solver cg" in refused(run, "score", *place.options("wikitext"), "--draws", 1)


def test_a_run_needs_snapshots(run: Any, place: Place) -> None:
    assert "--over-run: recipe digits has no snapshots of its training" in refused(run, "score", "digits", "--over-run")


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_queries_at_low_rank(run: Any, here: Path, place: Place, name: str) -> None:
    options = [*place.options(name)[:-1], "half", "--precision", "bfloat16"]
    done(run, "fit", *options)
    result = done(run, "score", *options, "--strategy", "ekfac", "--query-rank", 16, "--json")
    half = whence.Scores.load(here / result.data["scores"]).values
    full = whence.Scores.load(place.runs / name / "scores" / "ekfac").values
    assert half.shape == full.shape
    agreement = done(run, "evaluate", "agreement", result.data["scores"], place.runs / name / "scores" / "ekfac", "--json")
    assert agreement.data["spearman"]["mean"] > 0.8


def test_layers_by_the_name_that_the_recipe_gives_them(run: Any, place: Place) -> None:
    options = [*place.options("wikitext")[:-1], "seed-run", "--layers", "seed"]
    tracked = done(run, "fit", *options, "--json").data["coverage"]["tracked"]
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(tracked) == sorted(f"transformer.h.{block}.{layer}" for block in range(2) for layer in inner)
    done(run, "score", *options, "--strategy", "ekfac")
    assert "'seed'" in refused(run, "fit", *place.options("swag")[:-1], "other", "--layers", "seed")


def test_adam_scales_the_gradients(run: Any, here: Path, place: Place) -> None:
    options = [*place.options("sst2")[:-1], "adam", "--adam"]
    done(run, "fit", *options, "--strategy", "kfac")
    scaled = whence.Scores.load(here / done(run, "score", *options, "--strategy", "kfac", "--json").data["scores"]).values
    assert torch.isfinite(scaled).all()
    done(run, "score", *options, "--strategy", "kfac", "--response", "unrolled", "--name", "run")


@pytest.mark.parametrize("name", NAMES)
def test_lists_show_text_of_several_lines(run: Any, place: Place, name: str) -> None:
    found = load_recipe(NAMES[name], checkpoint_dir=place.models / name)
    assert found.describe is not None
    saved = whence.Scores.load(place.runs / name / "scores" / "ekfac")
    result = done(run, "top", *place.options(name), "--strategy", "ekfac", "--query", 1, "--k", 2, "--bottom", "--json")
    (entry,) = result.data["queries"]
    assert entry["text"] == found.describe(found.queries[1])
    assert [(row["train"], row["score"]) for row in entry["proponents"]] == saved.top(1, 2)
    assert all(row["text"] == found.describe(found.train[row["train"]]) for row in entry["proponents"] + entry["opponents"])
    text = done(run, "top", *place.options(name), "--strategy", "ekfac", "--query", 1, "--k", 2).out
    for line in found.describe(found.queries[1]).splitlines():
        assert line.strip() in text
    lines = done(run, "self", *place.options(name), "--k", 3).out.splitlines()
    assert sum(" train " in line for line in lines) == 3
    if name != "wikitext":
        assert text.splitlines()[0] == "query 1", "the text stands below its heading"
        assert len(lines) > 4
    assert len(done(run, "self", *place.options(name), "--k", 3, "--json").data["largest"]) == 3


def test_options_about_data_reach_every_verb(run: Any, here: Path, place: Place) -> None:
    options = [*place.options("sst2")[:-1], "few", "--max-train-rows", 10, "--max-query-rows", 3, "--measurement", "loss"]
    done(run, "fit", *options, "--strategy", "identity")
    result = done(run, "score", *options, "--strategy", "identity", "--json")
    assert whence.Scores.load(here / result.data["scores"]).values.shape == (3, 10)
    assert len(done(run, "top", *options[:-2], "--strategy", "identity", "--json").data["queries"]) == 3
    message = refused(run, "top", *place.options("sst2")[:-1], "few", "--strategy", "identity")
    assert "holds scores of 3 queries and 10 training rows" in message


def test_plan_writes_nothing(run: Any, here: Path, place: Place) -> None:
    result = done(run, "plan", *place.options("swag")[:-1], "planned", "--json")
    assert result.data["coverage"]["tracked"]
    assert not (here / "planned").exists()


@pytest.mark.parametrize("out", ["cleaned.parquet", "cleaned.jsonl", "cleaned"])
def test_clean_and_train_on_what_is_left(run: Any, here: Path, place: Place, out: str) -> None:
    result = done(run, "clean", *place.options("sst2"), "--fraction", 0.25, "--out", out, "--json")
    dropped = parquet.read_table(here / f"{out}.dropped.parquet").to_pylist()
    assert len(dropped) == 6
    assert result.data["flipped"] == {"dropped": result.data["flipped"]["dropped"], "in_all": 6}
    found = load_recipe("glue", checkpoint_dir=place.models / "sst2")
    assert found.raw is not None
    assert all(found.raw[row["whence_row"]]["sentence"] == row["sentence"] for row in dropped)
    options = ["--task", "sst2", "--data", place.data, "--train-file", out, *TINY, "--max-length", 16, "--checkpoint-dir", "again"]
    again = done(run, "train", "glue", *options, "--json")
    assert again.data["train"] == finetuned.TRAIN - 6
    gone = {row["whence_row"] for row in dropped}
    left = load_recipe("glue", checkpoint_dir=here / "again")
    assert left.raw == [row for number, row in enumerate(found.raw) if number not in gone]


def test_clean_in_other_ways(run: Any, here: Path, place: Place) -> None:
    harmful = done(run, "clean", *place.options("swag"), "--drop", "harmful", "--fraction", 0.1, "--out", "harmful.jsonl", "--json")
    assert harmful.data["flipped"] is None
    copies = done(run, "clean", *place.options("wikitext"), "--drop", "duplicates", "--out", "single.parquet")
    assert "single.parquet" in copies.err
    texts = [row["text"] for row in parquet.read_table(here / "single.parquet").to_pylist()]
    assert len(set(texts)) == len(texts)
    assert "exists. Give another name, or allow it to be replaced" in refused(
        run, "clean", *place.options("wikitext"), "--out", "single.parquet"
    )


def test_clean_says_what_it_bought(run: Any, place: Place) -> None:
    options = ["clean", *place.options("sst2"), "--fraction", 0.1, "--retrain", "--repeats", 1]
    result = done(run, *options, "--out", "a.parquet", "--json")
    assert set(result.data["effect"]) == {"all rows", "cleaned", "random rows dropped"}
    assert result.data["effect"]["cleaned"]["accuracy"] is not None
    assert "random rows dropped" in done(run, *options, "--out", "b.parquet").out


USAGE = {
    "unknown task": (["train", "glue", "--task", "sts2"], ["--task sts2 is none of GLUE's; choose cola, mnli"]),
    "unknown recipe": (["train", "digits"], ["digits", "glue", "swag", "wikitext"]),
    "two starts": (["train", "glue", "--preset", "tiny", "--model", "bert"], ["model='bert' and preset='tiny' are two starts; give one."]),
    "no checkpoint": (["fit", "glue"], ["the recipe glue needs a trained model: give --checkpoint-dir DIR."]),
    "no such checkpoint": (["fit", "swag", "--checkpoint-dir", "nowhere"], ["there is no folder 'nowhere'"]),
    "flip without labels": (["train", "wikitext", "--flip", "0.1"], ["flip replaces labels, and text has none. Leave --flip out."]),
    "flip of all": (["train", "glue", "--flip", "1"], ["flip=1.0 is no share of the labels; give a number from 0 to below 1."]),
    "no such data": (["train", "glue", "--preset", "tiny", "--data", "./nowhere"], ["--data ./nowhere: there is no such folder."]),
    "no rows": (["train", "glue", "--max-train-rows", "0"], ["--max-train-rows", "0 is too small; give 1 or more."]),
    "data for digits": (["fit", "digits", "--checkpoint-dir", "x"], ["recipe 'digits' takes no --checkpoint-dir."]),
    "measurement": (
        ["train", "swag", "--measurement", "log_odds"],
        ["measurement='log_odds' is for language models; choose loss or margin."],
    ),
    "no remove": (["evaluate", "counterfactual", "glue", "--scores", "ekfac"], ["--remove"]),
    "no scores": (["evaluate", "lds", "glue"], ["--scores"]),
    "unknown evidence": (["evaluate", "lsd", "glue"], ["lsd"]),
    "no out": (["clean", "glue"], ["--out"]),
    "nothing to repeat": (
        ["clean", "glue", "--out", "a.parquet", "--repeats", "2"],
        ["--repeats, --jobs and --backend are for --retrain."],
    ),
    "form of out": (["clean", "glue", "--out", "rows.xlsx"], ["rows.xlsx", "NAME.parquet, NAME.jsonl"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(run: Any, name: str) -> None:
    arguments, expected = USAGE[name]
    message = refused(run, *arguments)
    for text in expected:
        assert text in message


def test_a_checkpoint_of_ones_own_lacks_what_training_keeps(run: Any, here: Path, place: Place) -> None:
    shutil.copytree(place.models / "sst2", here / "own", ignore=shutil.ignore_patterns("whence.json", "start", "snapshots", "second_*"))
    options = ["glue", "--task", "sst2", "--max-length", 16, "--data", place.data, "--checkpoint-dir", "own", "--run-dir", "mine"]
    message = refused(run, "fit", *options, "--adam")
    assert "--adam: recipe glue-own has no second moments; they are kept by whence train. Train with it, or leave --adam out." in message
    done(run, "fit", *options, "--strategy", "identity")
    done(run, "score", *options, "--strategy", "identity")
    message = refused(run, "evaluate", "lds", *options, "--scores", "identity")
    assert "recipe glue-own cannot be trained again: it has no retraining." in message
    message = refused(run, "clean", *options, "--strategy", "identity", "--retrain", "--out", "c.parquet")
    assert "recipe glue-own cannot be trained again" in message
    done(run, "clean", *options, "--strategy", "identity", "--out", "c.parquet")
    message = refused(run, "score", *options, "--strategy", "identity", "--response", "unrolled", "--name", "u")
    assert "unrolled" in message


def test_a_model_of_another_recipe_and_one_that_is_not_finished(run: Any, here: Path, place: Place) -> None:
    assert "was trained by the recipe 'swag', not 'glue'" in refused(run, "fit", "glue", "--checkpoint-dir", place.models / "swag")
    shutil.copytree(place.models / "swag", here / "half")
    (here / "half" / "whence.json").unlink()
    message = refused(run, "fit", "swag", "--checkpoint-dir", "half")
    assert "half is of a training that did not end. Train again: whence train swag" in message


def test_recipes_take_the_same_options_in_python(place: Place) -> None:
    found = whence.load_recipe("glue", checkpoint_dir=place.models / "sst2", max_query_rows=2)
    assert len(found.queries) == 2
    with pytest.raises(WhenceError, match=r"'max_rows' is no option of data; there are task, data, train_file, "):
        whence.load_recipe("glue", checkpoint_dir=place.models / "sst2", max_rows=2)
