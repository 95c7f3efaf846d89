r"""The Python standard library: a small language model of documented functions, made on your own machine.

Data: the source of the Python that runs whence; nothing is downloaded, nothing of it is imported. A row:
`{"module": "bisect", "name": "insort_left", "file": "bisect.py", "line": 75, "text": "# bisect.insort_left\ndef insort_left(...): ..."}`,
cut to `--max-length` tokens, 64 by default. Other versions of Python have other rows.

    whence train stdlib --checkpoint-dir checkpoints/stdlib
    whence fit   stdlib --checkpoint-dir checkpoints/stdlib
    whence index stdlib --checkpoint-dir checkpoints/stdlib
    whence query stdlib --checkpoint-dir checkpoints/stdlib --text "def median(data):"

`whence demo stdlib` does all of it, and writes a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whence.errors import ConfigError
from whence.recipes.family import check_length
from whence.recipes.functions import split, version
from whence.recipes.plain_text import PlainText, settled_text
from whence.recipes.rows import Row, Source
from whence.recipes.settings import DataSettings, PresetName


@dataclass(frozen=True)
class Stdlib(PlainText):
    """The family of the standard library's functions; a function is a row."""

    name: ClassVar[str] = "stdlib"
    layer_sets: ClassVar[dict[str, list[str]]] = {}
    joins_rows: ClassVar[bool] = False
    makes_rows: ClassVar[bool] = True
    start: ClassVar[PresetName | None] = "mini"

    def settled(self, data: DataSettings) -> DataSettings:
        """Fill in what is not said: the column text, 64 tokens, the loss."""
        if data.data is not None:
            raise ConfigError(f"data={data.data!r}: stdlib reads {version()}. Leave --data out; for text of your own take wikitext.")
        return settled_text(data, task="functions", max_length=64)

    def defaults(self, data: DataSettings, preset: PresetName | None) -> dict[str, Any]:
        """Return hyper-parameters for a random start."""
        return {
            "learning_rate": 3e-3,
            "weight_decay": 0.01,
            "num_train_epochs": 5.0,
            "train_batch_size": 16,
            "eval_batch_size": 32,
            "dropout": 0.0,
        }

    def source(self, data: DataSettings) -> Source:
        """Return what reads the library."""
        return Source(folder=self.name, hub=version(), made=split)

    def encode(self, tokenizer: Any, config: Any, rows: Sequence[Row], data: DataSettings) -> list[Row]:
        """Return `input_ids`, which end in the tokenizer's end where nothing is cut off, and the text with where it stands."""
        length = int(data.max_length or 64)
        check_length(config, length)
        encoded = []
        for row, tokens in zip(rows, self.tokens(tokenizer, rows, data), strict=True):
            ends = [] if row.get("file") == "" else [tokenizer.eos_token_id]  # a prompt is not at its end
            text = tokenizer.decode(tokens[:length])
            encoded.append({"input_ids": [*tokens, *ends][:length], "text": place_of(row) + text})
        return encoded


def place_of(row: Row) -> str:
    """Return the line of file and number above a row's text; nothing for text that is from no file."""
    return f"# {row['file']}, line {row['line']}\n" if row.get("file") else ""
