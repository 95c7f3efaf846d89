"""An index that is opened by its folder."""

from __future__ import annotations

import json
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
    assert "in no run folder" in refused(run, "query", "runs/tiny/factors/ekfac")
    assert "leave --run-dir, --name and --strategy out" in refused(run, "query", "runs/tiny", "--name", "ekfac")
    assert "is a recipe already" in refused(run, "query", MINE, "--recipe", MINE)
    done(run, "index", MINE, "--keep", "1", "--name", "second")
    assert "ekfac, runs/tiny/index/second. Name one" in refused(run, "query", "runs/tiny")
