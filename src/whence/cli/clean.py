"""The verb clean: one library call, and the printing of what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from whence.cli import output
from whence.cli.opening import Flat, RecipeName, open_recipe
from whence.cli.options import DataOptions, InverseOptions, KeepOptions, RetrainOptions
from whence.cli.values import Share, Switch, parse_damping, parse_response
from whence.errors import ConfigError


def clean(
    recipe: RecipeName,
    /,
    *,
    out: Path,
    drop: Literal["mislabeled", "harmful", "duplicates"] = "mislabeled",
    fraction: Share = 0.05,
    keep_share: Share = 0.5,
    scores: str | None = None,
    retrain: Switch = False,
    retraining: Annotated[RetrainOptions, Flat] = RetrainOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    inverse: Annotated[InverseOptions, Flat] = InverseOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Write a recipe's training data without the rows that do most harm, with a record of what went and why.

    Exact copies of a row go or stay together.

    Args:
        out: Where to: NAME.parquet, NAME.jsonl, or a folder for a data set that datasets.load_from_disk reads.
        drop: mislabeled: the highest self-influence. harmful: rows that raise the queries' measurements, summed over queries.
            duplicates: all exact copies of a row but the first, whatever --fraction and --keep-share.
        fraction: Share of the rows to drop.
        keep_share: Share of every class that is kept in any case.
        scores: Name of scores or self-influence in the run folder, if they were given one.
        retrain: Train again on what is left, and say what it bought against all rows and against random rows dropped.
    """
    if not retrain and retraining != RetrainOptions():
        raise ConfigError("--repeats, --jobs and --backend are for --retrain. Give it too, or leave them out.")
    again = retraining.given(repeats=3) if retrain else {}
    damping, response = parse_damping(inverse.damping), parse_response(inverse.response)

    from whence.evaluate.cleaned import check_out
    from whence.evidence.clean import clean_recipe

    check_out(out, overwrite=run.overwrite)  # before any long work
    attributor, found = open_recipe(recipe, run, data)
    result = clean_recipe(
        found,
        attributor,
        out=out,
        drop=drop,
        fraction=fraction,
        keep_share=keep_share,
        strategy=inverse.strategy or "ekfac",
        damping=damping,
        response=response,
        name=scores,
        batch_size=run.batch_size,
        overwrite=run.overwrite,
        **again,
    )
    output.data(result.lines(), {"recipe": found.name, "drop": drop, **result.to_json()}, as_json=run.json)
    output.message(f"rows that stay: {result.written.path}; those that went: {result.written.dropped}; how: {result.written.provenance}")
    output.closing(attributor)
