"""The numbers that people know: accuracy, perplexity, mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from whence.recipes import quality as module
from whence.recipes.base import Recipe, load_recipe
from whence.recipes.quality import quality, tokens_of

pytest.importorskip("transformers")
Checkpoint = Callable[[str], Path]


def opened(name: str, checkpoint: Checkpoint, **options: Any) -> Recipe:
    return load_recipe(finetuned.SETTINGS[name][0], checkpoint_dir=checkpoint(name), **options)


@torch.no_grad()
def output(recipe: Recipe) -> Any:
    assert recipe.collate is not None
    return recipe.model(**recipe.collate(list(recipe.queries)))


@pytest.mark.parametrize("name", ["sst2", "swag"])
def test_accuracy_and_loss_of_a_classifier(checkpoint: Checkpoint, name: str) -> None:
    recipe = opened(name, checkpoint)
    found, expected = quality(recipe), output(recipe)
    labels = torch.tensor([row["labels"] for row in recipe.queries])
    assert found["queries"] == finetuned.VALIDATION
    assert found["accuracy"] == pytest.approx(float((expected.logits.argmax(-1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(expected.loss), rel=1e-4)
    assert set(found) == {"queries", "loss", "accuracy"}


def test_accuracy_is_the_share_of_negative_margins(checkpoint: Checkpoint) -> None:
    recipe = opened("sst2", checkpoint)
    assert recipe.collate is not None
    with torch.no_grad():
        margins = recipe.task.measurement(recipe.model, recipe.collate(list(recipe.queries)))
    assert quality(recipe)["accuracy"] == pytest.approx(float((margins < 0).double().mean()))


def test_perplexity_of_a_language_model(checkpoint: Checkpoint) -> None:
    recipe = opened("wikitext", checkpoint)
    found = quality(recipe)
    # Blocks are of one length, so the mean over them is the mean over tokens, as transformers has it.
    assert found["loss"] == pytest.approx(float(output(recipe).loss), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert "accuracy" not in found


def test_a_regression_has_a_loss_alone(checkpoint: Checkpoint) -> None:
    recipe = opened("stsb", checkpoint)
    found = quality(recipe)
    assert set(found) == {"queries", "loss"}
    assert found["loss"] == pytest.approx(0.5 * float(output(recipe).loss), rel=1e-4), "half the squared error"


@pytest.mark.parametrize("name", ["sst2", "swag", "wikitext"])
def test_every_batch_goes_through_the_model_once(checkpoint: Checkpoint, name: str) -> None:
    recipe, calls = opened(name, checkpoint), []
    handle = recipe.model.register_forward_hook(lambda *_: calls.append(1))
    quality(recipe)
    handle.remove()
    assert len(calls) == 1, "all queries fit into one batch"


def test_batches_do_not_matter(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sst2", "wikitext"):
        recipe = opened(name, checkpoint)
        whole = quality(recipe)
        monkeypatch.setattr(module, "_BATCH", 3)
        assert quality(recipe) == pytest.approx(whole, rel=1e-5)
        monkeypatch.undo()


def test_a_model_is_measured_on_the_fast_device_and_goes_back(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = opened("sst2", checkpoint)
    home, places = next(recipe.model.parameters()).device, []
    monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(recipe.model, "to", lambda place: places.append(place) or recipe.model)
    quality(recipe)
    assert places == [torch.device("cpu"), home]


def test_tokens_are_those_that_are_predicted(checkpoint: Checkpoint) -> None:
    language = opened("wikitext", checkpoint)
    assert tokens_of(language, language.queries).tolist() == [15.0] * len(language.queries), "the first token of a block is given"
    choices = opened("swag", checkpoint)
    assert tokens_of(choices, choices.queries[:3]).tolist() == [1.0] * 3


def test_what_the_measurement_is_does_not_matter(checkpoint: Checkpoint) -> None:
    assert quality(opened("sst2", checkpoint, measurement="loss")) == pytest.approx(quality(opened("sst2", checkpoint)))
    assert quality(opened("wikitext", checkpoint, measurement="log_odds")) == pytest.approx(quality(opened("wikitext", checkpoint)))
