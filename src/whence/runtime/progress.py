"""How long each stage takes, and how far a long one has come."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from whence.errors import ConfigError

_SHOW_AFTER_S = 2.0
_PLAIN_EVERY_S = 10.0
_cuda_in_use: Callable[[], bool] = torch.cuda.is_initialized  # torch leaves its type out


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage of a run: wall-clock seconds per call and in all, and the share (0 to 1) of all stages' time."""

    name: str
    mean_s: float
    calls: int
    total_s: float
    share: float


class Stages:
    """Collects the wall-clock time of named stages, and shows progress within them on stderr.

    Args:
        enabled: whether `track` shows anything. Times are collected either way.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._times: dict[str, tuple[float, int]] = {}
        self._open: str | None = None
        self._tracking = False

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the body's time to the stage `name`, also when the body raises. Work queued on a GPU is waited for.

        Raises:
            ConfigError: another stage is still open; a nested one would be counted twice.
        """
        if self._open is not None:
            raise ConfigError(f"stage {name!r} cannot start inside stage {self._open!r}: stages follow one another. End that one first.")
        self._open, start = name, time.perf_counter()
        try:
            yield
            if _cuda_in_use():
                torch.cuda.synchronize()
        finally:
            self._open = None
            seconds, calls = self._times.get(name, (0.0, 0))
            self._times[name] = (seconds + time.perf_counter() - start, calls + 1)

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Callable[[int], None]]:
        """Give `advance(n)`, which counts up to `total`.

        Once that has lasted 2 s, a terminal shows a bar with the time left; without a terminal, a plain line is printed at
        most every 10 s. A track inside another one, and any track of a disabled object, shows nothing.
        """
        if not self.enabled or self._tracking:
            yield lambda n: None
            return
        self._tracking, display = True, _Display(total, description)
        try:
            yield display.advance
        finally:
            self._tracking = False
            display.close()

    def rows(self) -> list[StageRow]:
        """Return one row per stage, longest total first."""
        whole = sum(seconds for seconds, _ in self._times.values())
        rows = [
            StageRow(name=name, mean_s=seconds / calls, calls=calls, total_s=seconds, share=seconds / whole if whole else 0.0)
            for name, (seconds, calls) in self._times.items()
        ]
        return sorted(rows, key=lambda row: -row.total_s)

    def table(self) -> Table:
        """Return the rows as a table that ends in a row of totals."""
        table = Table("Stage", title="Stages")
        for heading in ("Mean (s)", "Calls", "Total (s)", "Share (%)"):
            table.add_column(heading, justify="right")
        rows = self.rows()
        for row in rows:
            table.add_row(escape(row.name), f"{row.mean_s:.4g}", str(row.calls), f"{row.total_s:.4g}", f"{100 * row.share:.1f}")
        table.add_section()
        total, calls = sum(row.total_s for row in rows), sum(row.calls for row in rows)
        table.add_row("Total", "", str(calls), f"{total:.4g}", "100.0" if total else "0.0", style="bold")
        return table

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as JSON values, for a report."""
        return [asdict(row) for row in self.rows()]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]], enabled: bool = True) -> Self:
        """Return the object that `to_json` was called on, as far as times go."""
        stages = cls(enabled)
        stages._times = {str(row["name"]): (float(row["total_s"]), int(row["calls"])) for row in rows}
        return stages


class _Display:
    """What one `track` shows on stderr; looked at only when `advance` is called."""

    def __init__(self, total: int, description: str) -> None:
        self.total, self.description, self.done = total, description, 0
        self.start = self.last_line = time.perf_counter()
        self.console: Console | None = None
        self.bar: Progress | None = None

    def advance(self, n: int) -> None:
        """Count `n` more, and show it if it is time to."""
        self.done += n
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
        elif now - self.start >= _SHOW_AFTER_S:
            # Made late, so that short operations cost nothing and a redirected stderr is honoured.
            self.console = self.console or Console(stderr=True)
            if self.console.is_terminal:
                self._open_bar(self.console)
            elif now - self.last_line >= _PLAIN_EVERY_S:
                self.last_line = now
                self._print_line(now - self.start)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()

    def _open_bar(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # stdout is for data: rich must not lead it through the terminal's stderr.
        self.bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, get_time=time.perf_counter)
        task = self.bar.add_task(self.description, total=self.total)
        self.bar.tasks[0].start_time = self.start  # the operation is older than its bar
        self.bar.update(task, completed=self.done)
        self.bar.start()

    def _print_line(self, elapsed: float) -> None:
        left = elapsed * (self.total - self.done) / self.done if 0 < self.done <= self.total else 0.0
        sys.stderr.write(f"{self.description}: {self.done}/{self.total}, {elapsed:.0f} s so far, about {left:.0f} s left\n")
        sys.stderr.flush()
