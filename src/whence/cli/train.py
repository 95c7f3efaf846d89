"""The verb train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from whence.cli import output
from whence.cli.opening import Flat
from whence.cli.options import DataOptions, TrainOptions
from whence.cli.values import Switch, Whole


def train(
    recipe: Annotated[Literal["glue", "stdlib", "swag", "wikitext"], Parameter(name="recipe")],
    /,
    *,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    training: Annotated[TrainOptions, Flat] = TrainOptions(),  # noqa: B008
    snapshots: Whole = 4,
    overwrite: Switch = False,
    json: Switch = False,
) -> None:
    """Train a recipe's model with the Hugging Face Trainer and save it in --checkpoint-dir.

    Args:
        recipe: glue, stdlib, swag or wikitext.
        snapshots: States in the midst of training to keep, for scores over a whole run.
        overwrite: Replace a model that is in the folder, or an unfinished training of something else.
        json: Print the data as JSON.
    """
    from whence.recipes.families import FAMILIES
    from whence.recipes.finetune import train_recipe
    from whence.recipes.quality import quality
    from whence.runtime.progress import Stages

    stages, folder = Stages(), data.checkpoint_dir or Path("checkpoints") / recipe
    found = train_recipe(
        FAMILIES[recipe],
        folder,
        data=data.settings(),
        training=training.settings(),
        snapshots=snapshots,
        overwrite=overwrite,
        stages=stages,
    )
    values = {"recipe": found.name, "checkpoint_dir": str(folder), "train": len(found.train), **quality(found, stages=stages)}
    output.data(output.facts(values), values, as_json=json)
    output.stage_table(stages)
