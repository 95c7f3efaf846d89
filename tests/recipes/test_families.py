"""What the recipes of Hugging Face models have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetuned
from whence.errors import ConfigError
from whence.recipes.base import Recipe, load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.settings import DataSettings, TrainingSettings

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["sst2", "swag", "wikitext", "alpaca", "commonsense"])
def test_the_shown_text_has_no_padding(checkpoint: Callable[[str], Path], name: str) -> None:
    recipe: Recipe = load_recipe(finetuned.SETTINGS[name][0], checkpoint_dir=checkpoint(name))
    assert recipe.describe is not None
    for row in [*recipe.train, *recipe.queries]:
        text = recipe.describe(row)
        assert text.strip()
        for token in ("[PAD]", "<pad>", "<|endoftext|>", "[CLS]", "<s>"):
            assert token not in text


@pytest.mark.parametrize("name", ["sst2", "swag", "wikitext", "alpaca", "commonsense"])
def test_fewer_queries_are_the_first_ones(checkpoint: Callable[[str], Path], name: str) -> None:
    recipe, folder = finetuned.SETTINGS[name][0], checkpoint(name)
    every, some = load_recipe(recipe, checkpoint_dir=folder), load_recipe(recipe, checkpoint_dir=folder, max_query_rows=3)
    assert some.queries == every.queries[:3]
    assert some.train == every.train


@pytest.mark.parametrize(("recipe", "task", "longest"), [("glue", "sst2", 16), ("swag", "swag", 16)])
def test_rows_longer_than_the_model_are_refused(data: Path, tmp_path: Path, recipe: str, task: str, longest: int) -> None:
    """Instead of an index error from within the model."""
    name = {"sst2": "sst2", "swag": "swag"}[task]
    finetuned.trained(name, data, tmp_path / "model", settings={"max_length": longest, "flip": None})
    with pytest.raises(
        ConfigError, match=rf"max_length=17: the model reads {longest} tokens at most\. Give --max-length {longest} or less\."
    ):
        load_recipe(recipe, checkpoint_dir=tmp_path / "model", max_length=17)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_every_setting_is_filled_in(recipe: str) -> None:
    family = FAMILIES[recipe]
    data = family.settled(DataSettings())
    assert None not in (data.task, data.columns if recipe not in ("swag", "instruct", "cot") else (), data.max_length, data.measurement)
    for preset in (None, "tiny", "mini", "small"):
        training = TrainingSettings(preset=preset).over(family.defaults(data, preset))  # type: ignore[arg-type]
        assert (training.model is None) == (preset is not None or family.start is not None)
        needed = ("learning_rate", "weight_decay", "num_train_epochs", "train_batch_size", "eval_batch_size")
        assert all(getattr(training, name) is not None for name in needed)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DataSettings, {"max_length": 0}, r"max_length=0 cannot be used; give a whole number of 1 or more\."),
        (DataSettings, {"max_train_rows": True}, r"max_train_rows=True cannot be used"),
        (DataSettings, {"max_query_rows": 2.5}, r"max_query_rows=2\.5 cannot be used"),
        (DataSettings, {"flip": 1.0}, r"flip=1\.0 is no share of the labels; give a number from 0 to below 1\."),
        (DataSettings, {"columns": ("a", "b", "c")}, r"columns=.*: give one or two columns of text, as a list\."),
        (DataSettings, {"columns": "ab"}, r"columns='ab': give one or two columns of text, as a list\."),
        (TrainingSettings, {"model": "m", "preset": "tiny"}, r"model='m' and preset='tiny' are two starts; give one\."),
        (TrainingSettings, {"learning_rate": 0}, r"learning_rate=0 cannot be used; give a positive number\."),
        (TrainingSettings, {"num_train_epochs": float("nan")}, r"num_train_epochs=nan cannot be used; give a positive number\."),
        (TrainingSettings, {"weight_decay": -0.1}, r"weight_decay=-0\.1 cannot be used; give a number from 0\."),
        (TrainingSettings, {"dropout": 1.0}, r"dropout=1\.0 cannot be used; give a number from 0 to below 1\."),
        (TrainingSettings, {"warmup_ratio": 1.5}, r"warmup_ratio=1\.5 cannot be used; give a number from 0 to below 1\."),
    ],
)
def test_settings_that_cannot_be_used(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)
