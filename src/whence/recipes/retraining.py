"""A fine-tune as a procedure that can be run again on other rows, in other processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.pretrained.kinds import need
from whence.recipes.family import Family
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings, TrainingSettings, to_json
from whence.recipes.splits import collate_of, read_splits, task_of
from whence.recipes.start import load_start
from whence.recipes.training import measure, train_model
from whence.storage.run import fingerprint_rows, read_json, sha256_file
from whence.tasks import Task

START = "start"
"""Folder of the untrained model in a checkpoint folder."""
_WITHOUT_EFFECT = ("model", "preset", "dropout", "seed", "eval_batch_size")  # the saved start and the job's seed stand for them
VERSION = 1
"""Raise it whenever the same settings give other numbers: retrains that are kept on disk are found by it."""


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """A fine-tune as a procedure for `whence.evaluate.retrain`: the same start, other rows, queries measured.

    Attributes:
        family: the recipe.
        folder: the checkpoint folder.
        data, training: of the fine-tune.
        key: everything the numbers depend on.
    """

    family: Family
    folder: str
    data: DataSettings
    training: TrainingSettings
    key: str

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        """Train from the saved start on these training rows; return the measurements `[query]`."""
        prepared = _prepared(self)
        model = load_start(self.family, Path(self.folder) / START)
        train_model(model, [prepared.train[row] for row in rows], prepared.collate, self.training, seed=seed)
        return measure(model, prepared.task, prepared.queries, prepared.collate, int(self.training.eval_batch_size or 1))


def retraining(
    family: Family, folder: Path, data: DataSettings, training: TrainingSettings, train: list[Row], queries: list[Row]
) -> Retraining:
    """Return the procedure that trains the model of a checkpoint folder again; rows are encoded."""
    usual = to_json(TrainingSettings())
    parts = {
        "recipe": family.name,
        "version": VERSION,
        "start": sha256_file(folder / START / "model.safetensors"),
        "config": _config(folder / START),
        "train": fingerprint_rows(train),
        "queries": fingerprint_rows(queries),
        "measurement": data.measurement,
        # What is as it always was is not named, so that a new setting does not make old retrains unknown.
        "training": {name: value for name, value in to_json(training).items() if value != usual[name] and name not in _WITHOUT_EFFECT},
        "torch": torch.__version__,
        "transformers": need("transformers").__version__,
    }
    key = json.dumps(parts, sort_keys=True)
    return Retraining(family=family, folder=str(folder.resolve()), data=data, training=training, key=key)


def _config(start: Path) -> str:
    """Return a digest of the untrained model's configuration: dropout stands there, not in the weights."""
    config = {
        name: value for name, value in read_json(start / "config.json").items() if name not in ("transformers_version", "_name_or_path")
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    task: Task
    collate: Callable[[list[Any]], Any]
    train: list[Row]
    queries: list[Row]


@lru_cache(maxsize=1)
def _prepared(procedure: Retraining) -> _Prepared:
    # A worker reads and tokenises once, not for every job.
    family, start = procedure.family, Path(procedure.folder) / START
    tokenizer = need("transformers").AutoTokenizer.from_pretrained(start)
    model = load_start(family, start)
    train, queries = read_splits(family, procedure.data, tokenizer, model.config, procedure.training.seed)
    collate = collate_of(family, model, tokenizer)
    return _Prepared(task=task_of(family, procedure.data), collate=collate, train=train.encoded, queries=queries.encoded)
