"""The verb train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from whence.cli import output
from whence.cli.opening import Flat
from whence.cli.options import DataOptions, TrainOptions
from whence.cli.values import Count, Switch, Whole


def train(
    recipe: Annotated[Literal["cot", "glue", "instruct", "stdlib", "swag", "wikitext"], Parameter(name="recipe")],
    /,
    *,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    training: Annotated[TrainOptions, Flat] = TrainOptions(),  # noqa: B008
    snapshots: Whole = 4,
    runs: Count | None = None,
    overwrite: Switch = False,
    json: Switch = False,
) -> None:
    """Train a recipe's model with the Hugging Face Trainer and save it in --checkpoint-dir.

    Args:
        recipe: cot, glue, instruct, stdlib, swag or wikitext.
        snapshots: States in the midst of training to keep, for scores over a whole run.
        runs: Train that many models into run-0, run-1, ... of --checkpoint-dir, each with a seed one higher.
        overwrite: Replace a model that is in the folder, or an unfinished training of something else.
        json: Print the data as JSON.
    """
    from whence.recipes.families import FAMILIES
    from whence.recipes.finetune import train_recipe
    from whence.recipes.quality import quality
    from whence.recipes.runs import run_folder, train_runs
    from whence.runtime.progress import Stages

    stages, folder, family = Stages(), data.checkpoint_dir or Path("checkpoints") / recipe, FAMILIES[recipe]
    settings: dict[str, Any] = {"data": data.settings(), "training": training.settings()}
    options: dict[str, Any] = {"snapshots": snapshots, "overwrite": overwrite, "stages": stages}
    if runs is None:
        trained = {folder: train_recipe(family, folder, **settings, **options)}
    else:
        found = train_runs(family, folder, runs, **settings, **options)
        trained = {run_folder(folder, number): one for number, one in enumerate(found)}
    said = [
        {"recipe": one.name, "checkpoint_dir": str(place), "train": len(one.train), **quality(one, stages=stages)}
        for place, one in trained.items()
    ]
    lines = [line for values in said for line in output.facts(values)]
    output.data(lines, said[0] if runs is None else {"checkpoint_dir": str(folder), "runs": said}, as_json=json)
    output.stage_table(stages)
