"""WikiText-2: a language model on blocks of text.

Data: https://huggingface.co/datasets/Salesforce/wikitext (S. Merity et al., 2016). A row: `{"text": " = Robert Boulter = "}`
with its line end. All rows are joined and cut into blocks of `--max-length` tokens, 512 by default; a rest is dropped.

    whence train wikitext --checkpoint-dir checkpoints/wikitext
    whence fit wikitext --checkpoint-dir checkpoints/wikitext --strategy ekfac --layers seed
    whence score wikitext --checkpoint-dir checkpoints/wikitext --layers seed --strategy ekfac

`--layers seed` takes the 48 linear layers of GPT-2's blocks that the published run takes; without it, every layer with a handler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from whence.errors import DataError
from whence.recipes.family import check_length
from whence.recipes.plain_text import PlainText, settled_text
from whence.recipes.rows import Row, Source
from whence.recipes.settings import DataSettings, PresetName

_BLOCKS = ["*.attn.c_attn", "*.attn.c_proj", "*.mlp.c_fc", "*.mlp.c_proj"]


@dataclass(frozen=True)
class WikiText(PlainText):
    """The family of plain text and language models."""

    name: ClassVar[str] = "wikitext"
    layer_sets: ClassVar[dict[str, list[str]]] = {"seed": _BLOCKS}
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

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return blocks: `input_ids` and the text."""
        length = int(data.max_length or 512)
        check_length(config, length)
        tokens = list(chain.from_iterable(self.tokens(tokenizer, rows, data)))
        blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
        if not blocks:
            raise DataError(f"the text has {len(tokens)} tokens, too few for a block of {length}. Give more, or a smaller --max-length.")
        return [{"input_ids": block, "text": tokenizer.decode(block)} for block in blocks]
