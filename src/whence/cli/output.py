"""Where the command line writes: data on standard output; messages, stages and coverage on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.table import Table

    from whence.attributor import Attributor
    from whence.runtime.progress import Stages

WIDTH = 110


def message(text: str) -> None:
    """Write one message to standard error."""
    print(text, file=sys.stderr, flush=True)


def data(lines: list[str], value: dict[str, Any], *, as_json: bool, keep: Path | None = None) -> None:
    """Write the result to standard output: `lines` for people, or `value` as one JSON object; `keep`: the latter also into a file."""
    if keep is not None:
        from whence.storage.run import explain_write_errors, write_json_atomic

        with explain_write_errors(keep):
            keep.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(keep, json.loads(json.dumps(value, default=str)))
    if as_json:
        print(json.dumps(value, indent=2, allow_nan=False, default=str))
    else:
        print("\n".join(lines))


def facts(values: dict[str, Any]) -> list[str]:
    """Return aligned `name  value` lines."""
    width = max(map(len, values))
    return [f"{name.replace('_', ' '):<{width}}  {value}" for name, value in values.items()]


def coverage_facts(attributor: Attributor) -> dict[str, Any]:
    """Return what share of the parameters is attributed, and which layers are left out and why."""
    coverage = attributor.coverage
    left_out = [{"layer": name, "reason": reason} for name, reason in coverage.left_out]
    return {"share": coverage.share, "tracked": list(coverage.tracked), "left_out": left_out}


def stage_table(stages: Stages) -> None:
    """Write the table of stages to standard error."""
    from rich.console import Console

    Console(stderr=True).print(stages.table())


def closing(attributor: Attributor) -> None:
    """Write the table of stages and the coverage to standard error; every verb that computes ends with them."""
    stage_table(attributor.stages)
    message(str(attributor.coverage))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in (headings, *rows)) for place in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def rendered(table: Table) -> list[str]:
    """Return the lines of a rich table."""
    import io

    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]
