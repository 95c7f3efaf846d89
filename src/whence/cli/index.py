"""The verb index: one library call, and the printing of what it returns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe, open_snapshots
from whence.cli.options import DataOptions, IndexOptions, KeepOptions, Strategy, WeightOptions
from whence.cli.values import Switch, parse_damping, parse_response
from whence.errors import ConfigError


def index(
    recipe: RecipeName,
    /,
    *,
    rows: Annotated[IndexOptions, Flat] = IndexOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    strategy: Strategy | None = None,
    weight: Annotated[WeightOptions, Flat] = WeightOptions(),  # noqa: B008
    name: str | None = None,
    over_run: Switch = False,
    faiss: Switch = False,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Keep a small row of every training example, so that new queries need no pass over the training data.

    Args:
        strategy: Form of the curvature; it must be fitted, except identity, which needs no fit. Default: ekfac; with --over-run identity.
        name: Folder of the index in the run folder. Default: the strategy's name.
        over_run: Keep a row at each snapshot of the training, beside each other; a curvature that is asked for is fitted at each.
        faiss: Also write an approximate index, for some millions of rows of a dense projection: a query then reads part of them.
    """
    from whence.evidence.over_run import index_over_run
    from whence.index.nearest import check_projection, require_faiss
    from whence.scores.request import check_name

    check_name(name)
    if faiss:
        if over_run:
            raise ConfigError("--faiss: an index of several checkpoints has no approximate one. Leave --faiss or --over-run out.")
        check_projection(rows.projection)
        require_faiss()
    damping, response = parse_damping(weight.damping), parse_response(weight.response)
    attributor, found = open_recipe(recipe, run, data)
    options: dict[str, Any] = {
        **vars(rows),
        "strategy": strategy or ("identity" if over_run else "ekfac"),
        "damping": damping,
        "response": response,
        "batch_size": run.batch_size,
        "name": name,
        "overwrite": run.overwrite,
    }
    if over_run:
        made = index_over_run(attributor, open_snapshots(found, run), found, **options)
    else:
        made = attributor.index(found.train, **options)
    if faiss:
        made.accelerate()
    values = {"recipe": found.name, "index": str(made.folder), "rows": len(made), "bytes_per_row": round(made.row_bytes)}
    values |= {"over_run": over_run, "faiss": faiss}
    values |= {name: value for name, value in made.settings["rows"].items() if value is not None}
    near = made.fidelity
    shown = values if near is None else {**values, "fidelity": str(near)}
    output.data(output.facts(shown), {**values, "fidelity": near and asdict(near)}, as_json=run.json)
    output.closing(attributor)
