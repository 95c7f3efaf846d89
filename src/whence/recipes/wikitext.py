"""WikiText-2: a language model on blocks of text.

Data: https://huggingface.co/datasets/Salesforce/wikitext (S. Merity et al., 2016). A row: `{"text": " = Robert Boulter = "}`
with its line end. All rows are joined and cut into blocks of `--max-length` tokens, 512 by default; a rest is dropped.

    whence train wikitext --checkpoint-dir checkpoints/wikitext
    whence fit wikitext --checkpoint-dir checkpoints/wikitext --strategy ekfac --layers seed
    whence score wikitext --checkpoint-dir checkpoints/wikitext --layers seed --strategy ekfac

`--layers seed` takes the 48 linear layers of GPT-2's blocks that the published run takes; without it, every layer with a handler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from whence.errors import ConfigError, DataError
from whence.recipes.family import SIZES, TokenizerStyle, check_length, positions
from whence.recipes.rows import Row, Source, need_columns
from whence.recipes.settings import DataSettings, PresetName

_BLOCKS = ["*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj"]


@dataclass(frozen=True)
class WikiText:
    """The family of plain text and language models."""

    name: ClassVar[str] = "wikitext"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    style: ClassVar[TokenizerStyle] = "gpt2"
    layer_sets: ClassVar[dict[str, list[str]]] = {"seed": _BLOCKS}
    over_run: ClassVar[bool] = False
    joins_rows: ClassVar[bool] = True
    makes_rows: ClassVar[bool] = False
    start: ClassVar[PresetName | None] = None

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: the column text, blocks of 512, the loss."""
        return settled_text(data, task="wikitext-2-v1", max_length=512)

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return the hyper-parameters of the published run: GPT-2, 3 epochs of 3e-5; more for a random start."""
        return {
            "model": None if preset else "openai-community/gpt2",
            "learning_rate": 1e-3 if preset else 3e-5,
            "weight_decay": 0.01,
            "num_train_epochs": 3.0,
            "train_batch_size": 8,
            "eval_batch_size": 16,
        }

    def source(self, data: DataSettings) -> Source:
        """Return where the data set lies; the task is its configuration on the hub, for example wikitext-2-raw-v1."""
        return Source(folder="wikitext2", hub="Salesforce/wikitext", config=data.task)

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give each row's text."""
        (column,) = data.columns or ("text",)
        need_columns(rows, [column], "data")
        return (str(row[column]) for row in rows)

    def head(self, rows: Sequence[Row], data: DataSettings) -> dict[str, Any]:
        """Return nothing: there are no labels."""
        return {}

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return blocks: `input_ids` and the text."""
        length = int(data.max_length or 512)
        check_length(config, length)
        # Text longer than the model takes is cut below, so that the tokenizer need not warn.
        found = tokenizer(list(self.texts(rows, data)), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable(found))
        blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        if not blocks:
            raise DataError(f"the text has {len(tokens)} tokens, too few for a block of {length}. Give more, or a smaller --max-length.")
        return [{"input_ids": block, "text": tokenizer.decode(block)} for block in blocks]

    def preset(self, size: PresetName, tokenizer: Any, data: DataSettings) -> Any:
        """Return a small GPT-2."""
        return gpt2(size, tokenizer, data)


def settled_text(data: DataSettings, *, task: str, max_length: int) -> DataSettings:
    """Fill in what is not said of rows that are plain text: the column text, and the loss.

    Raises:
        ConfigError: a setting that plain text has no use for.
    """
    if data.flip:
        raise ConfigError("flip replaces labels, and text has none. Leave --flip out.")
    if data.label is not None:
        raise ConfigError(f"label={data.label!r} names a column of labels, and text has none. Leave --label out.")
    if data.measurement == "margin":
        raise ConfigError("measurement='margin' is for classifiers; choose loss or log_odds.")
    if data.columns is not None and len(data.columns) != 1:
        raise ConfigError(f"columns={data.columns!r}: a language model's text is in one column.")
    settled = data.over(DataSettings(task=task, columns=("text",), max_length=max_length, measurement="loss"))
    if settled.max_length is not None and settled.max_length < 2:
        raise ConfigError("max_length=1 leaves nothing to predict; give blocks of 2 tokens or more.")
    return settled


def gpt2(size: PresetName, tokenizer: Any, data: DataSettings) -> Any:
    """Return the configuration of a small GPT-2, of the layers and width of `whence.recipes.family.SIZES`."""
    from transformers import GPT2Config

    layers, width = SIZES[size]
    end = tokenizer.eos_token_id
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        n_positions=positions(data),
        bos_token_id=end,
        eos_token_id=end,
    )
