"""The verb index: one library call, and the printing of what it returns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe
from whence.cli.options import DataOptions, IndexOptions, KeepOptions, Strategy, WeightOptions
from whence.cli.values import parse_damping, parse_response


def index(
    recipe: RecipeName,
    /,
    *,
    rows: Annotated[IndexOptions, Flat] = IndexOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    strategy: Strategy = "ekfac",
    weight: Annotated[WeightOptions, Flat] = WeightOptions(),  # noqa: B008
    name: str | None = None,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Keep a small row of every training example, so that new queries need no pass over the training data.

    Args:
        strategy: Form of the curvature; it must be fitted, except identity, which needs no fit.
        name: Folder of the index in the run folder. Default: the strategy's name.
    """
    from whence.scores.request import check_name

    check_name(name)
    damping, response = parse_damping(weight.damping), parse_response(weight.response)
    attributor, found = open_recipe(recipe, run, data)
    made = attributor.index(
        found.train,
        **vars(rows),
        strategy=strategy,
        damping=damping,
        response=response,
        batch_size=run.batch_size,
        name=name,
        overwrite=run.overwrite,
    )
    values = {"recipe": found.name, "index": str(made.folder), "rows": len(made), "bytes_per_row": round(made.row_bytes)}
    values |= {name: value for name, value in made.settings["rows"].items() if value is not None}
    near = made.fidelity
    shown = values if near is None else {**values, "fidelity": str(near)}
    output.data(output.facts(shown), {**values, "fidelity": near and asdict(near)}, as_json=run.json)
    output.closing(attributor)
