"""Every option of fit, score, self and top beyond the first: from flags and from YAML, what it does, and what is said of wrong values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

import whence
from commands import done

MINE = "recipe.py:tiny"
WORDS = "words.py:words"

TEXT = """
import torch
from torch import nn

import whence


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.places = nn.Embedding(9, 4), nn.Parameter(torch.ones(5, 4))
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.inner(self.table(input_ids) + self.places)).mean(1))


def collate(rows):
    ids = torch.stack([row["inputs"]["input_ids"] for row in rows])
    return {"input_ids": ids, "inputs": {"input_ids": ids}, "labels": torch.tensor([row["labels"] for row in rows])}


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"inputs": {"input_ids": torch.randint(9, (5,), generator=generator)}, "labels": n % 3} for n in range(count)]


def words():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Words().eval()
    task = whence.tasks.Classification(inputs="inputs", labels="labels")
    return whence.Recipe(name="words", model=model, task=task, train=rows(11, 1), queries=rows(6, 2), collate=collate)
"""


@pytest.fixture
def words(here: Path) -> None:
    (here / "words.py").write_text(TEXT, encoding="utf-8")


def recipe(here: Path, spec: str = MINE) -> whence.Recipe:
    file, name = spec.split(":")
    return whence.load_recipe(f"{here}/{file}:{name}")


def library(here: Path, spec: str = MINE, *, strategy: Any = "ekfac", **options: Any) -> tuple[whence.Attributor, Any, Any]:
    found = recipe(here, spec)
    attributor = whence.Attributor(found.model, found.task, collate=found.collate, progress=False, device="cpu", **options)
    return attributor.fit(found.train, strategy=strategy), found.queries, found.train


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--normalize", "relatif"], {"normalize": "relatif"}),
        (["--normalize", "cosine"], {"normalize": "cosine"}),
        (["--query-rank", "1"], {"query_rank": 1}),
        (["--response", "unrolled:10"], {"response": whence.Unrolled(time=10.0)}),
        (["--response", "unrolled:0.5", "--damping", "0.1"], {"response": whence.Unrolled(time=0.5), "damping": 0.1}),
        (["--response", "inverse", "--damping", "relative:0.3:model"], {"damping": whence.Damping(relative=0.3, scope="model")}),
        (["--aggregate", "queries"], {"aggregate": "queries"}),
        (["--aggregate", "rows"], {"aggregate": "rows"}),
        (["--aggregate", "both"], {"aggregate": "both"}),
        (["--query-rows", "0,3", "--train-rows", "1,2,20"], {"query_rows": [0, 3], "train_rows": [1, 2, 20]}),
        (["--query-rows", "5", "--query-rows", "2"], {"query_rows": [5, 2]}),
        (["--batch-size", "auto", "--query-batch-size", "auto"], {}),
        (["--batch-size", "8", "--query-batch-size", "2"], {}),
        (["--solver", "direct"], {}),
    ],
    ids=str,
)
def test_options_of_score_reach_the_library(run: Any, here: Path, flags: list[str], options: dict[str, Any]) -> None:
    done(run, "fit", MINE)
    result = done(run, "score", MINE, *flags, "--json")
    saved = whence.Scores.load(result.data["scores"])
    attributor, queries, train = library(here)
    close(saved.values, attributor.scores(queries, train, **options).values)
    assert [result.data["queries"], result.data["train"]] == list(saved.values.shape)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_solvers_have_a_folder_of_their_own(run: Any, here: Path, solver: Any) -> None:
    done(run, "fit", MINE)
    done(run, "score", MINE)
    result = done(run, "score", MINE, "--solver", solver, "--json")
    name = {"exact": "exact", "cg": "ekfac-cg"}[solver]
    assert Path(result.data["scores"]) == Path(f"runs/tiny/scores/{name}")
    assert Path(result.data["table"]).exists()
    attributor, queries, train = library(here)
    close(whence.Scores.load(result.data["scores"]).values, attributor.scores(queries, train, solver=solver).values)
    listed = done(run, "top", MINE, "--name", name, "--query", "1", "--k", "3", "--json").data["queries"][0]
    wanted = whence.Scores.load(result.data["scores"]).top(1, 3)
    assert [(row["train"], row["score"]) for row in listed["proponents"]] == wanted


def test_exact_needs_no_fit(run: Any) -> None:
    """What needs no fitted curvature in the library needs none here."""
    assert done(run, "score", MINE, "--strategy", "identity", "--solver", "cg").status == 0
    assert done(run, "score", MINE, "--strategy", "identity", "--solver", "exact", "--name", "named").status == 0
    assert done(run, "score", MINE, "--solver", "exact").status == 0


@pytest.mark.usefixtures("words")
def test_tokens_with_a_norm(run: Any, here: Path) -> None:
    done(run, "fit", WORDS, "--layers", "all", "--fallback")
    result = done(run, "score", WORDS, "--layers", "all", "--fallback", "--per-token", "--per-layer", "--normalize", "cosine", "--json")
    saved = whence.Scores.load(result.data["scores"])
    assert saved.per_token is not None
    assert saved.per_token.shape == (6, 11, 5)
    assert set(saved.per_layer) == {"table", "places", "inner", "head"}
    assert set(result.data["coverage"]["tracked"]) == set(saved.per_layer)
    attributor, queries, train = library(here, WORDS, layers="all", fallback=True)
    expected = attributor.scores(queries, train, per_token=True, normalize="cosine")
    close(saved.values, expected.values)
    close(saved.per_token, expected.per_token)
    close(saved.per_token.sum(-1) + saved.per_token_rest, saved.values)


@pytest.mark.usefixtures("words")
def test_without_fallback_and_all_less_is_tracked(run: Any) -> None:
    assert set(done(run, "fit", WORDS, "--json").data["coverage"]["tracked"]) == {"inner", "head"}
    tracked = done(run, "fit", WORDS, "--fallback", "--run-dir", "more", "--json").data["coverage"]["tracked"]
    assert set(tracked) == {"inner", "head", "places"}


def test_rows_by_name_are_listed_by_their_numbers_in_the_data(run: Any, here: Path) -> None:
    done(run, "fit", MINE)
    done(run, "score", MINE)
    done(run, "score", MINE, "--query-rows", "0,3", "--train-rows", "1,2", "--name", "mine")
    whole, part = (whence.Scores.load(here / "runs/tiny/scores" / name) for name in ("ekfac", "mine"))
    torch.testing.assert_close(part.values, whole.values[[0, 3]][:, [1, 2]], rtol=1e-4, atol=1e-5)
    result = done(run, "top", MINE, "--name", "mine", "--bottom", "--json")
    assert [entry["query"] for entry in result.data["queries"]] == [0, 3]
    data = recipe(here)
    for entry, query in zip(result.data["queries"], (0, 3), strict=True):
        assert entry["text"] == f"class {data.queries[query][1]}"
        best = sorted(((float(whole.values[query, t]), t) for t in (1, 2)), reverse=True)
        assert [row["train"] for row in entry["proponents"]] == [t for _, t in best]
        assert [row["train"] for row in entry["opponents"]] == [t for _, t in best][::-1]
        for row in entry["proponents"]:
            assert row["text"] == f"class {data.train[row['train']][1]}"
    text = done(run, "top", MINE, "--name", "mine")
    assert [line.split(":")[0] for line in text.out.splitlines() if line.startswith("query")] == ["query 0", "query 3"]


def test_the_table_names_rows_by_their_numbers_in_the_data(run: Any, here: Path) -> None:
    """Queries too: people join the table with their data."""
    done(run, "fit", MINE)
    result = done(run, "score", MINE, "--query-rows", "6,3", "--train-rows", "9,4,7", "--k", "2", "--name", "mine", "--json")
    table = parquet.read_table(here / result.data["table"]).to_pylist()
    assert {row["train"] for row in table} <= {9, 4, 7}
    assert {row["query"] for row in table} == {6, 3}


def test_sums_are_listed_as_what_they_are(run: Any, here: Path) -> None:
    done(run, "fit", MINE)
    done(run, "score", MINE, "--aggregate", "queries", "--name", "summed")
    entry = done(run, "top", MINE, "--name", "summed", "--k", "1", "--json").data["queries"]
    assert len(entry) == 1
    assert entry[0]["text"] == "the sum of all queries"
    done(run, "score", MINE, "--aggregate", "rows", "--name", "rows")
    refused = run("top", MINE, "--name", "rows")
    assert refused.status == 2
    assert "sums over training rows" in refused.err


@pytest.mark.parametrize("aggregate", ["rows", "both"])
def test_sums_over_rows_name_no_row(run: Any, aggregate: str) -> None:
    done(run, "fit", MINE)
    result = done(run, "score", MINE, "--aggregate", aggregate, "--train-rows", "7,3", "--json")
    scores = whence.Scores.load(result.data["scores"])
    for ask in (scores.top, scores.bottom):
        with pytest.raises(whence.errors.ConfigError, match="aggregate"):
            ask(0, 3)
    table = result.data.get("table")
    assert table is None or not Path(table).exists() or parquet.read_table(table).num_rows == 0


def test_names_keep_results_apart(run: Any) -> None:
    done(run, "fit", MINE)
    done(run, "score", MINE)
    done(run, "score", MINE, "--damping", "0.5", "--name", "strong")
    assert run("score", MINE, "--damping", "0.7", "--name", "strong").status == 2
    missing = run("top", MINE, "--name", "nothing")
    assert missing.status == 2
    assert "nothing does not exist" in missing.err


# ---------------------------------------------------------------------------------------------- fit and self


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision(run: Any, here: Path, precision: str) -> None:
    done(run, "fit", MINE, "--precision", precision)
    result = done(run, "score", MINE, "--precision", precision, "--damping", "relative:1", "--json")
    attributor, queries, train = library(here, precision=precision)
    wanted = attributor.scores(queries, train, damping=whence.Damping(relative=1.0)).values
    close(whence.Scores.load(result.data["scores"]).values, wanted)


def test_offload_and_sizes_change_nothing(run: Any) -> None:
    plain = done(run, "fit", MINE, "--run-dir", "a") and done(run, "score", MINE, "--run-dir", "a", "--json").data["scores"]
    done(run, "fit", MINE, "--run-dir", "b", "--offload", "--batch-size", "3")
    other = done(run, "score", MINE, "--run-dir", "b", "--offload", "--batch-size", "8", "--query-batch-size", "5", "--json").data["scores"]
    close(whence.Scores.load(other).values, whence.Scores.load(plain).values)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--on", "measurement"], {"on": "measurement"}),
        (["--on", "loss", "--response", "unrolled:2"], {"response": whence.Unrolled(time=2.0)}),
        (["--damping", "0.25", "--batch-size", "4"], {"damping": 0.25}),
    ],
    ids=str,
)
def test_options_of_self_reach_the_library(run: Any, here: Path, flags: list[str], options: dict[str, Any]) -> None:
    done(run, "fit", MINE)
    done(run, "self", MINE, *flags)
    attributor, _, train = library(here)
    table = parquet.read_table(here / "runs/tiny/self_influence.parquet")
    close(torch.tensor(table["self_influence"].to_pylist()), attributor.self_influence(train, **options).float())


# ---------------------------------------------------------------------------------------------- files


def test_every_option_may_come_from_a_file(run: Any, here: Path) -> None:
    options = {
        "fit": {"strategy": "kfac", "batch-size": "auto", "precision": "float32", "compile": False, "offload": True, "fallback": True},
        "score": {
            "strategy": "kfac",
            "response": "unrolled:3",
            "damping": 0.2,
            "query_rows": [0, 3],
            "train-rows": [1, 2, 5],
            "name": "mine",
            "per-layer": True,
            "per_token": True,
            "batch_size": 8,
            "query-batch-size": "auto",
            "normalize": "relatif",
            "offload": True,
            "k": 2,
        },
        "self": {"strategy": "kfac", "on": "measurement", "response": "unrolled:3", "bottom": True},
        "top": {"name": "mine", "query": [3], "k": 2},
    }
    found = {}
    for verb, values in options.items():
        (here / f"{verb}.yaml").write_text(json.dumps(values), encoding="utf-8")
        found[verb] = done(run, verb, MINE, "--config", f"{verb}.yaml", "--json").data
    saved = whence.Scores.load(found["score"]["scores"])
    assert (saved.query_rows, saved.train_rows) == ([0, 3], [1, 2, 5])
    assert set(saved.per_layer) == {"0", "2"}
    attributor, queries, train = library(here, strategy="kfac")
    response: dict[str, Any] = {"response": whence.Unrolled(time=3.0), "damping": 0.2, "normalize": "relatif"}
    close(saved.values, attributor.scores(queries, train, query_rows=[0, 3], train_rows=[1, 2, 5], **response).values)
    assert found["top"]["queries"][0]["query"] == 3
    # What the command line says goes first.
    again = done(run, "score", MINE, "--config", "score.yaml", "--name", "other", "--query-rows", "4", "--json").data
    assert whence.Scores.load(again["scores"]).query_rows == [4]


def test_a_wrong_value_in_a_file_names_the_option(run: Any, here: Path) -> None:
    for key, value in (("solver", "lu"), ("batch_size", 0), ("query_rows", [-1]), ("aggregate", "all"), ("per_tokens", True)):
        (here / "wrong.yaml").write_text(json.dumps({key: value}), encoding="utf-8")
        result = run("score", MINE, "--config", "wrong.yaml")
        assert result.status == 2, key
        assert key.replace("_", "-") in result.err.replace("_", "-"), result.err
        assert "Traceback" not in result.err


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("verb", "flags", "said"),
    [
        ("score", ["--batch-size", "0"], ["--batch-size", "0 is too small", "1 or more"]),
        ("score", ["--batch-size", "1.5"], ["--batch-size", "not a whole number"]),
        ("score", ["--batch-size", "all"], ["--batch-size", "not a whole number"]),
        ("score", ["--query-batch-size", "-2"], ["--query-batch-size"]),
        ("fit", ["--batch-size", "0"], ["--batch-size"]),
        ("self", ["--batch-size", "none"], ["--batch-size"]),
        ("score", ["--solver", "lu"], ["--solver", "direct", "cg", "exact"]),
        ("score", ["--normalize", "l2"], ["--normalize", "relatif", "cosine"]),
        ("score", ["--aggregate", "all"], ["--aggregate", "queries", "rows", "both"]),
        ("score", ["--query-rank", "0"], ["--query-rank"]),
        ("score", ["--query-rows", "a,b"], ["--query-rows", "no list of row numbers"]),
        ("score", ["--query-rows", "1,,2"], ["--query-rows"]),
        ("score", ["--train-rows", "-1"], ["--train-rows"]),
        ("score", ["--response", "short"], ["--response short", "unrolled:1.5"]),
        ("score", ["--response", "unrolled:0"], ["--response unrolled:0"]),
        ("score", ["--response", "unrolled:x"], ["--response unrolled:x"]),
        ("self", ["--response", "inverse:3"], ["--response inverse:3"]),
        ("score", ["--damping", "auto:3"], ["--damping auto:3"]),
        ("self", ["--on", "margin"], ["--on", "loss", "measurement"]),
        ("fit", ["--precision", "float8"], ["--precision", "float32", "bfloat16", "float16"]),
        ("fit", ["--layer", "0"], ["--layer"]),
        ("fit", ["--seed", "-1"], ["--seed"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_wrong_values_name_their_option(run: Any, verb: str, flags: list[str], said: list[str]) -> None:
    result = run(verb, MINE, *flags)
    assert result.status == 2
    assert result.out == ""
    for part in said:
        assert part in result.err, result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--query-rows", "0,7"], "7 is no row of a data set of 7 rows"),
        (["--train-rows", "23"], "23 is no row of a data set of 23 rows"),
        (["--solver", "exact", "--normalize", "cosine"], "solver='direct'"),
        (["--solver", "cg", "--response", "unrolled:1"], "solver='direct'"),
        (["--solver", "exact", "--query-rank", "2"], "solver='direct'"),
        (["--aggregate", "rows", "--per-token"], "leave one out"),
        (["--aggregate", "queries", "--normalize", "cosine"], "relatif"),
        (["--compile", "--offload"], "cannot be combined"),
        (["--response", "unrolled"], "length of training"),
        (["--damping", "calibrated"], "needs a calibration"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_had_together(run: Any, flags: list[str], said: str) -> None:
    done(run, "fit", MINE)
    result = run("score", MINE, *flags)
    assert result.status == 2, result.err
    assert said in result.err


def test_a_solver_without_a_positive_damping(run: Any) -> None:
    result = run("score", MINE, "--strategy", "identity", "--solver", "exact", "--damping", "0")
    assert result.status in (1, 2)
    assert "damping is zero" in result.err
