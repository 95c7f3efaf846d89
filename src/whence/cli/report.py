"""The verb report: one library call, and the printing of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from whence.cli import output
from whence.cli.opening import RECIPE_HELP, Flat
from whence.cli.options import DataOptions
from whence.cli.values import Count, Numbers, Switch
from whence.errors import WhenceError

if TYPE_CHECKING:
    from whence.recipes.base import Recipe


def report(
    run_dir: Annotated[Path, Parameter(name="run-dir")],
    /,
    *,
    out: Path = Path("report.html"),
    recipe: Annotated[str | None, Parameter(help=f"Whose rows were scored: {RECIPE_HELP} Default: the one that run.json names.")] = None,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    query: Numbers | None = None,
    max_queries: Count = 200,
    k: Count = 10,
    json: Switch = False,
) -> None:
    """Write one HTML page about a run folder: which training rows made the model say what it says, and how the run was made.

    The page is a single file that asks for nothing from any network. Nothing is scored or trained again.

    Args:
        run_dir: Folder that whence score, self or an attributor wrote.
        out: The page.
        query: Queries on the page, for example 0,3,7. Default: the first ones.
        max_queries: Queries on the page at most; fewer where their rows would be more than some megabytes.
        k: Strongest rows on each side of a query.
        json: Print the data as JSON.
    """
    from whence.report.run import run_report
    from whence.report.run_scores import Shown

    found, notice = _opened(run_dir, recipe, data)
    made = run_report(run_dir, out, recipe=found, shown=Shown(k=k, most=max_queries, chosen=query), notice=notice)
    for line in made.notices:
        output.message(line)
    output.data([f"report: {made.path}"], made.to_json(), as_json=json)


def _opened(run_dir: Path, spec: str | None, data: DataOptions) -> tuple[Recipe | None, str | None]:
    """Return the recipe that is asked for, or else the one that the run folder names; if that fails, why there are no texts."""
    from whence.recipes.base import load_recipe
    from whence.report.reopen import reopened

    if spec is not None:
        return load_recipe(spec, **data.given()), None
    try:
        return reopened(run_dir, **data.given()), None
    except WhenceError as error:
        return None, f"Rows are shown by number alone: {str(error).rstrip('.')}. With texts: whence report RUN_DIR --recipe RECIPE"
