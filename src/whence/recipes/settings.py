"""What a fine-tune is made of: its data, its start and its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

from whence.errors import ConfigError

Measurement = Literal["loss", "margin", "log_odds"]
PresetName = Literal["tiny", "mini", "small"]
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
"""The Trainer's schedules that are functions of the step alone."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which rows, and how they become tokens. None: as at training, else the recipe's own choice."""

    task: str | None = None
    """Which task of the recipe, for example rte; glue: sst2, cola, mrpc, qqp, stsb, mnli, qnli, rte, wnli; swag: swag or hellaswag;
    instruct: alpaca, flan_cot or a folder's name; cot: strategy_qa, commonsense_qa or a folder's name."""

    data: str | None = None
    """Folder with train and validation files (or of several data sets), or a name on the Hugging Face hub."""

    train_file: str | None = None
    """File of training rows, instead of the data set's own (parquet, JSON lines, CSV or text)."""

    columns: tuple[str, ...] | None = None
    """Columns of the text, for data of your own: one or two for glue, the one of the text for wikitext and stdlib, prompt and
    answer for instruct."""

    label: str | None = None
    """Column of the label, for data of your own."""

    max_length: int | None = None
    """Longest row in tokens; for wikitext the length of every block."""

    max_train_rows: int | None = None
    """Take only the first training rows."""

    max_query_rows: int | None = None
    """Take only the first validation rows as queries."""

    group: str | None = None
    """Column of the source, task or skill that a row is of. Default for instruct and cot: the first there is of skill, _task_name,
    task_name, task, source, dataset, category."""

    flip: float | None = None
    """Share of the training labels to replace by a wrong one, to be found again."""

    measurement: Measurement | None = None
    """What is explained: the loss, minus the log-odds of the label (margin), or those of all tokens (log_odds)."""

    def __post_init__(self) -> None:
        for name in ("max_length", "max_train_rows", "max_query_rows"):
            _check(self, name, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "a whole number of 1 or more")
        if self.flip is not None and not 0 <= self.flip < 1:
            raise ConfigError(f"flip={self.flip!r} is no share of the labels; give a number from 0 to below 1.")
        if self.columns is None:
            return
        columns: Any = self.columns
        if isinstance(columns, str) or not 1 <= len(columns) <= 2:
            raise ConfigError(f"columns={columns!r}: give one or two columns of text, as a list.")
        object.__setattr__(self, "columns", tuple(columns))  # lists too, from JSON or by hand

    def over(self, other: Self) -> Self:
        """Return these settings, with those of `other` where these are None."""
        return replace(self, **{f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is trained, by the Hugging Face Trainer. None: the recipe's own choice."""

    model: str | None = None
    """Folder or hub name of the pretrained model to start from."""

    preset: PresetName | None = None
    """Start from a small random model instead, with a tokenizer made from the training text."""

    architecture: str | None = None
    """With --preset: kind of the small model; instruct and cot: gpt2, llama, gpt_neo or t5."""

    learning_rate: float | None = None
    """Highest learning rate."""

    weight_decay: float | None = None
    """Decoupled weight decay of AdamW."""

    num_train_epochs: float | None = None
    """Passes over the training rows."""

    train_batch_size: int | None = None
    """Rows per step."""

    eval_batch_size: int | None = None
    """Rows at a time when queries are measured."""

    lr_scheduler_type: str = "linear"
    """Schedule of the learning rate, by the Trainer's name for it."""

    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises."""

    dropout: float | None = None
    """Every dropout probability of the model; None: as the model has them. 0 takes noise out of retraining."""

    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, and so not attributed: names or patterns, for example *embeddings*."""

    lora_rank: int | None = None
    """Train low-rank adapters of this rank (LoRA, by peft) on a model that stays as it is, instead of its own parameters."""

    lora_alpha: float | None = None
    """With --lora-rank: adapters count alpha / rank times. Default: eight times the rank."""

    lora_dropout: float | None = None
    """With --lora-rank: dropout before adapters. Default: that of --dropout, else 0.1."""

    lora_targets: tuple[str, ...] | None = None
    """With --lora-rank: last names of the layers that get adapters. Default: by architecture, for example c_attn, c_proj, c_fc."""

    seed: int = 1004
    """Of a new head, new adapters, a random start, the order of rows and dropout."""

    def __post_init__(self) -> None:
        adapter = ("lora_alpha", "lora_dropout", "lora_targets")
        given = [name for name in adapter if getattr(self, name) is not None]
        if self.lora_rank is None and given:
            raise ConfigError(f"{given[0]}={getattr(self, given[0])!r} is of an adapter, and none is asked for. Give lora_rank too.")
        if self.model is not None and self.preset is not None:
            raise ConfigError(f"model={self.model!r} and preset={self.preset!r} are two starts; give one.")
        if self.architecture is not None and self.preset is None:
            raise ConfigError(f"architecture={self.architecture!r} is of a small random model, and none is asked for. Give preset too.")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ConfigError(f"lr_scheduler_type={self.lr_scheduler_type!r} cannot be used; choose {', '.join(SCHEDULES)}.")
        for name in ("learning_rate", "num_train_epochs", "train_batch_size", "eval_batch_size"):
            _check(self, name, lambda v: v > 0, "a positive number")
        _check(self, "lora_rank", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1, "a whole number of 1 or more")
        _check(self, "lora_alpha", lambda v: v > 0, "a positive number")
        _check(self, "lora_targets", lambda v: len(v) > 0 and not isinstance(v, str), "names of layers, as a list")
        for name in ("warmup_ratio", "dropout", "lora_dropout"):
            _check(self, name, lambda v: 0 <= v < 1, "a number from 0 to below 1")
        _check(self, "weight_decay", lambda v: v >= 0, "a number from 0")

    def over(self, other: dict[str, Any]) -> Self:
        """Return these settings, with those of `other` where these are None."""
        return replace(self, **{name: value for name, value in other.items() if getattr(self, name) is None})


def _check(settings: DataSettings | TrainingSettings, name: str, usable: Callable[[Any], bool], form: str) -> None:
    value = getattr(settings, name)
    if value is not None and not usable(value):
        raise ConfigError(f"{name}={value!r} cannot be used; give {form}.")


def data_settings(options: dict[str, Any]) -> DataSettings:
    """Return the settings of keyword arguments.

    Raises:
        ConfigError: there is no such option.
    """
    names = [field.name for field in fields(DataSettings)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no option of data; there are {', '.join(names)}.")
    return DataSettings(**options)


def to_json(settings: DataSettings | TrainingSettings) -> dict[str, Any]:
    """Return the fields as JSON values."""
    return asdict(settings)
