"""The verb demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from whence.cli import output
from whence.cli.values import Switch, Whole


def demo(
    name: Annotated[Literal["digits", "stdlib"], Parameter(name="recipe")] = "digits",
    /,
    *,
    out: Path | None = None,
    seed: Whole = 0,
    json: Switch = False,
) -> None:
    """Train a small model on data that is on this machine, explain it, and write a report page.

    digits, in a minute: find wrong labels among handwritten digits. stdlib, in minutes: train a language model on the
    functions of Python's standard library, let it talk, and show which functions it learned that from.

    Args:
        name: The demo: digits or stdlib (needs the extra hf).
        out: Folder for the run and its report.html. Default: runs/demo, or runs/stdlib.
        seed: Seed of everything random.
        json: Print the data as JSON.
    """
    result: Any
    if name == "digits":
        from whence.demo.digits import run_demo

        result = run_demo(out=out or Path("runs/demo"), seed=seed)
    else:
        from whence.demo.stdlib import StdlibSettings, run_stdlib_demo

        result = run_stdlib_demo(out=out or Path("runs/stdlib"), settings=StdlibSettings(seed=seed))
    output.data(str(result).split("\n"), result.to_json(), as_json=json)
