"""The verb plan: what it prints, and that it writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MINE = "recipe.py:tiny"


def test_plan_prints_a_table_and_what_it_takes(run: Any, here: Path) -> None:
    done = run("plan", MINE)
    assert done.status == 0, done.err
    for text in ("Fit covariances", "Eigendecompositions", "Fit eigenvalues", "Query gradients", "Pairwise scores", "Self-influence"):
        assert text in done.out
    assert "it fits." in done.out
    assert "Disk: factors" in done.out
    assert "Attributed: " in done.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("strategy", "stages"), [("identity", 3), ("diagonal", 4), ("kfac", 5), ("ekfac", 6)])
def test_plan_as_json(run: Any, strategy: str, stages: int) -> None:
    done = run("plan", MINE, "--strategy", strategy, "--json")
    assert done.status == 0, done.err
    assert len(done.data["stages"]) == stages
    assert done.data["recipe"] == "tiny"
    assert done.data["fits"] is True
    assert done.data["total"]["seconds"] > 0


def test_options_reach_the_plan(run: Any) -> None:
    done = run("plan", MINE, "--max-examples", "11", "--aggregate", "queries", "--per-layer", "--json")
    assert done.status == 0, done.err
    rows = {stage["name"]: stage["rows"] for stage in done.data["stages"]}
    assert rows["Fit covariances"] == 11
    assert rows["Pairwise scores"] == 23
    assert done.data["disk_bytes"]["scores"] == 4 * 23 * (1 + 2)


def test_options_that_cannot_be_had_together(run: Any) -> None:
    done = run("plan", MINE, "--aggregate", "rows", "--per-token")
    assert done.status == 2
    assert "aggregate='rows'" in done.err
    assert run("plan", MINE, "--on", "labels").status == 2
    assert "--solver exact" in run("plan", MINE, "--solver", "exact").err


def test_a_plan_for_some_of_the_rows(run: Any) -> None:
    done = run("plan", MINE, "--train-rows", "0,3,5", "--query-rows", "1", "--json")
    assert done.status == 0, done.err
    rows = {stage["name"]: stage["rows"] for stage in done.data["stages"]}
    assert rows["Pairwise scores"] == 3
    assert rows["Query gradients"] == 1
    assert run("plan", MINE, "--train-rows", "999").status == 2
