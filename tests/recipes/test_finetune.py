"""Training a recipe's model, opening it again, and training it again on other rows."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import finetuned
import whence
from whence.errors import ConfigError, DataError
from whence.evaluate.retrain import RetrainSpec, retrain, retrain_all
from whence.recipes.base import Recipe, load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.retraining import Retraining
from whence.recipes.settings import DataSettings, TrainingSettings
from whence.recipes.training import measure, segments

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
Checkpoint = Callable[[str], Path]
NAMES = ["sst2", "swag", "wikitext"]
SEED = TrainingSettings().seed


def opened(name: str, folder: Path, **options: Any) -> Recipe:
    return load_recipe(finetuned.SETTINGS[name][0], checkpoint_dir=folder, **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def measured(recipe: Recipe) -> Tensor:
    assert recipe.collate is not None
    return measure(recipe.model, recipe.task, recipe.queries, recipe.collate, 32)


def procedure_of(recipe: Recipe) -> Retraining:
    assert isinstance(recipe.retraining, Retraining)
    return recipe.retraining


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


# ----------------------------------------------------------------- what scores need to know of the run


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


# ------------------------------------------------------------------------------------------ settings


def test_the_share_of_flipped_labels_is_exact_and_found_again(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    raw = finetuned.rows_of("glue_sst2", "train")
    recipe = opened("sst2", checkpoint("sst2"))
    assert recipe.flipped is not None
    assert recipe.flipped.dtype == torch.bool
    assert recipe.flipped.sum() == round(0.25 * len(raw))
    assert recipe.raw is not None
    for row, was, first, flipped in zip(recipe.train, raw, recipe.raw, recipe.flipped.tolist(), strict=True):
        assert (row["labels"] != was["label"]) is flipped
        assert first == {**was, "label": row["labels"]}
    assert torch.equal(recipe.flipped, opened("sst2", checkpoint("sst2")).flipped)  # type: ignore[arg-type]
    other = finetuned.trained("sst2", data, tmp_path / "other", seed=SEED + 1)
    assert other.flipped is not None
    assert not torch.equal(recipe.flipped, other.flipped)
    assert opened("swag", checkpoint("swag")).flipped is None


def test_labels_of_a_choice_can_be_flipped(data: Path, tmp_path: Path) -> None:
    recipe = finetuned.trained("swag", data, tmp_path / "model", settings={"flip": 0.25})
    assert recipe.flipped is not None
    assert recipe.flipped.sum() == 6
    was = [row["label"] for row in finetuned.rows_of("swag", "train")]
    assert [row["labels"] != label for row, label in zip(recipe.train, was, strict=True)] == recipe.flipped.tolist()


def test_settings_are_kept_and_may_be_replaced(checkpoint: Checkpoint) -> None:
    folder = checkpoint("sst2")
    usual = opened("sst2", folder)
    assert usual.task.measure == "margin"  # type: ignore[attr-defined]
    loss = opened("sst2", folder, measurement="loss")
    assert loss.task.measure == "loss"  # type: ignore[attr-defined]
    assert procedure_of(loss).key != procedure_of(usual).key
    assert loss.train == usual.train
    assert len(opened("sst2", folder, max_train_rows=10).train) == 10
    with pytest.raises(ConfigError, match=r"flip=0.0: .* was trained with flip=0.25"):
        opened("sst2", folder, flip=0.0)
    shorter = opened("sst2", folder, max_length=6)
    assert max(len(row["input_ids"]) for row in shorter.train) == 6


def test_the_data_is_found_from_another_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    finetuned.trained("rte", ".", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert len(opened("rte", tmp_path / "model").train) == finetuned.TRAIN
    monkeypatch.setenv("WHENCE_DATA", str(data))
    by_variable = train_recipe(
        FAMILIES["glue"],
        "relative",
        data=DataSettings(task="rte", max_length=32),
        training=TrainingSettings(preset="tiny", num_train_epochs=1, train_batch_size=8),
    )
    assert differing(weights(tmp_path / "model"), weights(tmp_path / "relative")) == set()
    assert procedure_of(by_variable).key == procedure_of(opened("rte", tmp_path / "model")).key


def test_a_start_from_a_pretrained_model(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    """A body that was trained on something else, with a new head."""
    options: dict[str, Any] = {"preset": None, "model": str(checkpoint("sst2")), "learning_rate": 1e-4, "dropout": 0.0}
    recipe = finetuned.trained("stsb", data, tmp_path / "model", settings={"max_length": 16}, **options)
    body, start = weights(checkpoint("sst2")), weights(tmp_path / "model" / "start")
    assert start["classifier.weight"].shape[0] == 1
    assert all(torch.equal(body[name], start[name]) for name in body if not name.startswith("classifier"))
    assert torch.isfinite(measured(recipe)).all()
    assert json.loads((tmp_path / "model" / "whence.json").read_text(encoding="utf-8"))["training"]["learning_rate"] == 1e-4


def test_a_model_that_is_not_there(data: Path, tmp_path: Path) -> None:
    message = (
        r"^the model '.*nowhere' cannot be loaded: .*Give --model FOLDER_OR_NAME of a pretrained model, check the network, or start from"
    )
    with pytest.raises(ConfigError, match=message):
        finetuned.trained("sst2", data, tmp_path / "model", preset=None, model=str(tmp_path / "nowhere"))
    assert not (tmp_path / "model").exists()


def test_rows_that_cannot_be_used_are_no_fault_of_the_model(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 0 has no 'words'; it has the columns sentence, label, idx"):
        finetuned.trained(
            "sst2", data, tmp_path / "m", settings={"columns": ("words",), "flip": None}, preset=None, model=str(checkpoint("sst2"))
        )


def test_a_schedule_that_the_trainer_does_not_know(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lr_scheduler_type='straight' .*linear"):
        finetuned.trained("sst2", data, tmp_path / "model", lr_scheduler_type="straight")


# ------------------------------------------------------------------------------------------- folders


def test_a_training_that_did_not_end(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sst2"), folder)
    (folder / "whence.json").unlink()
    with pytest.raises(ConfigError, match=r"model is of a training that did not end\. Train again: whence train glue --overwrite"):
        opened("sst2", folder)


def test_an_interruption_leaves_no_model_that_opens(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    finetuned.trained("rte", data, tmp_path / "model")
    monkeypatch.setattr("whence.recipes.finetune.train_model", interrupted)
    settings = {"data": DataSettings(task="rte", data=str(data)), "training": TrainingSettings(preset="tiny")}
    with pytest.raises(KeyboardInterrupt):
        train_recipe(FAMILIES["glue"], tmp_path / "model", overwrite=True, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did not end"):
        opened("rte", tmp_path / "model")


def test_a_folder_that_holds_something(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sst2 is not empty\. Give a new folder as --checkpoint-dir, or --overwrite to replace"):
        finetuned.trained("sst2", data, checkpoint("sst2"))
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file is not empty"):
        finetuned.trained("sst2", data, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    finetuned.trained("rte", data, tmp_path / "empty")
    before = weights(tmp_path / "empty")
    again = train_recipe(
        FAMILIES["glue"],
        tmp_path / "empty",
        data=DataSettings(task="rte", data=str(data), max_length=32),
        training=TrainingSettings(preset="tiny", num_train_epochs=1, seed=3),
        overwrite=True,
    )
    assert differing(before, weights(tmp_path / "empty"))
    assert torch.isfinite(measured(again)).all()


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("sst2", "glue_sst2/train.jsonl", '"label": 1', '"label": 0'),
        ("swag", "swag/train.jsonl", "indeed", "surely"),
        ("wikitext", "wikitext2/train.txt", "film", "movie"),
    ],
)
def test_training_rows_that_were_edited_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str, old: str, new: str
) -> None:
    data, folder = finetuned.write_data(tmp_path / "data"), tmp_path / "model"
    before = procedure_of(finetuned.trained(name, data, folder)).key
    edit(data / file, old, new)
    message = (
        r"the training rows of .*data are not those that .*model was trained on: they were changed since\. Restore them, or train again"
    )
    with pytest.raises(DataError, match=message):
        opened(name, folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="changed since"):
        opened(name, folder, data="data")
    if name == "sst2":  # other rows than those of the training may be asked for, as ever
        assert len(opened(name, folder, max_train_rows=10).train) == 10
    edit(folder / "whence.json", "train_fingerprint", "of_an_older_version")
    assert procedure_of(opened(name, folder)).key != before
    finetuned.write_data(data)
    edit(folder / "whence.json", "of_an_older_version", "train_fingerprint")
    assert procedure_of(opened(name, folder)).key == before


def test_other_columns_and_queries_may_change(tmp_path: Path) -> None:
    data, folder = finetuned.write_data(tmp_path / "data"), tmp_path / "model"
    finetuned.trained("sst2", data, folder)
    edit(data / "glue_sst2" / "train.jsonl", '"idx": 3', '"idx": 30')
    edit(data / "glue_sst2" / "validation.jsonl", "film", "movie")
    assert "movie" in "".join(row["text"] for row in opened("sst2", folder).queries)


def test_a_model_of_another_recipe(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"swag was trained by the recipe 'swag', not 'glue'\. Name that recipe\."):
        load_recipe("glue", checkpoint_dir=checkpoint("swag"))


def test_no_folder() -> None:
    message = r"the recipe swag needs a trained model: give --checkpoint-dir DIR\. whence train swag --checkpoint-dir DIR makes one\."
    with pytest.raises(ConfigError, match=message):
        load_recipe("swag")
    with pytest.raises(ConfigError, match=r"there is no folder 'nowhere'"):
        load_recipe("swag", checkpoint_dir=Path("nowhere"))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_ones_own(checkpoint: Checkpoint, data: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(name), folder, ignore=shutil.ignore_patterns("whence.json", "start", "snapshots", "second_moments*"))
    options = {**finetuned.SETTINGS[name][1], "data": str(data), "flip": None}
    recipe = opened(name, folder, **options)
    assert torch.equal(measured(recipe), measured(opened(name, checkpoint(name))))
    assert recipe.retraining is None
    assert recipe.second_moments is None
    assert recipe.training_time is None
    assert list(recipe.snapshots) == []
    assert recipe.raw is not None


# ---------------------------------------------------------------------------------------- retraining


@pytest.mark.parametrize("name", NAMES)
def test_retraining_on_all_rows_gives_the_trained_model(checkpoint: Checkpoint, name: str) -> None:
    """To the last bit, dropout included: the same start, rows, order and noise."""
    recipe = opened(name, checkpoint(name))
    procedure = procedure_of(recipe)
    every = list(range(len(recipe.train)))
    assert torch.equal(procedure(every, SEED), measured(recipe))
    other = procedure(every, SEED + 1)
    assert other.shape == (len(recipe.queries),)
    assert not torch.equal(other, measured(recipe))


def test_retraining_on_some_rows(checkpoint: Checkpoint) -> None:
    recipe = opened("sst2", checkpoint("sst2"))
    procedure = procedure_of(recipe)
    some = procedure([0, 3, 5], 1)
    assert torch.equal(some, procedure([0, 3, 5], 1)), "the same job twice"
    assert not torch.equal(some, procedure([0, 3, 6], 1))


def test_retraining_measures_what_is_asked(checkpoint: Checkpoint) -> None:
    recipe = opened("sst2", checkpoint("sst2"), measurement="loss", max_query_rows=3)
    every = list(range(len(recipe.train)))
    assert torch.equal(procedure_of(recipe)(every, SEED), measured(recipe))


def test_a_procedure_can_be_sent(checkpoint: Checkpoint) -> None:
    procedure = procedure_of(opened("wikitext", checkpoint("wikitext")))
    sent = bytes(ForkingPickler.dumps(procedure))
    assert len(sent) < 10_000, "rows and weights stay on disk"
    received = ForkingPickler.loads(sent)
    assert received == procedure
    assert received.key == procedure.key
    assert torch.equal(received([0, 1], 3), procedure([0, 1], 3))


def test_opening_reads_no_start_and_makes_no_key(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`whence top` and `plan` never train again: the untrained model is read when its key is asked for."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sst2"), folder)
    start = folder / "start" / "model.safetensors"
    start.rename(tmp_path / "away")
    procedure = procedure_of(opened("sst2", folder))
    (tmp_path / "away").rename(start)
    assert procedure.key == procedure_of(opened("sst2", checkpoint("sst2"))).key


@pytest.mark.slow
def test_jobs_run_in_another_process(checkpoint: Checkpoint, tmp_path: Path) -> None:
    procedure = procedure_of(opened("rte", checkpoint("rte")))
    specs = [RetrainSpec(key=procedure.key, rows=rows, seed=2) for rows in ((0, 1, 2, 3), (4, 5, 6))]
    here = [retrain(procedure, spec) for spec in specs]
    there = retrain_all(procedure, specs, folder=tmp_path, n_jobs=2)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_the_key_names_what_the_numbers_depend_on(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    def key(name: str, settings: dict[str, Any] | None = None, **training: Any) -> str:
        return procedure_of(finetuned.trained("rte", data, tmp_path / name, settings=settings, **training)).key

    usual = procedure_of(opened("rte", checkpoint("rte"))).key
    assert key("moved") == usual, "the folder does not matter"
    shutil.copytree(checkpoint("rte"), tmp_path / "copied")
    assert procedure_of(opened("rte", tmp_path / "copied")).key == usual
    changed = {
        "learning rate": key("a", learning_rate=1e-4),
        "epochs": key("b", num_train_epochs=2),
        "batch": key("c", train_batch_size=4),
        "schedule": key("d", lr_scheduler_type="constant"),
        "freeze": key("e", freeze=("*embeddings*",)),
        "dropout": key("f", dropout=0.0),
        "start": key("g", seed=SEED + 1),
        "rows": key("h", {"max_train_rows": 20}),
        "queries": key("i", {"max_query_rows": 5}),
        "flips": key("j", {"flip": 0.1}),
        "length": key("k", {"max_length": 8}),
        "measurement": key("l", {"measurement": "loss"}),
    }
    assert usual not in changed.values(), [name for name, other in changed.items() if other == usual]
    assert len(set(changed.values())) == len(changed)
    assert str(tmp_path) not in usual
