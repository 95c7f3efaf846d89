"""SWAG and HellaSwag: which of four endings goes on from a sentence.

Data: https://huggingface.co/datasets/allenai/swag (R. Zellers et al., 2018), `Rowan/hellaswag` (2019). A row of swag:
`{"sent1": "He takes the knife.", "sent2": "He", "ending0": "cuts the bread.", ..., "ending3": "...", "label": 0}`.

    whence train swag --checkpoint-dir checkpoints/swag
    whence fit swag --checkpoint-dir checkpoints/swag --strategy ekfac --precision bfloat16
    whence score swag --checkpoint-dir checkpoints/swag --strategy ekfac --precision bfloat16 --query-rank 32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whence.errors import ConfigError, DataError
from whence.recipes.family import TokenizerStyle, check_length, class_number, encoder_sizes, positions
from whence.recipes.rows import Row, Source, need_columns
from whence.recipes.settings import DataSettings, PresetName

SOURCES = {
    "swag": Source(folder="swag", hub="allenai/swag", config="regular"),
    "hellaswag": Source(folder="hellaswag", hub="Rowan/hellaswag"),
}


@dataclass(frozen=True)
class Swag:
    """The family of SWAG and HellaSwag."""

    name: ClassVar[str] = "swag"
    auto: ClassVar[str] = "AutoModelForMultipleChoice"
    style: ClassVar[TokenizerStyle] = "roberta"
    layer_sets: ClassVar[dict[str, list[str]]] = {}
    over_run: ClassVar[bool] = True
    joins_rows: ClassVar[bool] = False
    makes_rows: ClassVar[bool] = False
    architectures: ClassVar[tuple[str, ...]] = ("roberta",)
    start: ClassVar[PresetName | None] = None

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: swag, 128 tokens, the margin."""
        settled = data.over(DataSettings(task="swag", label="label", max_length=128, measurement="margin"))
        if settled.task not in SOURCES:
            raise ConfigError(f"--task {settled.task} is not known to swag; choose {' or '.join(SOURCES)}.")
        if settled.columns is not None:
            raise ConfigError("swag takes the columns sent1, sent2, ending0, ending1, ... as they are; leave --columns out.")
        if settled.measurement == "log_odds":
            raise ConfigError("measurement='log_odds' is for language models; choose loss or margin.")
        return settled

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the hyper-parameters of the published run: RoBERTa, 3 epochs of 1e-5; more for a random start."""
        return {
            "model": None if preset else "FacebookAI/roberta-base",
            "learning_rate": 5e-4 if preset else 1e-5,
            "weight_decay": 0.001,
            "num_train_epochs": 3.0,
            "train_batch_size": 16,
            "eval_batch_size": 32,
        }

    def source(self, data: DataSettings) -> Source:
        """Return where the data set lies."""
        return SOURCES[str(data.task)]

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give each context and ending."""
        return (text for row in rows for text in (*_context(row), *_endings(row)))

    def head(self, rows: Sequence[Row], data: DataSettings) -> dict[str, Any]:
        """Return nothing: the number of choices is the data's."""
        return {}

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return `input_ids` and `attention_mask` `[choice][token]`, `labels` and the text."""
        check_length(config, data.max_length)
        label = str(data.label)
        need_columns(rows, [label], "data")
        encoded = []
        for number, row in enumerate(rows):
            (first, second), endings = _context(row), _endings(row)
            found = tokenizer(
                [first] * len(endings), [f"{second} {ending}".strip() for ending in endings], truncation=True, max_length=data.max_length
            )
            right = _right(row[label], len(endings), number)
            choices = [f"{'*' if place == right else ' '} {place}: {second} {ending}" for place, ending in enumerate(endings)]
            encoded.append({**_even(dict(found), tokenizer), "labels": right, "text": "\n".join([first, *choices])})
        return encoded

    def preset(self, size: PresetName, tokenizer: Any, data: DataSettings, architecture: str) -> Any:
        """Return a RoBERTa of 2 layers 64 wide (tiny) or 4 layers 256 wide (small)."""
        from transformers import RobertaConfig

        return RobertaConfig(
            # RoBERTa counts positions from the padding token on.
            max_position_embeddings=positions(data) + tokenizer.pad_token_id + 1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            type_vocab_size=1,
            **encoder_sizes(size, tokenizer),
        )


def _context(row: Row) -> tuple[str, str]:
    """Return the sentence before and the start of the sentence to be finished; HellaSwag names them otherwise on the hub."""
    names = ("sent1", "sent2") if "sent1" in row else ("ctx_a", "ctx_b")
    first, second = (row.get(name) for name in names)
    if first is None:
        raise DataError(f"a row has the columns {', '.join(map(str, row))}; expected sent1, sent2, ending0, ending1, ... and label.")
    return str(first), str(second or "")


def _endings(row: Row) -> list[str]:
    listed = row.get("endings")
    endings = list(listed) if listed is not None else [str(row[key]) for key in sorted(row, key=str) if str(key).startswith("ending")]
    if len(endings) < 2:
        raise DataError(f"a row has {len(endings)} endings; give ending0, ending1, ... or a list in the column endings.")
    return endings


def _right(value: Any, choices: int, number: int) -> int:
    right = class_number(value, choices)
    if right is None:
        raise DataError(f"row {number} has the label {value!r}; give the number of the right ending, 0 to {choices - 1}.")
    return right


def _even(columns: dict[str, list[list[int]]], tokenizer: Any) -> dict[str, list[list[int]]]:
    """Pad a row's choices to its longest, so that every column is a rectangle."""
    longest = max(map(len, columns["input_ids"]))
    fill = {"input_ids": tokenizer.pad_token_id}
    return {key: [list(part) + [fill.get(key, 0)] * (longest - len(part)) for part in parts] for key, parts in columns.items()}
