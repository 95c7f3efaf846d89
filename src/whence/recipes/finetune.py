"""Train a recipe's model, and open what was trained.

A checkpoint folder holds the trained model and its tokenizer as `from_pretrained` reads them, and besides `whence.json`
(recipe, settings, length of training), `start/` (the untrained model), `second_moments.safetensors` (Adam's), and
`snapshots/` (states in the midst of training).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from whence.errors import ConfigError
from whence.pretrained import open_pretrained
from whence.pretrained.adapters import is_adapted, save_adapter
from whence.pretrained.kinds import need, quiet
from whence.recipes.asked import asker, encoder, generator
from whence.recipes.base import Recipe
from whence.recipes.family import Family
from whence.recipes.pieces import pieces
from whence.recipes.prompted import Prompted, row_groups
from whence.recipes.record import RECORD, check_unchanged, known, lasting, read_record, to_record
from whence.recipes.retraining import START, Retraining
from whence.recipes.rows import DATA_VARIABLE, Row
from whence.recipes.settings import DataSettings, TrainingSettings, data_settings, to_json
from whence.recipes.splits import collate_of, encode_train, fingerprint_raw, read_queries, read_raw_queries, read_train, task_of
from whence.recipes.start import adapted, make_start, outline, settle_lora
from whence.recipes.training import Trained, freeze, snapshot_file, train_model
from whence.recipes.unfinished import is_unfinished, unfinished
from whence.runtime.device import resolve_device
from whence.runtime.progress import Stages
from whence.storage.run import explain_write_errors, fingerprint_model, write_json_atomic
from whence.tasks import SequenceClassification

MOMENTS, SNAPSHOTS = "second_moments.safetensors", "snapshots"


def train_recipe(
    family: Family,
    checkpoint_dir: str | Path,
    *,
    data: DataSettings,
    training: TrainingSettings,
    snapshots: int = 4,
    overwrite: bool = False,
    keep_every: float | None = None,
    stages: Stages | None = None,
) -> Recipe:
    """Train a recipe's model, save it in `checkpoint_dir`, and return the recipe of it.

    A training that was interrupted goes on from its last checkpoint when it is asked for again, and gives the same weights.

    Args:
        family: the recipe.
        checkpoint_dir: a new or empty folder, or one of an interrupted training of the same.
        data, training: what is None in them is the recipe's choice.
        snapshots: how many states in the midst of training to keep, for scores over a whole run.
        overwrite: replace a model, or an interrupted training of something else, that is there.
        keep_every: seconds between two checkpoints to go on from; None: five minutes.
        stages: gets the time and shows progress.

    Raises:
        ConfigError: settings that cannot be used, or the folder holds something. DataError: rows that cannot be used.
    """
    folder = Path(checkpoint_dir)
    goes_on = is_unfinished(folder) and not (folder / RECORD).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite and not goes_on):
        raise ConfigError(f"{folder} is not empty. Give a new folder as --checkpoint-dir, or --overwrite to replace what is there.")
    data, training = _settled(family, data, training)
    raw = read_train(family, data)
    if data.group is not None:  # a column that is not there would be found only when the trained model is opened
        own, asked = (_own_columns(family, rows) for rows in (raw, read_raw_queries(family, data)))
        row_groups(own, asked, data.group)
    model, tokenizer = make_start(family, raw, data, training)
    training = settle_lora(training, model)
    fingerprint = fingerprint_raw(family, data, raw)
    made_of = _made_of(family, data, training, snapshots) | {"rows": fingerprint, "start": fingerprint_model(model)}
    with unfinished(folder, made_of, overwrite=overwrite) as place:
        with explain_write_errors(folder):
            (folder / RECORD).unlink(missing_ok=True)  # the record is written last: without it, the folder is unfinished
        _save(folder / START, model, tokenizer)
        model = adapted(model, training)
        rows = encode_train(family, data, tokenizer, model.config, raw, training.seed).encoded
        model.to(resolve_device("auto"))
        collate = collate_of(family, model, tokenizer)
        kept: Any = {"snapshots": snapshots, "unfinished": place, "keep_every": keep_every}
        trained = train_model(model, rows, collate, training, seed=training.seed, stages=stages, **kept)
        _save(folder, model, tokenizer)
        with explain_write_errors(folder):
            _keep(folder, trained)
            record = to_record(family, data, training, trained, len(rows))
            more = {"train_fingerprint": fingerprint, "made_with": _made_with(training, snapshots)}
            write_json_atomic(folder / RECORD, record | more)
    return open_finetuned(family, folder, DataSettings())


def _settled(family: Family, data: DataSettings, training: TrainingSettings) -> tuple[DataSettings, TrainingSettings]:
    """Fill in what is not said.

    Raises:
        ConfigError: the family does not know something that is said.
    """
    if not family.makes_rows:  # the variable may be another when the folder is opened again
        data = replace(data, data=data.data or os.environ.get(DATA_VARIABLE) or None)
    data = family.settled(data)
    if training.model is None and training.preset is None:
        training = replace(training, preset=family.start)
    if training.architecture not in (None, *family.architectures):
        known = " or ".join(family.architectures)
        raise ConfigError(f"architecture={training.architecture!r} is no small model of the recipe {family.name}; choose {known}.")
    return data, training.over(family.defaults(data, training.preset))


def _own_columns(family: Family, raw: list[Row]) -> list[Row]:
    """Return raw rows as they stand beside encoded ones: blocks that are cut of a text keep no other column."""
    return [{"text": ""}] if family.joins_rows else raw


def is_trained(family: Family, folder: Path, data: DataSettings, training: TrainingSettings, *, snapshots: int = 4) -> bool:
    """Return whether a folder holds a model whose training has ended, and was of these settings once what is None is filled in.

    Whether its rows are still the same is found when it is opened.

    Raises:
        ConfigError: settings that cannot be used, or a model of another recipe.
    """
    record = read_record(family, folder) if (folder / RECORD).is_file() else None
    if record is None:
        return False
    data, training = _settled(family, data, training)
    training = settle_lora(training, None if training.lora_rank is None else outline(family, folder / START))
    asked = json.loads(json.dumps(_made_of(family, data, training, snapshots)))
    found = {"recipe": record["recipe"], **record["data"], **record["training"], **record.get("made_with", {})}
    if "made_with" not in record:  # of an earlier version of whence, which did not write it
        asked = {name: value for name, value in asked.items() if name not in _made_with(training, snapshots)}
    return all(found.get(name) == value for name, value in asked.items())


def _made_of(family: Family, data: DataSettings, training: TrainingSettings, snapshots: int) -> dict[str, Any]:
    """Return the settings and versions that a training depends on, by name."""
    return {"recipe": family.name, **lasting(data), **to_json(training), **_made_with(training, snapshots)}


def _made_with(training: TrainingSettings, snapshots: int) -> dict[str, Any]:
    """Return what a training depends on besides its settings: how many snapshots are asked for, and versions of packages."""
    packages = ("torch", "transformers", "accelerate", *(() if training.lora_rank is None else ("peft",)))
    return {"snapshots": snapshots, **{name: need(name).__version__ for name in packages}}


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    with explain_write_errors(folder), quiet(need("transformers")):
        if is_adapted(model):
            save_adapter(model, folder, base=START)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def open_checkpoint(family: Family, /, *, checkpoint_dir: str | Path | None = None, **data: Any) -> Recipe:
    """Open a model trained by `whence train`, or a checkpoint of your own; see `DataSettings` for the options."""
    return open_finetuned(family, checkpoint_dir, data_settings(data))


def open_finetuned(family: Family, checkpoint_dir: str | Path | None, data: DataSettings) -> Recipe:
    """Return the recipe of a checkpoint folder, of `train_recipe` or of your own.

    Args:
        family: the recipe.
        checkpoint_dir: the folder, or a name on the hub.
        data: what is None in it is as at training, else the recipe's choice.

    Raises:
        ConfigError: no folder, or one of another recipe. DataError: rows that cannot be used.
    """
    if checkpoint_dir is None:
        raise ConfigError(
            f"the recipe {family.name} needs a trained model: give --checkpoint-dir DIR. "
            f"whence train {family.name} --checkpoint-dir DIR makes one."
        )
    folder = Path(checkpoint_dir)
    record = read_record(family, folder)
    if record is not None:
        recorded = DataSettings(**known(DataSettings, record["data"]))
        if data.flip is not None and data.flip != (recorded.flip or 0):
            raise ConfigError(
                f"flip={data.flip}: {folder} was trained with flip={recorded.flip or 0}. Leave it out, or train again with it."
            )
        data = data.over(recorded)
    data = family.settled(data)
    with quiet(need("transformers")):
        model, _, collate = open_pretrained(checkpoint_dir, task=task_of(family, data))
    task = task_of(family, data, model.config)
    tokenizer = need("transformers").AutoTokenizer.from_pretrained(checkpoint_dir)
    training = None if record is None else TrainingSettings(**known(TrainingSettings, record["training"]))
    raw = read_train(family, data)
    if record is not None and training is not None:
        freeze(model, training.freeze)
        check_unchanged(family, folder, data, raw, record)
    train = encode_train(family, data, tokenizer, model.config, raw, 0 if training is None else training.seed)
    queries = read_queries(family, data, tokenizer, model.config)
    encode = encoder(family, model, tokenizer, collate, data)
    recipe = Recipe(
        name=_run_name(family, folder),
        model=model,
        task=task,
        train=train.encoded,
        queries=queries.encoded,
        collate=collate,
        describe=_text,
        tokens=partial(pieces, tokenizer),
        ask=asker(family, encode, data),
        encode=encode,
        generate=generator(family, model, tokenizer, data),
        layer_sets=family.layer_sets,
        query_split=queries.name,
        raw=train.raw,
        flipped=train.flipped,
    )
    _sort(recipe, family, tokenizer, data, train.raw, queries.raw)
    if record is not None and training is not None:
        _remember(recipe, family, folder, data, training, record)
    return recipe


def _sort(recipe: Recipe, family: Family, tokenizer: Any, data: DataSettings, train: list[Row], queries: list[Row]) -> None:
    """Say which class and group every row is of, and what every query chooses from."""
    config: Any = recipe.model.config
    if isinstance(recipe.task, SequenceClassification) and config.num_labels > 1:
        recipe.classes, recipe.query_classes = (torch.tensor([row["labels"] for row in rows]) for rows in (recipe.train, recipe.queries))
    if isinstance(family, Prompted) or data.group is not None:
        recipe.groups, recipe.query_groups = row_groups(train, queries, data.group) or (None, None)
    if isinstance(family, Prompted):
        recipe.options = family.options(tokenizer, config, queries, data)
        if config.is_encoder_decoder:  # tokens of the answer are not those of the prompt
            recipe.tokens = None


def _remember(
    recipe: Recipe, family: Family, folder: Path, data: DataSettings, training: TrainingSettings, record: Mapping[str, Any]
) -> None:
    """Give a recipe what a checkpoint folder keeps of its training."""
    recipe.training_time, recipe.second_moments = float(record["training_time"]), folder / MOMENTS
    recipe.over_run = family.over_run and bool(record["snapshots"])
    recipe.snapshots = [(folder / SNAPSHOTS / entry["file"], float(entry["time"])) for entry in record["snapshots"]]
    recipe.retraining = Retraining(
        family=family, folder=str(folder.resolve()), data=data, training=training, train=recipe.train, queries=recipe.queries
    )


def _run_name(family: Family, folder: Path) -> str:
    """Name the run folder after the checkpoint folder, since a task has many; one of several runs also after theirs."""
    place = folder.resolve()
    name = f"{place.parent.name}-{place.name}" if re.fullmatch(r"run-\d+", place.name) else place.name
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{family.name}-{name}")


def _text(row: Row) -> str:
    return str(row["text"])


def _keep(folder: Path, trained: Trained) -> None:
    safetensors.torch.save_file(trained.moments, folder / MOMENTS)
    (folder / SNAPSHOTS).mkdir(exist_ok=True)
    for snapshot in trained.snapshots:
        safetensors.torch.save_file(snapshot.state, folder / SNAPSHOTS / snapshot_file(snapshot.step))
