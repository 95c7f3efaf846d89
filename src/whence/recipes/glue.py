"""GLUE: sentences and pairs of sentences, and a model that classifies them.

Data: https://huggingface.co/datasets/nyu-mll/glue (A. Wang et al., "GLUE", 2018). A row of rte:
`{"sentence1": "...", "sentence2": "...", "label": 0, "idx": 7}`, 0 = entailment.

    whence train glue --task rte --checkpoint-dir checkpoints/rte
    whence score glue --checkpoint-dir checkpoints/rte
    whence top glue --checkpoint-dir checkpoints/rte --query 0

Data and model of your own: `--data FOLDER --columns text --label label --model FOLDER`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from whence.errors import ConfigError
from whence.recipes.family import Labels, TokenizerStyle, check_length, encoder_sizes, label_number, positions
from whence.recipes.rows import Row, Source, need_columns
from whence.recipes.settings import DataSettings, PresetName

HUB = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """Columns and classes of a task; no classes: a number is predicted."""

    columns: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    validation: str = "validation"


_ENTAILS = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask(columns=("sentence",), classes=("unacceptable", "acceptable")),
    "mnli": GlueTask(
        columns=("premise", "hypothesis"), classes=("entailment", "neutral", "contradiction"), validation="validation_matched"
    ),
    "mrpc": GlueTask(columns=("sentence1", "sentence2"), classes=("not_equivalent", "equivalent")),
    "qnli": GlueTask(columns=("question", "sentence"), classes=_ENTAILS),
    "qqp": GlueTask(columns=("question1", "question2"), classes=("not_duplicate", "duplicate")),
    "rte": GlueTask(columns=("sentence1", "sentence2"), classes=_ENTAILS),
    "sst2": GlueTask(columns=("sentence",), classes=("negative", "positive")),
    "stsb": GlueTask(columns=("sentence1", "sentence2"), classes=()),
    "wnli": GlueTask(columns=("sentence1", "sentence2"), classes=("not_entailment", "entailment")),
}


@dataclass(frozen=True)
class Glue:
    """The family of GLUE's tasks."""

    name: ClassVar[str] = "glue"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    style: ClassVar[TokenizerStyle] = "bert"
    layer_sets: ClassVar[dict[str, list[str]]] = {}
    over_run: ClassVar[bool] = True
    joins_rows: ClassVar[bool] = False
    makes_rows: ClassVar[bool] = False
    architectures: ClassVar[tuple[str, ...]] = ("bert",)
    start: ClassVar[PresetName | None] = None

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: sst2, 128 tokens, the margin."""
        task = data.task or "sst2"
        if task not in TASKS:
            raise ConfigError(f"--task {task} is none of GLUE's; choose {', '.join(TASKS)}, or give data of your own with --columns.")
        if data.columns is not None and data.label is None:
            data = replace(data, label="label")
        # A record of training names the task's own columns.
        own = data.columns not in (None, TASKS[task].columns)
        number = not own and not TASKS[task].classes
        if data.flip and number:
            raise ConfigError("flip replaces classes, and stsb predicts a number. Choose another task.")
        usual = DataSettings(
            task=task, columns=TASKS[task].columns, label="label", max_length=128, measurement="loss" if number else "margin"
        )
        settled = data.over(usual)
        if settled.measurement == "log_odds" or (number and settled.measurement != "loss"):
            raise ConfigError(f"measurement={settled.measurement!r} is not for {task}; choose loss{'' if number else ' or margin'}.")
        return settled

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the hyper-parameters of the published runs: BERT, 3 epochs of 3e-5, for rte 2e-5; more for a random start."""
        return {
            "model": None if preset else "google-bert/bert-base-cased",
            "learning_rate": 5e-4 if preset else 2e-5 if data.task == "rte" else 3e-5,
            "weight_decay": 0.01,
            "num_train_epochs": 3.0,
            "train_batch_size": 32,
            "eval_batch_size": 32,
        }

    def source(self, data: DataSettings) -> Source:
        """Return the task's place on the hub; locally `glue_TASK`."""
        task = str(data.task)
        return Source(folder=f"glue_{task}", hub=HUB, config=task, validation=TASKS[task].validation)

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give each sentence."""
        need_columns(rows, data.columns or (), "training data")
        return (str(row[column]) for row in rows for column in data.columns or ())

    def head(self, rows: Sequence[Row], data: DataSettings) -> dict[str, Any]:
        """Return the classes, or one output for a number."""
        need_columns(rows, [*(data.columns or ()), str(data.label)], "training data")
        task = TASKS[str(data.task)]
        values = [row[str(data.label)] for row in rows]
        own = not all(value in task.classes or (isinstance(value, int) and 0 <= value < len(task.classes)) for value in values)
        if data.columns != task.columns or (own and task.classes):
            return Labels.of(values).config()
        return Labels.named(task.classes).config() if task.classes else {"num_labels": 1, "problem_type": "regression"}

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return `input_ids`, `attention_mask`, `labels` and the text."""
        check_length(config, data.max_length)
        columns, label = data.columns or (), str(data.label)
        need_columns(rows, [*columns, label], "data")
        texts = [[str(row[column]) for row in rows] for column in columns]
        found = tokenizer(*texts, truncation=True, max_length=data.max_length)
        number = config.num_labels == 1
        encoded = []
        for place, row in enumerate(rows):
            value = float(row[label]) if number else label_number(config, row[label], place)
            shown = f"{value:g}" if number else f"{value} ({config.id2label.get(value, value)})"
            text = "\n".join([*(f"{column}: {str(row[column]).strip()}" for column in columns), f"{label}: {shown}"])
            encoded.append({**{key: column[place] for key, column in found.items()}, "labels": value, "text": text})
        return encoded

    def preset(self, size: PresetName, tokenizer: Any, data: DataSettings, architecture: str) -> Any:
        """Return a BERT of 2 layers 64 wide (tiny) or 4 layers 256 wide (small)."""
        from transformers import BertConfig

        return BertConfig(max_position_embeddings=positions(data), **encoder_sizes(size, tokenizer))
