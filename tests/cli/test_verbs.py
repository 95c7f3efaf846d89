"""What each verb computes, prints and leaves in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import whence

MINE = "recipe.py:tiny"
STRATEGIES = ["identity", "diagonal", "kfac", "ekfac"]


def fitted(run: Any, *options: str) -> None:
    done = run("fit", MINE, *options)
    assert done.status == 0, done.err


def scored(run: Any, *options: str) -> None:
    fitted(run)
    done = run("score", MINE, *options)
    assert done.status == 0, done.err


def changed(here: Path, what: str, into: str) -> None:
    """Write another recipe.py; of another size, since compiled files are told apart by the second and the size."""
    path = here / "recipe.py"
    path.write_text(path.read_text(encoding="utf-8").replace(what, into), encoding="utf-8")


def library(here: Path, strategy: str = "ekfac") -> tuple[whence.Attributor, whence.Recipe]:
    recipe = whence.load_recipe(f"{here}/{MINE}")
    attributor = whence.Attributor(recipe.model, recipe.task, progress=False)
    return attributor.fit(recipe.train, strategy=strategy), recipe  # type: ignore[arg-type]


def test_fit_stores_factors_and_says_what_it_did(run: Any, here: Path) -> None:
    done = run("fit", MINE, "--strategy", "kfac")
    assert done.status == 0, done.err
    assert (here / "runs/tiny/factors/kfac/manifest.json").exists()
    assert (here / "runs/tiny/run.json").exists()
    assert done.out.splitlines() == ["recipe     tiny", "run dir    runs/tiny", "strategy   kfac", "empirical  False"]
    assert "Stages" in done.err
    assert "Total" in done.err
    assert "%" in done.err, "the coverage"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_score_equals_the_library(run: Any, here: Path, strategy: str) -> None:
    fitted(run, "--strategy", strategy)
    done = run("score", MINE, "--strategy", strategy, "--batch-size", "5", "--query-batch-size", "3", "--json")
    assert done.status == 0, done.err
    assert done.data["queries"] == 7
    assert done.data["train"] == 23
    saved = whence.Scores.load(done.data["scores"])
    attributor, recipe = library(here, strategy)
    torch.testing.assert_close(saved.values, attributor.scores(recipe.queries, recipe.train).values, rtol=1e-4, atol=1e-5)


def test_score_writes_a_table_of_the_strongest(run: Any, here: Path) -> None:
    scored(run, "--k", "3")
    table = parquet.read_table(here / "runs/tiny/scores/ekfac_top.parquet").to_pylist()
    saved = whence.Scores.load(here / "runs/tiny/scores/ekfac")
    assert len(table) == 7 * 2 * 3
    best = next(row for row in table if row["query"] == 2 and row["side"] == "proponent" and row["rank"] == 1)
    assert (best["train"], best["score"]) == saved.top(2, 1)[0]


def test_per_layer_scores_are_kept(run: Any, here: Path) -> None:
    scored(run, "--per-layer")
    saved = whence.Scores.load(here / "runs/tiny/scores/ekfac")
    assert set(saved.per_layer) == {"0", "2"}
    torch.testing.assert_close(sum(saved.per_layer.values()), saved.values)


def test_damping_reaches_the_library(run: Any, here: Path) -> None:
    scored(run, "--damping", "relative:0.5:model")
    attributor, recipe = library(here)
    expected = attributor.scores(recipe.queries, recipe.train, damping=whence.Damping(relative=0.5, scope="model"))
    torch.testing.assert_close(whence.Scores.load(here / "runs/tiny/scores/ekfac").values, expected.values, rtol=1e-4, atol=1e-5)


def test_layers_are_split_at_commas(run: Any) -> None:
    for layers, tracked in (("0,2", ["0", "2"]), ("2", ["2"]), ("all", ["0", "2"])):
        done = run("fit", MINE, "--layers", layers, "--run-dir", f"run-{layers}", "--json")
        assert done.status == 0, done.err
        assert done.data["coverage"]["tracked"] == tracked


def test_self_ranks_rows_and_writes_every_one(run: Any, here: Path) -> None:
    fitted(run)
    done = run("self", MINE, "--k", "4", "--bottom", "--json")
    assert done.status == 0, done.err
    attributor, recipe = library(here)
    expected = attributor.self_influence(recipe.train)
    order = expected.argsort(descending=True).tolist()
    assert [row["train"] for row in done.data["largest"]] == order[:4]
    assert [row["train"] for row in done.data["smallest"]] == order[::-1][:4]
    assert done.data["largest"][0]["text"] == f"class {recipe.train[order[0]][1]}"
    table = parquet.read_table(here / "runs/tiny/self_influence.parquet")
    assert table["example"].to_pylist() == list(range(23))
    torch.testing.assert_close(torch.tensor(table["self_influence"].to_pylist()), expected, rtol=1e-4, atol=1e-5)


def test_self_prints_a_line_per_row(run: Any) -> None:
    fitted(run)
    done = run("self", MINE, "--k", "2")
    heading, *rows = done.out.splitlines()
    assert heading == "largest self-influence"
    assert len(rows) == 2
    assert all("train" in row and "class" in row for row in rows)


def test_top_reads_saved_scores(run: Any, here: Path) -> None:
    scored(run)
    done = run("top", MINE, "--query", "0,3", "--k", "2", "--bottom", "--json")
    assert done.status == 0, done.err
    saved = whence.Scores.load(here / "runs/tiny/scores/ekfac")
    first, second = done.data["queries"]
    assert (first["query"], second["query"]) == (0, 3)
    assert [(row["train"], row["score"]) for row in second["proponents"]] == saved.top(3, 2)
    assert [(row["train"], row["score"]) for row in second["opponents"]] == saved.bottom(3, 2)
    assert first["text"].startswith("class ")


def test_top_is_readable(run: Any) -> None:
    scored(run)
    done = run("top", MINE, "--k", "2")
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("query")] == [f"query {q}" for q in range(5)]
    assert lines[1] == "  proponents"
    assert len(lines) == 5 * 4
    assert "queries 0 to 4 of 7" in done.err


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("train=rows(23, 1)|train=rows(23, 55)", "other training rows"),
        ("queries=rows(7, 2)|queries=rows(7, 55)", "other queries"),
        ("train=rows(23, 1)|train=rows(23, 1)[::-1]", "other training rows"),
    ],
)
def test_top_refuses_scores_of_other_rows(run: Any, here: Path, change: str, what: str) -> None:
    scored(run)
    changed(here, *change.split("|"))
    done = run("top", MINE)
    assert (done.status, done.out) == (2, "")
    assert f"runs/tiny/scores/ekfac holds scores of {what} than recipe tiny has now, though as many. Score again" in done.err
    assert done.err.count("\n") == 1, "one line"


def test_top_lists_scores_of_a_model_that_has_changed(run: Any, here: Path) -> None:
    scored(run)
    changed(here, "manual_seed(0)", "manual_seed(11)")
    assert run("top", MINE).status == 0, "it reads, and names the rows that were scored"


def test_a_recipe_without_descriptions_shows_numbers(run: Any) -> None:
    scored(run)
    done = run("top", "recipe.py:silent", "--query", "1", "--k", "1")
    assert done.status == 0, done.err
    assert done.out.splitlines()[0] == "query 1"
    assert run("top", "recipe.py:silent", "--json").data["queries"][0]["text"] is None


def test_standard_output_holds_only_data(run: Any) -> None:
    for arguments in (("fit", MINE), ("score", MINE), ("self", MINE), ("top", MINE, "--query", "1")):
        done = run(*arguments, "--json")
        assert done.status == 0, done.err
        assert isinstance(json.loads(done.out), dict)


def test_options_come_from_a_file_and_the_command_line_goes_first(run: Any, here: Path) -> None:
    (here / "options.yaml").write_text("strategy: kfac\nmax-examples: 11\nrun_dir: elsewhere\nlayers: ['0', '2']\n", encoding="utf-8")
    done = run("fit", MINE, "--strategy", "diagonal", "--config", "options.yaml", "--json")
    assert done.status == 0, done.err
    assert done.data["strategy"] == "diagonal"
    assert done.data["run_dir"] == "elsewhere"
    store = json.loads((here / "elsewhere/factors/diagonal/manifest.json").read_text(encoding="utf-8"))
    assert '"max_examples": 11' in json.dumps(store)


def test_lists_come_from_a_file(run: Any, here: Path) -> None:
    scored(run)
    (here / "top.yaml").write_text("query: [4, 1]\nk: 1\nbottom: true\n", encoding="utf-8")
    done = run("top", MINE, "--config", "top.yaml", "--json")
    assert [entry["query"] for entry in done.data["queries"]] == [4, 1]
    assert "opponents" in done.data["queries"][0]


def test_the_same_command_again_reads_back(run: Any) -> None:
    scored(run)
    done = run("score", MINE)
    assert done.status == 0, done.err
    assert "Pairwise" not in done.err, "the second run must compute nothing"


def test_other_settings_are_refused_until_overwrite(run: Any) -> None:
    scored(run)
    done = run("score", MINE, "--damping", "0.5")
    assert done.status == 2
    assert "damping" in done.err
    assert "--overwrite" in done.err
    assert run("score", MINE, "--damping", "0.5", "--overwrite").status == 0
