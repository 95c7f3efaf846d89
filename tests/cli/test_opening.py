"""An index that is opened by its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import done, refused

MINE = "recipe.py:tiny"


def made(run: Any, *options: str) -> None:
    done(run, "fit", MINE, *options)
    done(run, "index", MINE, "--keep", "1", *options)


def answer(run: Any, *arguments: str) -> Any:
    return done(run, "query", *arguments, "--json").data["queries"]


@pytest.mark.parametrize("folder", ["runs/tiny/index/ekfac", "runs/tiny"])
def test_a_folder_answers_as_its_recipe(run: Any, folder: str) -> None:
    made(run)
    assert answer(run, folder, "--recipe", MINE) == answer(run, MINE)


def test_a_folder_is_opened_with_the_options_that_it_was_made_with(run: Any, here: Path) -> None:
    made(run, "--layers", "0", "--seed", "3")
    assert answer(run, "runs/tiny", "--recipe", MINE) == answer(run, MINE, "--layers", "0", "--seed", "3")
    records = json.loads((here / "runs/tiny/run.json").read_text())
    assert records[-1]["options"] == {"layers": ["0"], "seed": 3}


def test_a_file_of_python_is_run_only_if_it_is_asked_for(run: Any, here: Path) -> None:
    made(run)
    (here / "recipe.py").write_text("raise SystemExit('it ran')")
    told = refused(run, "query", "runs/tiny/index/ekfac")
    assert "recipe.py:tiny, a file of Python" in told
    assert "--recipe" in told
    assert "it ran" in refused(run, "query", "runs/tiny/index/ekfac", "--recipe", MINE)


def test_folders_that_are_no_index(run: Any, here: Path) -> None:
    made(run)
    assert "there is no such folder" in refused(run, "query", "runs/other/index/ekfac")
    assert "none. Make one" in refused(run, "query", "runs")
    assert "runs/tiny/factors/ekfac holds factors, and no index" in refused(run, "query", "runs/tiny/factors/ekfac")
    shutil.copytree("runs/tiny/index/ekfac", "copied")
    assert "in no run folder" in refused(run, "query", "copied")
    assert "leave --run-dir, --name and --strategy out" in refused(run, "query", "runs/tiny", "--name", "ekfac")
    assert "is a recipe already" in refused(run, "query", MINE, "--recipe", MINE)
    done(run, "index", MINE, "--keep", "1", "--name", "second")
    assert "ekfac, runs/tiny/index/second. Name one" in refused(run, "query", "runs/tiny")


def test_the_recipe_is_that_of_the_index_and_not_the_last_one_of_the_run(run: Any, here: Path) -> None:
    made(run)
    path = here / "runs/tiny/run.json"
    records = json.loads(path.read_text())
    for record in records:
        record["recipe"]["spec"] = "own.py:tiny" if record["call"] == "index" else "other.py:tiny"
    later, appended = dict(records[0], call="self"), {key: value for key, value in records[-1].items() if key != "recipe"}
    path.write_text(json.dumps([*records, later, appended]))
    assert "run.json names own.py" in refused(run, "query", "runs/tiny/index/ekfac")
    path.write_text(json.dumps([*records[:-1], appended, later]))
    assert "run.json names no recipe" in refused(run, "query", "runs/tiny/index/ekfac")
    path.write_text(json.dumps([later]))
    assert "run.json names other.py" in refused(run, "query", "runs/tiny/index/ekfac")


def test_one_name_of_an_index_is_given(run: Any) -> None:
    assert "--name ekfac and --strategy kfac both say" in refused(run, "query", MINE, "--name", "ekfac", "--strategy", "kfac")
    for verb in ("query", "serve"):
        for option in ("--strategy", "--name"):
            assert "cannot name a folder" in refused(run, verb, MINE, option, "../scores/x")


def test_the_remedy_makes_the_index_that_was_asked_for(run: Any) -> None:
    made(run)
    for options, remedy in (
        (["--name", "other"], f"whence index {MINE} --name other, or ask another with --name: ekfac."),
        (["--strategy", "nonsense"], f"whence index {MINE} --name nonsense, or"),
        (["--strategy", "kfac"], f"whence index {MINE} --strategy kfac, or"),
        (["--run-dir", "elsewhere"], f"whence index {MINE} --run-dir elsewhere."),
    ):
        assert f"Run first: {remedy}" in refused(run, "query", MINE, *options)


def test_a_file_of_python_without_an_object(run: Any) -> None:
    assert "did you mean ./recipe.py:recipe?" in refused(run, "query", "./recipe.py")


def test_the_hint_names_options_of_the_verb(run: Any, here: Path) -> None:
    made(run)
    (here / "recipe.py").write_text((here / "recipe.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    told = refused(run, "query", MINE)
    assert "whence fit and whence index with --overwrite" in told
    assert "the verb that wrote it" not in told


@pytest.mark.parametrize("verb", ["query", "serve"])
def test_help_says_that_defaults_are_not_forced(run: Any, verb: str) -> None:
    told = " ".join(done(run, verb, "--help").out.replace("│", " ").split())
    assert "another value than the default goes before them" in told
