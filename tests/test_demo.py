"""The demo finds the labels it flipped, says so in one line, and can be stopped and started again."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from whence.attributor import Attributor
from whence.demo.digits import DemoResult, run_demo
from whence.errors import ConfigError
from whence.report.digits_findings import signed


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> DemoResult:
    return run_demo(out=tmp_path_factory.mktemp("demo") / "run")


def test_it_finds_the_flipped_labels(finished):
    assert finished.recall_at_10 >= 0.80
    assert finished.recall_at_20 >= 0.95
    assert (finished.train, finished.flipped) == (1200, 120)


def test_it_says_so_in_one_line(finished):
    line, where = str(finished).splitlines()
    assert re.fullmatch(r"recall of flipped labels: [\d.]+% in the first 10%, [\d.]+% in the first 20%", line)
    assert where == f"report: {finished.report}"
    assert finished.to_json()["flipped"] == 120


def test_the_page_says_which_ranking_wins_and_shows_every_misread_digit(finished):
    page = finished.report.read_text()
    assert re.search(r"Loss wins here|A draw|Self-influence wins here", page)
    assert page.count('<article class="case">') == finished.misread
    assert "38,282 of 38,282 trainable parameters (100.0%)" in page
    assert not re.search(r"https?://", page)


def test_nothing_goes_to_stdout_and_the_stages_go_to_stderr(tmp_path, capsys):
    threads = torch.get_num_threads()
    run_demo(out=tmp_path / "run")
    out, err = capsys.readouterr()
    assert not out
    assert "Train network" in err
    assert "100.0%" in err
    assert torch.get_num_threads() == threads


def test_started_again_it_reads_back_what_was_done(finished, monkeypatch, capsys):
    scores = finished.report.parent / "scores" / "ekfac"
    before = {path.name: path.read_bytes() for path in scores.glob("*.safetensors")}
    again = run_demo(out=finished.report.parent)
    assert "Fit" not in capsys.readouterr().err, "the fit was done again"
    assert again == finished
    assert {path.name: path.read_bytes() for path in scores.glob("*.safetensors")} == before


def test_stopped_in_the_middle_it_comes_to_the_same_result(finished, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Attributor, "scores", stop)
        with pytest.raises(KeyboardInterrupt):
            run_demo(out=tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()
    again = run_demo(out=tmp_path / "run")
    assert dataclasses.replace(again, report=finished.report) == finished


def test_another_seed_replaces_the_demo(tmp_path, finished):
    first = run_demo(out=tmp_path / "run", seed=1)
    second = run_demo(out=tmp_path / "run", seed=0)
    assert second.recall_at_20 >= 0.95
    assert dataclasses.replace(second, report=finished.report) == finished != first


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "factors").mkdir()
    with pytest.raises(ConfigError, match=r"holds something that is no demo.*--out"):
        run_demo(out=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["factors"]


def test_a_missing_extra_is_reported_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r'pip install "whence\[report\]"'):
        run_demo(out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("score", "text"), [(17776.9, "+17,777"), (-3.14159, "\u22123.14"), (0.0, "+0"), (-99.96, "\u2212100"), (0.00123, "+0.00123")]
)
def test_scores_have_a_sign(score, text):
    assert signed(score) == text
