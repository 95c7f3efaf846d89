"""The verb plan: one library call, and the printing of what it returns."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe
from whence.cli.options import DataOptions, FitOptions, MatrixOptions, ResponseOptions, RunOptions
from whence.cli.values import parse_response
from whence.errors import ConfigError


def plan(
    recipe: RecipeName,
    /,
    *,
    fitting: Annotated[FitOptions, Flat] = FitOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    scoring: Annotated[MatrixOptions, Flat] = MatrixOptions(),  # noqa: B008
    responding: Annotated[ResponseOptions, Flat] = ResponseOptions(),  # noqa: B008
    on: Literal["loss", "measurement"] = "loss",
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Predict what fit, score and self will cost for a recipe: work, time, memory, disk. Some seconds; nothing is written.

    Args:
        on: What self-influence is about.
    """
    if scoring.solver != "direct":
        raise ConfigError(f"--solver {scoring.solver} is not planned yet; the plan is of the fitted curvature. Leave --solver out.")
    if scoring.over_run:
        raise ConfigError("--over-run is not planned yet: it costs what one set of scores does, times the snapshots. Leave --over-run out.")
    response = parse_response(responding.response)
    attributor, found = open_recipe(recipe, run, data)
    asked = {name: value for name, value in vars(scoring).items() if name not in ("solver", "over_run", "query_rows", "train_rows")}
    made = attributor.plan(
        _some(found.train, scoring.train_rows, "training"),
        _some(found.queries, scoring.query_rows, "query") if len(found.queries) else None,
        response=response,
        on=on,
        batch_size=run.batch_size,
        **vars(fitting),
        **asked,
    )
    values = {"recipe": found.name, **made.to_json(), "coverage": output.coverage_facts(attributor)}
    output.data([*output.rendered(made.table()), *made.lines()], values, as_json=run.json)
    output.message(str(attributor.coverage))


def _some(rows: Any, chosen: list[int] | None, what: str) -> Any:
    """Return the chosen rows of a data set."""
    if chosen is None:
        return rows
    from torch.utils.data import Subset

    from whence.runtime.batches import check_rows

    return Subset(rows, check_rows(chosen, len(rows), f"{what} rows"))
