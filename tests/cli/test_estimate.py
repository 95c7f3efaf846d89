"""The verbs estimate and select on a linear recipe, whose fine-tunes they know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import logistic
from commands import done, refused
from whence.refit.subsets import load_subsets

MINE = "mine.py:recipe"
EXACT = ("--projection", "none", "--ridge", logistic.RIDGE)


@pytest.fixture(autouse=True)
def mine(here: Path) -> None:
    (here / "mine.py").write_text("from logistic import mine, recipe\n", encoding="utf-8")
    logistic.CALLS.clear()
    logistic.STOP_AT.clear()


def test_estimate_says_how_far_it_can_be_trusted(run: Any, here: Path) -> None:
    made = done(run, "estimate", MINE, *EXACT, "--subsets", 40, "--calibration", 4, "--held-out", 5)
    first, told, verdict, *_ = made.out.splitlines()
    assert first == "40 subsets of 8 groups; loss on validation"
    assert told.startswith("estimated ")
    assert verdict.startswith("The estimates are better than both trivial predictors on 5 held-out subsets")
    assert "Refit" in made.err, "the table of stages"
    folder = here / "runs/mine/estimates/refit"
    assert parquet.read_table(folder / "estimates.parquet").num_rows == 40
    assert len(load_subsets(folder / "subsets.json")) == 40
    assert len(logistic.CALLS) == 9
    assert list((here / "runs/mine/retrain").iterdir()), "real fine-tunes are kept in the run folder"
    again = done(run, "estimate", MINE, *EXACT, "--calibration", 4, "--held-out", 4, "--design", "leave-one-out", "--json", "--name", "out")
    assert again.data["subsets"] == 8
    assert again.data["estimates"].endswith("estimates/out")
    assert again.data["trust"]["loss"]["subsets"] == 4
    assert again.data["settings"]["design"] == "leave-one-out"
    written = json.loads((here / "runs/mine/estimates/out/estimate.json").read_text(encoding="utf-8"))
    assert written["trust"] == again.data["trust"]


def test_options_reach_the_library_also_from_a_file(run: Any, here: Path) -> None:
    (here / "subsets.txt").write_text("source 0,source 1,3\nsource 2,source 6,source 7\n", encoding="utf-8")
    (here / "options.yaml").write_text(
        "method: gradex\nscale: 0.1\ncalibration: 0\nby: column\nsubsets_file: subsets.txt\nprojection: random\ndimension: 4\n"
        "per_token: true\nseed: 3\n",
        encoding="utf-8",
    )
    settings = done(run, "estimate", MINE, "--config", "options.yaml", "--json").data["settings"]
    assert (settings["method"], settings["scale"], settings["calibration"]) == ("gradex", 0.1, 0)
    assert (settings["file"], settings["seed"]) == ("subsets.txt", 3)
    assert settings["gradients"] == {"projection": "random", "dimension": 4, "per_token": True, "by": "column", "seed": 3}
    message = refused(run, "estimate", MINE, "--projection", "none", "--calibration", 0, "--ridge", 1)
    assert "projection" in message
    assert "--overwrite" in message
    overwrite = ("--projection", "none", "--calibration", 0, "--ridge", 1, "--overwrite", "--subsets", 3, "--share", 0.25)
    replaced = done(run, "estimate", MINE, *overwrite, "--design", "rows", "--json").data
    assert (replaced["subsets"], replaced["settings"]["share"], replaced["settings"]["design"]) == (3, 0.25, "rows")
    assert "not compared with any real fine-tune" in done(run, "estimate", MINE, *overwrite).out


def test_select_writes_the_data_set(run: Any, here: Path) -> None:
    (here / "select.yaml").write_text("minimum: [source 2=5]\nexamples: 20\n", encoding="utf-8")
    made = done(run, "select", MINE, *EXACT, "--calibration", 4, "--out", "chosen.jsonl", "--json").data
    rows = [json.loads(line) for line in (here / "chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["number"] for row in rows] == made["selection"]["examples"]
    assert not set(logistic.WRONG) & set(made["selection"]["groups"])
    assert made["selection"]["settings"]["method"] == "forward"
    assert made["calibration"]["runs"] == 4
    assert "chosen.jsonl exists" in refused(run, "select", MINE, *EXACT, "--out", "chosen.jsonl")
    more = ("--calibration", 0, "--out", "chosen.jsonl", "--overwrite")
    text = done(run, "select", MINE, *EXACT, *more, "--config", "select.yaml")
    assert " of 8 groups chosen, " in text.out
    assert "chosen.jsonl.provenance.json" in text.err
    kept = [json.loads(line)["number"] for line in (here / "chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) <= 20
    assert {place for place, group in enumerate(logistic.groups()) if group == "source 2"} <= set(kept)
    other = ("--method", "ensemble", "--subsets", 60, "--share", 0.4, "--most-alike", 0.99, "--tokens", 25)
    chosen = done(run, "select", MINE, *EXACT, *more, *other, "--json").data["selection"]["settings"]
    assert (chosen["method"], chosen["subsets"], chosen["share"]) == ("ensemble", 60, 0.4)
    assert (chosen["limits"]["most_alike"], chosen["limits"]["tokens"]) == (0.99, 25)
    backward = done(run, "select", MINE, *EXACT, *more, "--method", "backward", "--until", "best", "--json").data["selection"]
    assert backward["settings"]["until"] == "best"


USAGE: dict[str, tuple[list[Any], list[str]]] = {
    "unknown by": (["estimate", MINE, "--by", "clusters"], ["by='clusters' groups nothing; give 'column', 'row' or 'cluster:N'"]),
    "unknown metric": (["estimate", MINE, "--metric", "los"], ["metric='los': choose loss, accuracy, probability"]),
    "unknown method": (["estimate", MINE, "--method", "trak"], ["trak", "refit", "gradex"]),
    "no ridge": (["estimate", MINE, "--calibration", 0], ["leaves nothing to choose the ridge by; give ridge=..."]),
    "two held out": (["estimate", MINE, "--held-out", 2], ["0 or 3 and more to judge"]),
    "scale of refit": (["estimate", MINE, "--scale", 0.1], ["--scale is for --method gradex"]),
    "share": (["estimate", MINE, "--share", 1.5], ["share=1.5", "between 0 and 1"]),
    "file and design": (["estimate", MINE, "--subsets-file", "a.txt", "--subsets", 3], ["--subsets-file says which subsets there are"]),
    "no file": (["estimate", MINE, "--subsets-file", "a.txt"], ["a.txt: there is no such file of subsets"]),
    "leave one out of how many": (["estimate", MINE, "--design", "leave-one-out", "--subsets", 3], ["leave --subsets and --share out"]),
    "adam": (["estimate", MINE, "--adam"], ["--adam scales the gradients of scores"]),
    "jobs": (["estimate", MINE, "--jobs", 0], ["n_jobs=0 trains nothing"]),
    "name": (["estimate", MINE, "--name", "a/b"], ["name='a/b' cannot name a folder"]),
    "too many fine-tunes": (
        ["estimate", MINE, "--calibration", 40, "--held-out", 60],
        ["100 real fine-tunes need as many different subsets"],
    ),
    "no out": (["select", MINE], ["--out"]),
    "form of out": (["select", MINE, "--out", "rows.xlsx"], ["rows.xlsx"]),
    "until of lasso": (["select", MINE, "--out", "a.jsonl", "--method", "lasso", "--until", "gain"], ["--until is for --method forward"]),
    "subsets of forward": (["select", MINE, "--out", "a.jsonl", "--subsets", 9], ["--subsets is for --method ensemble, ridge and lasso"]),
    "select's share": (["select", MINE, "--out", "a.jsonl", "--share", 0], ["--share 0", "between 0 and 1"]),
    "minimum": (["select", MINE, "--out", "a.jsonl", "--minimum", "praise"], ["--minimum praise: give CLASS=N, for example praise=20."]),
    "unknown class": (["select", MINE, "--out", "a.jsonl", "--minimum", "x=1"], ["of class 'x': there are 0"]),
    "alike": (["select", MINE, "--out", "a.jsonl", "--most-alike", 1], ["most_alike=1.0"]),
    "a baseline": (["select", MINE, "--out", "a.jsonl", "--method", "gradex"], ["gradex", "forward"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(run: Any, here: Path, name: str) -> None:
    arguments, expected = USAGE[name]
    message = refused(run, *arguments)
    for text in expected:
        assert text in message
    assert logistic.CALLS == [], "no fine-tune was made"
