"""A row of a text that somebody asks about: what in the training data made the model say this?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from whence.errors import ConfigError, DataError
from whence.evaluate.embeddings import only_looking
from whence.recipes.family import Family, auto_of
from whence.recipes.prompted import Prompted
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings
from whence.tasks.likelihoods import IGNORE

LANGUAGE_MODEL = "AutoModelForCausalLM"
NEW_TOKENS = 32

Encode = Callable[[Mapping[str, Any]], Row]


def encoder(family: Family, model: Any, tokenizer: Any, collate: Callable[[list[Row]], Any], data: DataSettings) -> Encode:
    """Return what makes a row to ask about of a raw row, with the columns of the data set.

    A language model is asked for the row's text, or its answer to a prompt, a classifier for the row's label; without one, for
    the class that it reads in the row now.
    """
    columns, label = data.columns or (), str(data.label)
    language = auto_of(family, model.config) == LANGUAGE_MODEL

    def labelled(raw: Mapping[str, Any]) -> Row:
        try:
            return family.encode(tokenizer, model.config, [dict(raw)], data)[0]
        except DataError as error:
            # The number within a list of one says nothing; who gave the row knows its place.
            raise DataError(re.sub(r"^(data: )?(row 0|a row) ", "the row ", str(error))) from None

    def encode(raw: Mapping[str, Any]) -> Row:
        if isinstance(family, Prompted):
            return _said(tokenizer, str(raw["text"]), data) if language and raw.keys() == {"text"} else labelled(raw)
        missing = [column for column in columns if raw.get(column) is None]
        if missing:
            also = "" if language else f", and {label} for another class than the model reads"
            has = ", ".join(map(str, raw)) or "nothing"
            raise DataError(f"the row has no {missing[0]!r}; it has {has}. Give {', '.join(columns)}{also}.")
        if language:
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
        columns = ("text",) if isinstance(family, Prompted) else data.columns or ()
        if len(columns) != 1:
            raise ConfigError(f"a text alone is no row of recipe {family.name}, whose rows have several texts; ask about its queries.")
        return encode({columns[0]: text})

    return ask


def generator(family: Family, model: Any, tokenizer: Any, data: DataSettings) -> Callable[[str], Row] | None:
    """Return what makes a row of a text and of what the model itself goes on with; None: the model generates nothing.

    Only the continuation is measured: the tokens of the text have no labels. It is the likeliest token at every step.
    """
    if not (auto_of(family, model.config) == LANGUAGE_MODEL and callable(getattr(model, "generate", None))):
        return None

    def generate(text: str) -> Row:
        begun = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = int(data.max_length or 512)
        if not 1 <= len(begun) < longest:
            raise DataError(f"the text has {len(begun)} tokens; to go on with it, the model needs 1 to {longest - 1}. Give another.")
        device = next(model.parameters()).device
        ids = torch.tensor([begun], device=device)
        with only_looking(model, device):
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(NEW_TOKENS, longest - len(begun)),
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        tokens = made[0].tolist()
        if len(tokens) == len(begun):
            raise DataError("the model goes on with nothing. Give another text, or ask about this one itself.")
        labels = [IGNORE] * len(begun) + tokens[len(begun) :]
        said = [tokenizer.decode(part) for part in (tokens, tokens[len(begun) :])]
        return {"input_ids": tokens, "labels": labels, "text": said[0], "continuation": said[1]}

    return generate


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
