"""Training a recipe's model and opening it again: what is trained, kept and remembered."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import finetuned
import whence
from finetuned import Checkpoint, differing, measured, opened, procedure_of, weights
from whence.errors import ConfigError
from whence.evaluate.retrain import RetrainSpec, retrain
from whence.recipes.settings import TrainingSettings
from whence.recipes.training import segments

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
NAMES = ["sst2", "swag", "wikitext"]
SEED = TrainingSettings().seed


# ------------------------------------------------------------------------------ train and open again


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_opens_again(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint(name)
    recipe = opened(name, folder)
    assert recipe.name == f"{finetuned.SETTINGS[name][0]}-{folder.name}", "runs of two checkpoints must not share a folder"
    assert not recipe.model.training
    assert torch.isfinite(measured(recipe)).all()
    assert recipe.raw is not None
    assert len(recipe.raw) == len(recipe.train)
    if name == "sst2":
        assert recipe.classes is not None
        assert recipe.query_classes is not None
        assert recipe.classes.tolist() == [row["labels"] for row in recipe.train]
        assert recipe.query_classes.tolist() == [row["labels"] for row in recipe.queries]
        assert recipe.classes.dtype == torch.int64
    else:
        assert recipe.classes is None
    assert (checkpoint(name) / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_opens_the_folder(checkpoint: Checkpoint, name: str) -> None:
    recipe = opened(name, checkpoint(name))
    attributor = whence.Attributor.from_pretrained(checkpoint(name), task=recipe.task, progress=False, device="cpu")
    scores = attributor.scores(recipe.queries[:2], recipe.train[:5], strategy="identity").values
    own = whence.Attributor(recipe.model, recipe.task, collate=recipe.collate, progress=False, device="cpu")
    torch.testing.assert_close(scores, own.scores(recipe.queries[:2], recipe.train[:5], strategy="identity").values)


def test_training_changes_the_model_and_what_is_returned_is_what_is_saved(data: Path, tmp_path: Path) -> None:
    recipe = finetuned.trained("rte", data, tmp_path / "model")
    saved = weights(tmp_path / "model")
    assert differing(saved, weights(tmp_path / "model" / "start")) == set(saved), "every parameter is trained"
    assert differing(saved, {name: tensor.cpu() for name, tensor in recipe.model.state_dict().items() if name in saved}) == set()
    assert recipe.model.training is False
    assert all(parameter.grad is None for parameter in recipe.model.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_does_not(data: Path, tmp_path: Path, checkpoint: Checkpoint) -> None:
    first = weights(checkpoint("swag"))
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    finetuned.trained("swag", data, tmp_path / "again")
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert differing(first, weights(tmp_path / "again")) == set()
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert torch.equal(before[2], after[2])
    finetuned.trained("swag", data, tmp_path / "other", seed=SEED + 1)
    assert differing(weights(tmp_path / "again" / "start"), weights(tmp_path / "other" / "start"))
    assert differing(first, weights(tmp_path / "other"))


def test_several_devices_train_the_same(checkpoint: Checkpoint, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer multiplies the batch by the number of GPUs that it sees."""
    usual = checkpoint("rte")  # made before there are two
    arguments = pytest.importorskip("transformers").TrainingArguments
    found = arguments.__post_init__

    def see_two(self: Any) -> None:
        found(self)
        self._n_gpu = 2

    monkeypatch.setattr(arguments, "__post_init__", see_two)
    recipe = finetuned.trained("rte", data, tmp_path / "model")
    assert recipe.training_time == opened("rte", usual).training_time
    assert differing(weights(tmp_path / "model"), weights(usual)) == set()


def test_frozen_parameters_stay_and_are_not_tracked(data: Path, tmp_path: Path) -> None:
    frozen = finetuned.trained("sst2", data, tmp_path / "model", freeze=("*embeddings*", "bert.encoder.layer.0.*"))
    saved, start = weights(tmp_path / "model"), weights(tmp_path / "model" / "start")
    same = {name for name in saved if torch.equal(saved[name], start[name])}
    assert same == {name for name in saved if "embeddings" in name or "layer.0." in name}
    again = opened("sst2", tmp_path / "model")
    for recipe in (frozen, again):
        assert {name for name, p in recipe.model.named_parameters() if not p.requires_grad} == same
        attributor = whence.Attributor(recipe.model, recipe.task, collate=recipe.collate, layers="all", progress=False, device="cpu")
        attributor.scores(recipe.queries[:1], recipe.train[:2], strategy="identity")
        assert attributor.coverage.tracked
        assert not any("embeddings" in layer or "layer.0" in layer for layer in attributor.coverage.tracked)
    moments = safetensors.torch.load_file(tmp_path / "model" / "second_moments.safetensors")
    assert set(moments) == set(saved) - same
    spec = RetrainSpec(key=procedure_of(again).key, rows=tuple(range(len(again.train))), seed=SEED)
    assert torch.equal(retrain(procedure_of(again), spec), measured(again)), "retraining freezes the same"


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("*decoder*",), r"freeze='\*decoder\*' matches no parameter; they are named like bert\.embeddings\.word_embeddings\.weight, "),
        (("*",), r"freeze=\* leaves nothing to be trained\. Freeze fewer parameters\."),
    ],
)
def test_what_cannot_be_frozen(data: Path, tmp_path: Path, freeze: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetuned.trained("sst2", data, tmp_path / "model", freeze=freeze)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_nothing(data: Path, tmp_path: Path, name: str) -> None:
    usual = [module.p for module in finetuned.trained(name, data, tmp_path / "usual").model.modules() if isinstance(module, nn.Dropout)]
    assert max(usual) > 0, "a model that has dropout"
    recipe = finetuned.trained(name, data, tmp_path / "model", dropout=0.0)
    assert {module.p for module in recipe.model.modules() if isinstance(module, nn.Dropout)} == {0.0}
    # In train mode the model computes the same as in eval mode.
    assert recipe.collate is not None
    batch = recipe.collate(list(recipe.queries[:2]))
    with torch.no_grad():
        quiet, loud = recipe.model(**batch).logits, recipe.model.train()(**batch).logits
    assert torch.equal(quiet, loud)


# --------------------------------------------------------------- what scores need to know of the run


@pytest.mark.parametrize(("snapshots", "schedule"), [(1, "linear"), (2, "cosine"), (3, "constant"), (50, "linear")])
def test_times_of_snapshots_sum_to_the_whole(data: Path, tmp_path: Path, snapshots: int, schedule: str) -> None:
    recipe = finetuned.trained("sst2", data, tmp_path / "model", snapshots=snapshots, lr_scheduler_type=schedule, warmup_ratio=0.34)
    files, times = zip(*recipe.snapshots, strict=True)
    assert len(files) == min(snapshots, 3), "24 rows in batches of 8 are 3 steps"
    assert len(set(files)) == len(files), "every segment has a state of its own"
    assert recipe.training_time is not None
    assert sum(times) == pytest.approx(recipe.training_time, rel=1e-12)
    assert all(file.is_file() for file in files)
    if schedule == "constant":
        assert recipe.training_time == pytest.approx(3 * 5e-4)


def test_no_snapshots(data: Path, tmp_path: Path) -> None:
    recipe = finetuned.trained("sst2", data, tmp_path / "model", snapshots=0)
    assert list(recipe.snapshots) == []


@pytest.mark.parametrize(("steps", "count"), [(1, 4), (4, 4), (7, 4), (10, 4), (100, 6), (5, 2), (3, 1)])
def test_the_segments_of_a_run(steps: int, count: int) -> None:
    found = segments(steps, count)
    assert len(found) == min(steps, count)
    starts = [0, *(last for _, last in found[:-1])]
    assert all(start < middle <= last for start, (middle, last) in zip(starts, found, strict=True)), found
    assert found[-1][1] == steps
    lengths = [last - start for start, (_, last) in zip(starts, found, strict=True)]
    assert max(lengths) - min(lengths) <= 1


def test_snapshots_and_moments_are_taken_by_the_library(checkpoint: Checkpoint) -> None:
    recipe = opened("wikitext", checkpoint("wikitext"))
    assert recipe.second_moments is not None
    moments = safetensors.torch.load_file(recipe.second_moments)
    assert set(moments) == {name for name, _ in recipe.model.named_parameters()}
    assert all((moment >= 0).all() for moment in moments.values())
    options: dict[str, Any] = {"collate": recipe.collate, "layers": recipe.layer_sets["seed"], "progress": False, "device": "cpu"}
    rows = {"queries": recipe.queries[:2], "train": recipe.train[:4]}
    scaled = whence.Attributor(recipe.model, recipe.task, second_moments=moments, training_time=recipe.training_time, **options)
    plain = whence.Attributor(recipe.model, recipe.task, **options)
    values = [one.scores(**rows, strategy="identity").values for one in (scaled, plain)]
    assert torch.isfinite(values[0]).all()
    assert not torch.allclose(*values)
    files, times = zip(*recipe.snapshots, strict=True)
    several = whence.Checkpoints(recipe.model, recipe.task, list(files), **options)
    assert several.fit(recipe.train[:8], strategy="kfac").unrolled_scores(**rows, times=list(times)).values.shape == (2, 4)
