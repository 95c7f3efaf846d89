"""A fine-tune as a procedure that can be run again on other rows, in other processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError
from whence.pretrained.kinds import need
from whence.recipes.answers import option_losses
from whence.recipes.base import Options
from whence.recipes.family import Family
from whence.recipes.prompted import Prompted
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
        with_options: return, behind the measurements of the queries, the mean loss per token of every option of theirs.
        train, queries: rows as they were when the folder was opened, encoded; not sent to other processes.
    """

    family: Family
    folder: str
    data: DataSettings
    training: TrainingSettings
    with_options: bool = False
    train: Sequence[Row] = field(repr=False, compare=False)
    queries: Sequence[Row] = field(repr=False, compare=False)

    @cached_property
    def key(self) -> str:
        """Everything the numbers depend on. Made when it is first asked for, since it reads the whole start and all rows."""
        start, usual = Path(self.folder) / START, to_json(TrainingSettings())
        # What is as it always was is not named, so that a new setting does not make old retrains unknown.
        changed = {name: value for name, value in to_json(self.training).items() if value != usual[name] and name not in _WITHOUT_EFFECT}
        parts = {
            "recipe": self.family.name,
            "version": VERSION,
            "start": sha256_file(start / "model.safetensors"),
            "config": _config(start),
            "train": fingerprint_rows(self.train),
            "queries": fingerprint_rows(self.queries),
            "measurement": self.data.measurement,
            "training": changed,
            "torch": torch.__version__,
            "transformers": need("transformers").__version__,
        }
        if self.training.lora_rank is not None:  # new adapters are made, not read
            parts |= {"adapters": self.training.seed, "peft": need("peft").__version__}
        if self.with_options:
            parts["options"] = True
        return json.dumps(parts, sort_keys=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is sent to another process: the key, but no rows, which it reads for itself."""
        return {**vars(self), "key": self.key, "train": (), "queries": ()}

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        """Train from the saved start on these training rows; return the measurements `[query]`, and the losses of options.

        Raises:
            ConfigError: options are asked for, and the queries have none.
        """
        prepared = _prepared(self, self.key)
        model = load_start(self.family, Path(self.folder) / START, self.training)
        collate = collate_of(self.family, model, prepared.tokenizer)
        train_model(model, [prepared.train[row] for row in rows], collate, self.training, seed=seed)
        found = measure(model, prepared.task, prepared.queries, collate, int(self.training.eval_batch_size or 1))
        if not self.with_options:
            return found
        assert prepared.options is not None  # _prepared asks for them
        return torch.cat([found, option_losses(model, prepared.options, collate)])


def _config(start: Path) -> str:
    """Return a digest of the untrained model's configuration: dropout stands there, not in the weights."""
    config = {
        name: value for name, value in read_json(start / "config.json").items() if name not in ("transformers_version", "_name_or_path")
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    task: Task
    tokenizer: Any
    train: list[Row]
    queries: list[Row]
    options: Options | None


@lru_cache(maxsize=1)
def _prepared(procedure: Retraining, key: str) -> _Prepared:
    # A worker reads and tokenises once, not for every job; the key is here for the rows, which equal procedures may not share.
    family, data, start = procedure.family, procedure.data, Path(procedure.folder) / START
    transformers = need("transformers")
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(start), transformers.AutoConfig.from_pretrained(start)
    train, queries = read_splits(family, data, tokenizer, config, procedure.training.seed)
    options = family.options(tokenizer, config, queries.raw, data) if procedure.with_options and isinstance(family, Prompted) else None
    if procedure.with_options and options is None:
        raise ConfigError(f"with_options: the queries of {procedure.folder} choose from no options; leave it out.")
    return _Prepared(task=task_of(family, data, config), tokenizer=tokenizer, train=train.encoded, queries=queries.encoded, options=options)
