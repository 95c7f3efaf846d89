"""Stages add up; progress is shown late, on stderr only, and goes away."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from whence.errors import ConfigError
from whence.runtime import progress
from whence.runtime.progress import StageRow, Stages


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()

    def console(stderr: bool) -> Console:
        assert stderr
        return Console(file=screen, force_terminal=True, width=120, color_system=None)

    monkeypatch.setattr(progress, "Console", console)
    return screen


def run(stages: Stages, clock: Clock, name: str, seconds: float) -> None:
    with stages.stage(name):
        clock.now += seconds


def test_rows_are_ordered_by_total(clock: Clock) -> None:
    stages = Stages()
    assert stages.rows() == []
    run(stages, clock, "read", 1)
    run(stages, clock, "fit", 2)
    run(stages, clock, "fit", 4)
    clock.now += 50  # between stages: belongs to none
    run(stages, clock, "write", 1)
    assert stages.rows() == [
        StageRow(name="fit", mean_s=3, calls=2, total_s=6, share=0.75),
        StageRow(name="read", mean_s=1, calls=1, total_s=1, share=0.125),
        StageRow(name="write", mean_s=1, calls=1, total_s=1, share=0.125),
    ]
    assert Stages.from_json(stages.to_json()).rows() == stages.rows()


def test_a_stage_that_raises_is_recorded(clock: Clock) -> None:
    stages = Stages()

    def fail() -> None:
        with stages.stage("fit"):
            clock.now += 3
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    run(stages, clock, "next", 1)  # nothing is left open
    assert [(row.name, row.total_s, row.calls) for row in stages.rows()] == [("fit", 3, 1), ("next", 1, 1)]


def test_stages_do_not_nest(clock: Clock) -> None:
    stages = Stages()
    with pytest.raises(ConfigError, match="stage 'inner' cannot start inside stage 'outer'"), stages.stage("outer"):
        run(stages, clock, "inner", 1)
    assert [row.name for row in stages.rows()] == ["outer"]


def test_the_table_ends_in_totals(clock: Clock) -> None:
    stages = Stages()
    run(stages, clock, "fit [a]", 3)
    run(stages, clock, "fit [a]", 3)
    run(stages, clock, "score", 2)
    screen = io.StringIO()
    Console(file=screen, width=100).print(stages.table())
    lines = [re.findall(r"[\w.()%\[\] ]*\w[\w.()%\[\] ]*", line) for line in screen.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if line]
    assert cells == [
        ["Stages"],
        ["Stage", "Mean (s)", "Calls", "Total (s)", "Share (%)"],
        ["fit [a]", "3", "2", "6", "75.0"],
        ["score", "2", "1", "2", "25.0"],
        ["Total", "3", "8", "100.0"],
    ]
    Console(file=screen).print(Stages().table())  # no stage at all is no error


def test_short_operations_show_nothing(clock: Clock, terminal: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    with Stages().track(10, "Fit") as advance:
        for _ in range(10):
            clock.now += 0.19
            advance(1)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_with_the_time_left(clock: Clock, terminal: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.track(100, "Fit [bold]") as advance:
        for _ in range(40):
            clock.now += 0.125
            advance(1)
        print("data")
        assert stages._tracking
    text = terminal.getvalue()
    assert "Fit [bold]" in text
    assert "40/100" in text
    assert "0:00:05 left 0:00:08" in text
    assert text.endswith("\x1b[2K")  # the bar is wiped at the end
    assert capfd.readouterr().out == "data\n"  # stdout does not pass through the bar's console


def test_the_bar_goes_away_when_the_body_raises(clock: Clock, terminal: io.StringIO) -> None:
    stages = Stages()

    def fail() -> None:
        with stages.track(100, "Fit") as advance:
            clock.now += 3
            advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert terminal.getvalue().endswith("\x1b[2K")
    with stages.track(100, "Again") as advance:
        clock.now += 3
        advance(5)
    assert "Again" in terminal.getvalue()


def test_without_a_terminal_sparse_lines_are_printed(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Stages().track(100, "Fit") as advance:
        for _ in range(25):
            clock.now += 1
            advance(2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["Fit: 20/100, 10 s so far, about 40 s left", "Fit: 40/100, 20 s so far, about 30 s left"]


def test_disabled_and_nested_tracks_are_silent(clock: Clock, terminal: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    with Stages(enabled=False).track(10, "Off") as advance:
        clock.now += 60
        advance(5)
    stages = Stages()
    with stages.track(10, "Outer") as outer:
        with stages.track(10, "Inner") as inner:
            clock.now += 60
            inner(5)
        assert terminal.getvalue() == ""
        outer(5)
    assert "Outer" in terminal.getvalue()
    assert "Inner" not in terminal.getvalue()
    assert capfd.readouterr() == ("", "")
