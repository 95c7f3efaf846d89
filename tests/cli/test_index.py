"""The verbs index and query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import whence
from commands import done, refused
from finetuned import Place, opened
from whence.errors import ConfigError

MINE = "recipe.py:tiny"


def indexed(run: Any, *options: str) -> Any:
    done(run, "fit", MINE)
    return done(run, "index", MINE, *(options or ("--keep", "1")), "--json").data


def test_index_says_what_a_row_costs(run: Any, here: Path) -> None:
    made = indexed(run, "--keep", "1/2", "--dtype", "bfloat16", "--projection", "pca")
    assert (made["rows"], made["projection"], made["keep"], made["dtype"]) == (23, "pca", 0.5, "bfloat16")
    files = (here / made["index"]).glob("*.safetensors")
    assert made["bytes_per_row"] == round(sum(file.stat().st_size for file in files) / 23)


def test_query_lists_the_rows_that_scores_list(run: Any, here: Path) -> None:
    indexed(run)
    answer = done(run, "query", MINE, "--query", "2,5", "--k", "3", "--bottom", "--rescore", "1", "--json").data
    done(run, "score", MINE)
    scores = whence.Scores.load(here / "runs/tiny/scores/ekfac")
    assert answer["exact"] is True
    assert [entry["query"] for entry in answer["queries"]] == [2, 5]
    for entry in answer["queries"]:
        for side, ranked in (("proponents", scores.top), ("opponents", scores.bottom)):
            expected = ranked(entry["query"], 3)
            assert [row["train"] for row in entry[side]] == [row for row, _ in expected]
            assert [row["score"] for row in entry[side]] == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [("index", "--damping", "much"), ("index", "--response", "soon"), ("index", "--name", "../up"), ("query", "--name", "../up")],
)
def test_options_are_looked_at_before_the_model(run: Any, verb: str, option: str, value: str) -> None:
    assert value in refused(run, verb, "recipe.py:interrupted", option, value)


def test_the_help_of_index_is_its_own(run: Any) -> None:
    assert "--normalize" not in run("index", "--help").out


def test_an_approximate_index_gives_the_same_answers(run: Any, here: Path) -> None:
    pytest.importorskip("faiss")
    assert "keeps triplets" in refused(run, "index", "recipe.py:interrupted", "--faiss")
    assert "several checkpoints" in refused(run, "index", "recipe.py:interrupted", "--faiss", "--over-run")
    made = indexed(run, "--projection", "pca", "--keep", "1/2", "--faiss")
    assert made["faiss"] is True
    assert len(list((here / made["index"]).glob("*.faiss"))) == 1
    near, every = (done(run, "query", MINE, "--rescore", "0", "--nprobe", lists, "--json").data for lists in ("99", "0"))
    assert near == every


@pytest.mark.usefixtures("offline_and_quick")
def test_an_index_of_all_snapshots_is_asked_like_any_other(run: Any, here: Path, place: Place) -> None:
    pytest.importorskip("transformers")
    options = [*place.options("sst2")[:-1], "over"]
    assert "whence index glue --over-run" in refused(run, "query", *options, "--over-run")
    made = done(run, "index", *options, "--over-run", "--keep", "1/4", "--json").data
    assert made["over_run"] is True
    (entry,) = done(run, "query", *options, "--over-run", "--query", "1", "--k", "3", "--rescore", "1", "--json").data["queries"]
    scored = done(run, "score", *options, "--over-run", "--strategy", "identity", "--json").data
    scores = whence.Scores.load(here / scored["scores"])
    assert [row["train"] for row in entry["proponents"]] == [row for row, _ in scores.top(1, 3)]
    assert [row["score"] for row in entry["proponents"]] == pytest.approx([score for _, score in scores.top(1, 3)], rel=1e-4)
    assert "name the recipe" in refused(run, "query", "over/over-run/checkpoint-0000", "--over-run")
    assert "no snapshots" in refused(run, "index", MINE, "--over-run")


def test_rows_that_are_not_those_of_the_index_are_listed_without_text(run: Any, here: Path) -> None:
    indexed(run)
    index = whence.Index(None, here / "runs/tiny/index/ekfac")  # type: ignore[arg-type]
    recipe = here / "recipe.py"
    recipe.write_text(recipe.read_text().replace("rows(23, 1)", "rows(5, 3)"))
    assert len(index) == 23
    assert "not those that were indexed" in refused(run, "query", MINE)
    entries = done(run, "query", MINE, "--rescore", "0", "--k", "23", "--json").data["queries"][0]["proponents"]
    assert sorted(entry["train"] for entry in entries) == list(range(23))
    assert {entry["text"] for entry in entries} == {None}


def test_query_without_a_number_takes_the_first(run: Any) -> None:
    indexed(run)
    result = done(run, "query", MINE)
    assert result.out.startswith("query 0")
    assert result.out.count("train ") == 10


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--query", "7"], "--query 7: there are 7 queries"),
        (["--text", "hello"], "recipe tiny does not say how a text becomes a row"),
        (["--text", "hello", "--query", "1"], "--query and --text were both given"),
        (["--name", "other"], "there is no index to ask"),
        (["--rescore", "2"], "--rescore"),
    ],
)
def test_questions_that_cannot_be_asked(run: Any, arguments: list[str], text: str) -> None:
    indexed(run)
    assert text in refused(run, "query", MINE, *arguments)


@pytest.mark.parametrize("keep", ["0", "2", "1/0", "half"])
def test_shares_that_are_none(run: Any, keep: str) -> None:
    assert "is no share" in refused(run, "index", MINE, "--keep", keep)


@pytest.mark.usefixtures("offline_and_quick")
@pytest.mark.parametrize("name", ["sst2", "wikitext"])
def test_a_text_can_be_asked_about(run: Any, place: Place, name: str) -> None:
    pytest.importorskip("transformers")
    done(run, "index", *place.options(name))
    text = "the film is good and the plot too"
    (entry,) = done(run, "query", *place.options(name), "--text", text, "--k", "2", "--json").data["queries"]
    assert text in entry["text"]
    assert len(entry["proponents"]) == 2


@pytest.mark.usefixtures("offline_and_quick")
def test_a_text_is_shown_with_the_class_that_is_read_in_it(place: Place) -> None:
    pytest.importorskip("transformers")
    recipe = opened("sst2", place.models / "sst2")
    assert recipe.ask is not None
    with torch.no_grad():
        for label in (1, 0):
            recipe.model.classifier.bias.copy_(torch.tensor([10.0, -10.0]) * (1 - 2 * label))
            row = recipe.ask("the film is good")
            assert (row["labels"], f"label: {label} " in row["text"]) == (label, True)
    recipe.model.config.num_labels = 1
    with pytest.raises(ConfigError, match="predicts a number"):
        recipe.ask("the film is good")


@pytest.mark.usefixtures("offline_and_quick")
def test_texts_that_are_no_rows_are_refused(run: Any, place: Place) -> None:
    pytest.importorskip("transformers")
    done(run, "index", *place.options("swag"))
    assert "ask about its queries" in refused(run, "query", *place.options("swag"), "--text", "one text")
    assert "several texts" in refused(run, "query", *place.options("swag"), "--text", "one text")
    done(run, "index", *place.options("wikitext"))
    assert "0 tokens" in refused(run, "query", *place.options("wikitext"), "--text", "")
