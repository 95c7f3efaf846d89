"""The demo of the standard library, on a few modules and with a tiny model."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import case_run
import finetuned
import library
from whence.attributor import Attributor
from whence.cli.main import main
from whence.demo import stdlib
from whence.demo.stdlib import StdlibResult, StdlibSettings, run_stdlib_demo
from whence.demo.talk import Learned, Reply, learned
from whence.errors import ConfigError
from whence.recipes import functions
from whence.recipes.base import Recipe, load_recipe

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("jinja2")
TINY = StdlibSettings(preset="tiny", epochs=2, functions=80, checked=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library.write_library(tmp_path_factory.mktemp("stdlib") / "lib")


@pytest.fixture(autouse=True)
def few_modules(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    library.use_library(monkeypatch, source)
    finetuned.offline_and_quick(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: Path) -> StdlibResult:
    with pytest.MonkeyPatch.context() as patched:
        library.use_library(patched, source)
        finetuned.offline_and_quick(patched)
        return run_stdlib_demo(out=tmp_path_factory.mktemp("demo") / "run", settings=TINY)


def opened(finished: StdlibResult) -> Recipe:
    return load_recipe("stdlib", checkpoint_dir=finished.model)


def test_every_prompt_gets_a_reply_and_the_rows_it_was_learned_from(finished: StdlibResult) -> None:
    recipe = opened(finished)
    assert [reply.prompt for reply in finished.replies] == list(functions.PROMPTS)
    for reply in finished.replies:
        assert reply.learned, "some row speaks for it"
        scores = [one.score for one in reply.learned]
        assert scores == sorted(scores, reverse=True)
        assert scores[-1] > 0
        for one in reply.learned:
            raw = recipe.raw[one.row]  # type: ignore[index]
            assert (one.module, one.name, one.file, one.line) == (raw["module"], raw["name"], raw["file"], raw["line"])


def test_the_rows_are_those_of_the_exact_scores_of_what_was_said(finished: StdlibResult) -> None:
    """The prompt is given: a score is for the tokens that the model said."""
    recipe = opened(finished)
    asked = stdlib.answers(recipe, functions.PROMPTS)
    assert [row["says"] for row in asked] == [reply.says for reply in finished.replies], "the same is said every time"
    labels = torch.tensor(asked[0]["labels"])
    given = len(labels) - int((labels >= 0).sum())
    assert labels[given:].tolist() == asked[0]["input_ids"][given:]
    attributor = Attributor(recipe.model, recipe.task, run_dir=finished.report.parent, collate=recipe.collate, device="cpu")
    found = attributor.scores(asked, recipe.train, per_token=True, strategy=stdlib.STRATEGY, name="replies")
    for place, reply in enumerate(finished.replies):
        best, value = found.top(place, 1)[0]
        assert reply.learned[0].row == best
        assert reply.learned[0].score == pytest.approx(value, rel=1e-4)


def test_checks_stand_beside_words_in_common_and_chance(finished: StdlibResult) -> None:
    assert list(finished.itself) == list(finished.patch.falls) == ["ekfac", "bm25", "random"]
    assert finished.itself["ekfac"].rows == 80
    assert finished.itself["ekfac"].recall(10).value >= 0.75, "a function finds itself"
    text = str(finished)
    assert "Functions asked for by their own text: 4 of 80" in text
    assert re.search(r"One step on the first 10 rows for 4 functions held out \(loss \d+, \d+ tokens\)", text)
    assert re.search(r"ekfac +loss falls by -?[\d.]+ \(", text)


def test_the_page_shows_what_was_said_and_the_checks(finished: StdlibResult) -> None:
    page = finished.report.read_text(encoding="utf-8")
    assert "What made stdlib-model say this" in page
    assert "Training rows that are asked for themselves" in page
    assert "One more step on the strongest rows" in page
    data = case_run.data_of(page)
    (view,) = data["scores"]
    assert len(view["queries"]) == len(functions.PROMPTS)
    for place, reply in enumerate(finished.replies):
        assert data["rows"]["queries"][str(place)]["text"].startswith(reply.prompt.rstrip())
    assert any("heat" in hit for query in view["queries"] for side in query["sides"] for hit in side), "tokens are marked"
    assert any("\n    " in "".join(row.get("tokens", [])) for row in data["rows"]["train"].values()), "code keeps its indentation"


def test_the_verbs_go_on_where_the_demo_ended(finished: StdlibResult, capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in str(finished).splitlines() if line.startswith("ask more: whence "))
    arguments = shlex.split(line.removeprefix("ask more: whence "))
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["queries"][0]["proponents"]) == 5
    assert main(["report", str(finished.report.parent), "--out", str(finished.report.parent / "again.html"), "--json"]) == 0
    assert "stdlib-model" in (finished.report.parent / "again.html").read_text(encoding="utf-8")


def test_started_again_it_reads_back_what_was_done(finished: StdlibResult, capsys: pytest.CaptureFixture[str]) -> None:
    again = run_stdlib_demo(out=finished.report.parent, settings=TINY)
    err = capsys.readouterr().err
    assert not re.search(r"│ (Train|Fit|Eigen)", err), "something was done again"
    assert again.replies == finished.replies
    assert str(again) == str(finished)


def test_stopped_within_the_training_it_comes_to_the_same_replies(
    finished: StdlibResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = sys.modules["whence.recipes.training"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stdlib, "_KEEP_EVERY_S", 0.0)
        patched.setattr(training, "keep_only", stop)  # after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            run_stdlib_demo(out=tmp_path / "run", settings=TINY)
    assert list((tmp_path / "run/model/unfinished").glob("checkpoint-*/kept.json"))
    again = run_stdlib_demo(out=tmp_path / "run", settings=TINY)
    assert [reply.says for reply in again.replies] == [reply.says for reply in finished.replies]


@pytest.mark.slow
def test_other_settings_replace_the_demo(tmp_path: Path) -> None:
    first = run_stdlib_demo(out=tmp_path / "run", settings=dataclasses.replace(TINY, seed=1))
    second = run_stdlib_demo(out=tmp_path / "run", settings=dataclasses.replace(TINY, seed=2))
    assert [reply.says for reply in first.replies] != [reply.says for reply in second.replies]


@pytest.mark.parametrize("mark", [None, '{"demo": "digits", "seed": 0}'])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, mark: str | None) -> None:
    (tmp_path / "factors").mkdir()
    if mark:
        (tmp_path / "demo.json").write_text(mark, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds (something that is no demo|the demo 'digits').*--out"):
        run_stdlib_demo(out=tmp_path, settings=TINY)
    assert {entry.name for entry in tmp_path.iterdir()} == {"factors"} | ({"demo.json"} if mark else set())


@pytest.mark.parametrize(("package", "extra"), [("transformers", "hf"), ("accelerate", "hf"), ("jinja2", "report")])
def test_a_missing_extra_is_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'pip install "whence\[{extra}\]"'):
        run_stdlib_demo(out=tmp_path / "run", settings=TINY)
    assert not (tmp_path / "run").exists()


def test_the_command_runs_the_demo_that_is_named(
    finished: StdlibResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(stdlib, "run_stdlib_demo", lambda **options: asked.append(options) or finished)
    assert main(["demo", "stdlib", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{finished}\n"
    assert main(["demo", "stdlib", "--out", "elsewhere", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"] == 80
    assert [(one["out"], one["settings"].seed) for one in asked] == [(Path("runs/stdlib"), 3), (Path("elsewhere"), 0)]


def test_rows_that_speak_against_a_reply_are_no_sources() -> None:
    raw = [{"module": "a", "name": f"f{n}", "file": "a.py", "line": n} for n in range(3)]
    recipe: Any = type("Fake", (), {"raw": raw})
    found = learned(recipe, [(2, 0.5), (0, -0.1)])
    assert found == (Learned(row=2, score=0.5, module="a", name="f2", file="a.py", line=2),)
    lines = Reply(prompt="def f():\n    x", says="\n    y\x1b[2J\n", learned=found).lines()
    assert lines[:5] == ["Asked:", "  | def f():", "  |     x", "It says:", "  |     y [2J"]
    assert lines[-1] == "  1. a.f2  (a.py, line 2)  +0.5"
