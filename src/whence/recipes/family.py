"""What the recipes of Hugging Face models have in common, and what each says for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from whence.errors import ConfigError, DataError
from whence.recipes.rows import Row, Source
from whence.recipes.settings import DataSettings, PresetName

_OFFSET = ("roberta", "camembert", "longformer")  # models that count positions from the padding token on
SEQ2SEQ, SEQ2SEQ_PRESET = "AutoModelForSeq2SeqLM", "t5"
TokenizerStyle = Literal["bert", "roberta", "gpt2"]
SIZES: dict[PresetName, tuple[int, int]] = {"tiny": (2, 64), "mini": (4, 128), "small": (4, 256)}
"""Layers and width of the small random models."""


class Family(Protocol):
    """One recipe: its data, its kind of model, its defaults. Final classes give all of this; none inherits from another."""

    name: ClassVar[str]
    auto: ClassVar[str]
    """The class of transformers that loads such models."""
    style: ClassVar[TokenizerStyle]
    """Of the tokenizer made for a preset."""
    layer_sets: ClassVar[dict[str, list[str]]]
    """Layers by the names under which `--layers` takes them."""
    over_run: ClassVar[bool]
    """Whether scores are over the run's snapshots by default, as the evidence says (docs/results/finetuned.md)."""
    joins_rows: ClassVar[bool]
    """Whether raw rows are joined and cut anew, so that rows are limited after that."""
    makes_rows: ClassVar[bool]
    """Whether rows are made on this machine, so that no folder of data is looked for."""
    architectures: ClassVar[tuple[str, ...]]
    """Kinds of small models that presets make, as transformers names them; the first is the usual one."""
    start: ClassVar[PresetName | None]
    """What training starts from if it is not told: a small random model, or None for the pretrained one of `defaults`."""

    def settled(self, data: DataSettings) -> DataSettings:
        """Return the settings with the recipe's own choices filled in. Raises ConfigError for what it does not know."""
        ...

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the fields of `TrainingSettings` that the recipe chooses."""
        ...

    def source(self, data: DataSettings) -> Source:
        """Return where the data set lies."""
        ...

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give all text of raw rows, for a tokenizer to be made from."""
        ...

    def head(self, rows: Sequence[Row], data: DataSettings) -> dict[str, Any]:
        """Return what the configuration of a new model says about labels."""
        ...

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return rows as the model takes them, each with `"text"`, what people read."""
        ...

    def preset(self, size: PresetName, tokenizer: Any, data: DataSettings, architecture: str) -> Any:
        """Return the configuration of a small model for a tokenizer; the architecture is one of `architectures`."""
        ...


def auto_of(family: Family, config: Any) -> str:
    """Return the class of transformers that loads a model of this configuration: a family may take encoder-decoders too."""
    return SEQ2SEQ if SEQ2SEQ_PRESET in family.architectures and getattr(config, "is_encoder_decoder", False) else family.auto


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The classes of a data set: numbers as they are, names in alphabetical order, or False and True as 0 and 1."""

    names: tuple[str, ...]
    number: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Sequence[Any]) -> Labels:
        """Return the classes that occur in a column of labels.

        Raises:
            DataError: a label is neither a whole number of 0 or more nor text, or truth values and others are mixed.
        """
        if all(isinstance(value, str) for value in values):
            return cls.named(sorted(set(values)))
        if all(isinstance(value, bool) for value in values):
            return cls.named([str(False), str(True)])
        for number, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(
                    f"row {number} has the label {value!r}; labels are whole numbers from 0, or all of them text, or true and false."
                )
        return cls.named([str(number) for number in range(max(2, 1 + max(values)))])

    @classmethod
    def named(cls, names: Sequence[str]) -> Labels:
        """Return classes of these names, numbered in this order."""
        return cls(names=tuple(names), number={name: number for number, name in enumerate(names)})

    def config(self) -> dict[str, Any]:
        """Return what a model's configuration says about them."""
        return {"id2label": dict(enumerate(self.names)), "label2id": dict(self.number)}


def label_number(config: Any, value: Any, number: int) -> int:
    """Return the number of a row's label by a model's configuration.

    Raises:
        DataError: the model has no such class.
    """
    known = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    classes = int(config.num_labels)
    if isinstance(value, str) and value in known:
        return known[value]
    found = class_number(value, classes)
    if found is None:
        names = ", ".join(map(str, list(known)[:8]))
        raise DataError(f"row {number} has the label {value!r}; the model's {classes} classes are 0 to {classes - 1} ({names}).")
    return found


def class_number(value: Any, classes: int) -> int | None:
    """Return a label as the number of a class; None: there is no such class.

    It is a whole number, the digits of one, or False or True for 0 or 1 of two classes.
    """
    if isinstance(value, bool):
        return int(value) if classes == 2 else None
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    return number if isinstance(number, int) and 0 <= number < classes else None


def encoder_sizes(size: PresetName, tokenizer: Any) -> dict[str, Any]:
    """Return what the configurations of small BERTs and RoBERTas have in common."""
    layers, width = SIZES[size]
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "intermediate_size": 4 * width,
        "pad_token_id": tokenizer.pad_token_id,
    }


def positions(data: DataSettings) -> int:
    """Return how many tokens a small model reads at most."""
    return max(int(data.max_length or 0), 16)


def check_length(config: Any, length: int | None) -> None:
    """Check that a model has as many positions as rows may have tokens.

    Raises:
        ConfigError: it has fewer.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and any(name in config.model_type for name in _OFFSET):
        longest -= config.pad_token_id + 1
    if length is not None and longest is not None and length > longest:
        raise ConfigError(f"max_length={length}: the model reads {longest} tokens at most. Give --max-length {longest} or less.")
