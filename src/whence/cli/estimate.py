"""The verbs estimate and select: one library call each, and the printing of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe
from whence.cli.options import DataOptions, KeepOptions, RetrainOptions
from whence.cli.options_refit import EstimateOptions, GradientOptions, SelectionOptions, SubsetOptions

if TYPE_CHECKING:
    from typing import Any

    from whence.attributor import Attributor
    from whence.evaluate.retrain import Running


def estimate(
    recipe: RecipeName,
    /,
    *,
    name: str | None = None,
    subsets: Annotated[SubsetOptions, Flat] = SubsetOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    estimating: Annotated[EstimateOptions, Flat] = EstimateOptions(),  # noqa: B008
    gradients: Annotated[GradientOptions, Flat] = GradientOptions(),  # noqa: B008
    retraining: Annotated[RetrainOptions, Flat] = RetrainOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Estimate how good fine-tunes on thousands of subsets of the training rows would be, from gradients and a few real fine-tunes.

    Gradients and real fine-tunes are kept in the run folder; interrupted, it continues. --overwrite measures gradients anew.

    Args:
        name: Folder of the estimates in RUN_DIR/estimates; what is there is replaced. Default: the method's name.
    """
    again = retraining.given(repeats=1)
    settings = estimating.settings(again.pop("repeats"))
    measuring, asked = gradients.settings(run), subsets.settings(run.seed)

    from whence.evidence import estimating as library
    from whence.scores.request import check_name

    check_name(name)
    attributor, found = open_recipe(recipe, run, data)
    made = library.estimate(
        attributor,
        found,
        gradients=measuring,
        subsets=asked,
        settings=settings,
        batch_size=run.batch_size,
        overwrite=run.overwrite,
        **_running(attributor, again),
    )
    folder = attributor.run.sub("estimates", name or estimating.method)
    made.save(folder)
    output.data(made.lines(), {"recipe": found.name, "estimates": str(folder), **made.to_json()}, as_json=run.json)
    output.message(f"every estimate: {folder / 'estimates.parquet'}; which groups each subset has: {folder / 'subsets.json'}")
    output.closing(attributor)


def select(
    recipe: RecipeName,
    /,
    *,
    out: Path,
    selecting: Annotated[SelectionOptions, Flat] = SelectionOptions(),  # noqa: B008
    gradients: Annotated[GradientOptions, Flat] = GradientOptions(),  # noqa: B008
    retraining: Annotated[RetrainOptions, Flat] = RetrainOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Write the training rows that estimates say are best to fine-tune on, with a record of why.

    The queries choose, so look at the result of a real fine-tune on rows that had no part in it. --overwrite replaces the data set;
    gradients and real fine-tunes are those of whence estimate with the same options.

    Args:
        out: Where to: NAME.parquet, NAME.jsonl, or a folder for a data set that datasets.load_from_disk reads.
    """
    again = retraining.given(repeats=1)
    settings = selecting.settings(again.pop("repeats"))
    measuring, how, constraints = gradients.settings(run), selecting.how(run.seed), selecting.constraints()

    from whence.evaluate.cleaned import check_out
    from whence.evidence.selecting import select_rows

    check_out(out, overwrite=run.overwrite)  # before a recipe that takes long to open
    attributor, found = open_recipe(recipe, run, data)
    made = select_rows(
        attributor,
        found,
        out=out,
        gradients=measuring,
        settings=settings,
        how=how,
        constraints=constraints,
        batch_size=run.batch_size,
        overwrite=run.overwrite,
        **_running(attributor, again),
    )
    output.data(made.lines(), {"recipe": found.name, **made.to_json()}, as_json=run.json)
    output.message(f"chosen rows: {made.written.path}; the others: {made.written.dropped}; how: {made.written.provenance}")
    output.closing(attributor)


def _running(attributor: Attributor, again: dict[str, Any]) -> Running:
    from whence.evidence.retraining import running_in

    return {**running_in(attributor), "n_jobs": again["n_jobs"], "backend": again["backend"]}
