"""A row of a text that somebody asks about: what in the training data made the model say this?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from whence.errors import ConfigError, DataError
from whence.evaluate.embeddings import only_looking
from whence.recipes.family import Family
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings

Encode = Callable[[Mapping[str, Any]], Row]


def encoder(family: Family, model: Any, tokenizer: Any, collate: Callable[[list[Row]], Any], data: DataSettings) -> Encode:
    """Return what makes a row to ask about of a raw row, with the columns of the data set.

    A language model is asked for the row's text, a classifier for the row's label; without one, for the class that it reads in
    the row now.
    """
    columns, label = data.columns or (), str(data.label)

    def labelled(raw: Mapping[str, Any]) -> Row:
        try:
            return family.encode(tokenizer, model.config, [dict(raw)], data)[0]
        except DataError as error:
            # The number within a list of one says nothing; who gave the row knows its place.
            raise DataError(re.sub(r"^(data: )?(row 0|a row) ", "the row ", str(error))) from None

    def encode(raw: Mapping[str, Any]) -> Row:
        missing = [column for column in columns if raw.get(column) is None]
        if missing:
            also = "" if family.joins_rows else f", and {label} for another class than the model reads"
            has = ", ".join(map(str, raw)) or "nothing"
            raise DataError(f"the row has no {missing[0]!r}; it has {has}. Give {', '.join(columns)}{also}.")
        if family.joins_rows:
            return _said(tokenizer, str(raw[columns[0]]), data)
        if raw.get(label) is not None:
            return labelled(raw)
        if model.config.num_labels < 2:
            raise ConfigError(f"the model of recipe {family.name} predicts a number, and reads no class in a text; ask about its queries.")
        # Made anew with the class that is read: what people read of a row names its class too.
        return labelled({**raw, label: _read(model, collate([labelled({**raw, label: 0})]))})

    return encode


def asker(family: Family, encode: Encode, data: DataSettings) -> Callable[[str], Row]:
    """Return what makes a row to ask about of a text: a raw row of that text alone."""

    def ask(text: str) -> Row:
        columns = data.columns or ()
        if len(columns) != 1:
            raise ConfigError(f"a text alone is no row of recipe {family.name}, whose rows have several texts; ask about its queries.")
        return encode({columns[0]: text})

    return ask


def _said(tokenizer: Any, text: str, data: DataSettings) -> Row:
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: data.max_length]
    if len(tokens) < 2:
        raise DataError(f"the text {text!r} has {len(tokens)} tokens; a language model says something from the second on. Give more.")
    return {"input_ids": tokens, "text": tokenizer.decode(tokens)}


def _read(model: Any, batch: Mapping[str, Any]) -> int:
    """Return the class that the model reads in a row."""
    device = next(model.parameters()).device
    with only_looking(model, device):
        logits = model(**{key: values.to(device) for key, values in batch.items() if key != "labels"}).logits
    return int(logits[0].argmax())
