"""Training the model of a checkpoint folder again on other rows."""

from __future__ import annotations

import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
from finetuned import Checkpoint, measured, opened, procedure_of
from whence.evaluate.retrain import RetrainSpec, retrain, retrain_all
from whence.recipes.settings import TrainingSettings

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
NAMES = ["sst2", "swag", "wikitext"]
SEED = TrainingSettings().seed


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
