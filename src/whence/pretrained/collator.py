"""From tokenised rows to batches, so that neither the batch nor its padding changes a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from whence.errors import DataError
from whence.tasks.likelihoods import IGNORE

LabelShape = Literal["row", "token", "next token"]
"""Labels belong to a row, to tokens, or to tokens with the tokens themselves as the default."""


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of rows that are dicts of numbers, such as those of a tokenised Hugging Face data set.

    Columns that the model does not take (raw text, ids) are dropped, `label` and `label_ids` become `labels`, a missing
    attention mask is made, and sequences are padded on the right to the longest of the batch: most models count
    positions from the left, and padding there would move every token.

    Attributes:
        model: the model's name, for messages.
        columns: what the model's forward takes, with `labels`.
        labels: how rows carry labels.
        pads: value that fills up each column, 0 for those not named; None: no tokenizer told, and rows must be of one length.
        choices: whether each column holds several sequences a row, padded alike: `[batch, choice, token]`.

    Raises:
        DataError: rows that cannot be one batch (when called).
    """

    model: str
    columns: frozenset[str]
    labels: LabelShape = "row"
    pads: Mapping[str, int] | None = field(default_factory=dict)
    choices: bool = False

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Return the batch, `[batch, ...]` for each column."""
        kept = [self._kept(row) for row in rows]
        for row in kept:
            if row.keys() != kept[0].keys():
                raise DataError(f"one row has the columns {sorted(kept[0])}, another {sorted(row)}. Give all rows the same columns.")
        return {key: self._joined(key, [row[key] for row in kept]) for key in kept[0]}

    def _kept(self, row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            raise DataError(f"a row is a {type(row).__name__}. Give rows as dicts (input_ids, labels, ...), or a collate function.")
        row = {key: value for key, value in row.items() if value is not None}
        for alias in ("label", "label_ids"):
            if "labels" not in row and alias in row:
                row["labels"] = row[alias]
        kept = {key: value for key, value in row.items() if key in self.columns}
        if not kept.keys() - {"labels"}:
            raise DataError(
                f"a row has the columns {sorted(map(str, row))}, none of which {self.model} takes. Run the tokenizer or image processor "
                "over the data set first (for example dataset.map(lambda row: tokenizer(row['text'], truncation=True))), or give a "
                "collate function that does."
            )
        if "input_ids" in kept and "attention_mask" in self.columns and "attention_mask" not in kept:
            ids = kept["input_ids"]
            kept["attention_mask"] = [[1] * len(part) for part in ids] if self.choices else [1] * len(ids)
        if self.labels == "next token" and "labels" not in kept and "input_ids" in kept:
            ids, mask = _tensor("input_ids", kept["input_ids"]), kept.get("attention_mask")
            kept["labels"] = ids if mask is None else ids.masked_fill(_tensor("attention_mask", mask) == 0, IGNORE)
        return kept

    def _joined(self, key: str, values: list[Any]) -> Tensor:
        if not self.choices or key == "labels":
            return self._padded(key, [_tensor(key, value) for value in values])
        counts = {len(value) for value in values}
        if len(counts) > 1:
            raise DataError(f"column {key!r} has rows of {min(counts)} and of {max(counts)} choices. Give all rows the same number.")
        parts = self._padded(key, [_tensor(key, part) for value in values for part in value])
        return parts.unflatten(0, (len(values), -1))

    def _padded(self, key: str, values: list[Tensor]) -> Tensor:
        shapes = {value.shape for value in values}
        if len(shapes) == 1:
            return torch.stack(values)
        sequences = all(value.dim() == 1 for value in values) and not (key == "labels" and self.labels == "row")
        if not sequences or self.pads is None:
            found = ", ".join(sorted(str(tuple(shape)) for shape in shapes)[:4])
            remedy = (
                "Bring all rows to one shape."
                if not sequences
                else "There is no tokenizer beside the model to say how to pad: save one there (tokenizer.save_pretrained), pad "
                "the rows, or give a collate function."
            )
            raise DataError(f"column {key!r} has rows of different shapes: {found}. {remedy}")
        filler = IGNORE if key == "labels" else self.pads.get(key, 0)
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)


def _tensor(key: str, value: Any) -> Tensor:
    """Lists, arrays and tensors as tensors; float64, as Python's numbers are, in torch's default type."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"column {key!r} holds {value!r:.60}, which is no array of numbers. Give lists of numbers, or tensors.") from None
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor
