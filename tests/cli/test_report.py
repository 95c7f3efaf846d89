"""The verb report: which rows it finds again, and what it says when it finds none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import finetuned
from case_run import data_of
from whence.errors import RecipeError
from whence.report.reopen import named_recipe, reopened
from whence.storage.run import RunFolder

pytest.importorskip("jinja2")
MINE = "recipe.py:tiny"


def done(run: Any, *arguments: Any) -> Any:
    result = run(*map(str, arguments))
    assert result.status == 0, result.err
    return result


def test_commands_record_the_recipe_they_opened(run: Any, here: Path) -> None:
    done(run, "score", MINE, "--strategy", "identity")
    records = json.loads((here / "runs/tiny/run.json").read_text(encoding="utf-8"))
    assert records[-1]["recipe"] == {"spec": f"{here.resolve()}/recipe.py:tiny", "options": {}}
    assert named_recipe(here / "runs/tiny") == records[-1]["recipe"]


def test_a_recipe_in_a_file_is_run_only_if_asked_for(run: Any, here: Path) -> None:
    """A folder of results may come from elsewhere: it must not choose code."""
    done(run, "score", MINE, "--strategy", "identity")
    source = (here / "recipe.py").read_text(encoding="utf-8")
    (here / "recipe.py").write_text(f"open('was-run', 'w').close()\n{source}", encoding="utf-8")
    result = done(run, "report", "runs/tiny")
    assert result.out == "report: report.html\n"
    assert "run.json names recipe.py:tiny, a file of Python, which is run only if it is asked for by --recipe." in result.err
    assert not (here / "was-run").exists()
    assert "class 1" not in (here / "report.html").read_text(encoding="utf-8")
    result = done(run, "report", "runs/tiny", "--recipe", MINE, "--out", "sub/page.html", "--json")
    assert (here / "was-run").exists()
    page = (here / "sub/page.html").read_text(encoding="utf-8")
    assert "class 1" in page
    assert result.data == {"report": "sub/page.html", "bytes": len(page.encode()), "scores": ["identity"], "notices": []}


def test_queries_and_rows_are_chosen(run: Any, here: Path) -> None:
    done(run, "score", MINE, "--strategy", "identity")
    done(run, "report", "runs/tiny", "--recipe", MINE, "--query", "5,1", "--k", "2")
    (view,) = data_of((here / "report.html").read_text(encoding="utf-8"))["scores"]
    assert [query["row"] for query in view["queries"]] == [5, 1]
    assert all(len(side) <= 2 for query in view["queries"] for side in query["sides"])


def test_a_run_from_python_names_no_recipe(run: Any, here: Path) -> None:
    RunFolder(here / "bare").record({"call": "fit"})
    assert "run.json names no recipe, as of runs that were made from Python" in done(run, "report", "bare").err
    with pytest.raises(RecipeError, match="names no recipe"):
        reopened(here / "bare")
    result = run("report", "nowhere")
    assert result.status == 2
    assert "nowhere is no run folder" in result.err


def test_texts_of_a_fine_tuned_model_are_found_from_anywhere(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    finetuned.offline_and_quick(monkeypatch)
    finetuned.trained("sst2", finetuned.write_data(here / "data"), here / "ck")
    done(run, "fit", "glue", "--checkpoint-dir", "ck", "--run-dir", "mine")
    done(run, "score", "glue", "--checkpoint-dir", "ck", "--run-dir", "mine", "--strategy", "ekfac", "--per-token")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    result = done(run, "report", "../mine")
    page = (here / "elsewhere/report.html").read_text(encoding="utf-8")
    data = data_of(page)
    row = next(iter(data["rows"]["train"].values()))
    assert re.fullmatch(r"the \w+ is \w+ and the \w+ too", row["text"]), "without the name of its column, and without its label"
    assert row["label"] in ("negative", "positive")
    assert row["says"] in ("negative", "positive")
    assert "".join(row["tokens"]).split()[:2] == ["[CLS]", "the"]
    assert any(hit.get("heat") for side in data["scores"][0]["queries"][0]["sides"] for hit in side)
    assert "flipped" in page
    assert result.err == ""
    (here / "ck").rename(here / "moved")
    assert "Rows are shown by number alone: " in done(run, "report", "../mine").err
    assert done(run, "report", "../mine", "--checkpoint-dir", "../moved").err == ""


def test_evaluations_are_kept_and_shown(run: Any, here: Path) -> None:
    done(run, "fit", MINE)
    done(run, "score", MINE)
    printed = done(run, "evaluate", "duplicates", MINE, "--count", "3", "--json").data
    assert json.loads((here / "runs/tiny/evaluations/duplicates.json").read_text(encoding="utf-8")) == printed
    done(run, "evaluate", "tail-patch", MINE, "--scores", "ekfac", "--baselines", "random", "--k", "2")
    done(run, "report", "runs/tiny", "--recipe", MINE)
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "Training rows that are asked for themselves (duplicates)" in page
    assert "One more step on the strongest rows (tail-patch): 7 queries" in page
    assert "Mean reciprocal rank" in page
