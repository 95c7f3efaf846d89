"""A row of a text that somebody asks about: what in the training data made the model say this?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whence.errors import ConfigError, DataError
from whence.evaluate.baselines import only_looking
from whence.recipes.family import Family
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings


def asker(family: Family, model: Any, tokenizer: Any, collate: Callable[[list[Row]], Any], data: DataSettings) -> Callable[[str], Row]:
    """Return what makes a row of a text.

    A language model is asked for the text, a classifier of single texts for the class that it reads in it now.
    """

    def ask(text: str) -> Row:
        if family.joins_rows:
            return _said(tokenizer, text, data)
        columns = data.columns or ()
        if len(columns) != 1:
            raise ConfigError(f"a text alone is no row of recipe {family.name}, whose rows have several texts; ask about its queries.")
        if model.config.num_labels < 2:
            raise ConfigError(f"the model of recipe {family.name} predicts a number, and reads no class in a text; ask about its queries.")

        def row(label: int) -> Row:
            return family.encode(tokenizer, model.config, [{columns[0]: text, str(data.label): label}], data)[0]

        # Made anew with the class that is read: what people read of a row names its class too.
        return row(_read(model, collate([row(0)])))

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
