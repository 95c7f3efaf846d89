"""What the families of plain text share: text in one column, a GPT-2 to start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from whence.errors import ConfigError
from whence.recipes.language_models import LanguageModels, refuse_labels
from whence.recipes.rows import Row, need_columns
from whence.recipes.settings import DataSettings


@dataclass(frozen=True)
class PlainText(LanguageModels):
    """A family of plain text; what of a family is not here, its own says (`whence.recipes.family.Family`)."""

    architectures: ClassVar[tuple[str, ...]] = ("gpt2",)

    def texts(self, rows: Sequence[Row], data: DataSettings) -> Iterator[str]:
        """Give each row's text."""
        (column,) = data.columns or ("text",)
        need_columns(rows, [column], "data")
        return (str(row[column]) for row in rows)

    def tokens(self, tokenizer: Any, rows: Sequence[Row], data: DataSettings) -> list[list[int]]:
        """Return the tokens of each row's text, uncut."""
        # Text longer than the model takes is cut by the family, so that the tokenizer need not warn.
        found: list[list[int]] = tokenizer(list(self.texts(rows, data)), add_special_tokens=False, verbose=False)["input_ids"]
        return found


def settled_text(data: DataSettings, *, task: str, max_length: int) -> DataSettings:
    """Fill in what is not said of rows that are plain text: the column text, and the loss.

    Raises:
        ConfigError: a setting that plain text has no use for.
    """
    refuse_labels(data, "text has none")
    if data.columns is not None and len(data.columns) != 1:
        raise ConfigError(f"columns={data.columns!r}: a language model's text is in one column.")
    settled = data.over(DataSettings(task=task, columns=("text",), max_length=max_length, measurement="loss"))
    if settled.max_length is not None and settled.max_length < 2:
        raise ConfigError("max_length=1 leaves nothing to predict; give blocks of 2 tokens or more.")
    return settled
