"""What evidence by training again asks of a recipe."""

from __future__ import annotations

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.evaluate.retrain import Procedure, Running
from whence.recipes.base import Recipe


def procedure_of(recipe: Recipe) -> Procedure:
    """Return what trains the recipe's model again.

    Raises:
        ConfigError: the recipe cannot be trained again.
    """
    if recipe.retraining is None:
        raise ConfigError(
            f"recipe {recipe.name} cannot be trained again: it has no retraining. Models of whence train have one; in a recipe of your own "
            "give retraining=..., a whence.evaluate.retrain.Procedure."
        )
    procedure: Procedure = recipe.retraining
    return procedure


def measure_of(recipe: Recipe) -> str | None:
    """Return the name of what is measured, such as `"margin"`; None for a task of one's own, of which nothing is known."""
    return getattr(recipe.task, "measure", None)


def running_in(attributor: Attributor) -> Running:
    """Return where trainings are kept and shown by default: in the run folder, and by the attributor's stages."""
    return {"folder": attributor.run.sub("retrain"), "stages": attributor.stages}
