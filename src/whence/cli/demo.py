"""The verb demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from whence.cli import output
from whence.cli.values import Switch, Whole


def demo(
    name: Annotated[Literal["digits"], Parameter(name="recipe")] = "digits",
    /,
    *,
    out: Path = Path("runs/demo"),
    seed: Whole = 0,
    json: Switch = False,
) -> None:
    """Train a small network on handwritten digits with some wrong labels, find them, and write a report page.

    Args:
        name: The demo. There is one, on data that scikit-learn ships.
        out: Folder for the run and its report.html.
        seed: Seed of everything random.
        json: Print the data as JSON.
    """
    from whence.demo import run_demo

    result = run_demo(out=out, seed=seed)
    output.data(str(result).splitlines(), result.to_json(), as_json=json)
