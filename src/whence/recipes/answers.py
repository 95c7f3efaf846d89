"""Whether a model's answers are right: by the option that it prefers, and by what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ConfigError
from whence.evaluate.embeddings import only_looking
from whence.recipes.base import Options, Recipe
from whence.recipes.rows import Row
from whence.recipes.training import measure
from whence.refit.predict import chosen
from whence.tasks import CausalLM, Seq2SeqLM
from whence.tasks.likelihoods import IGNORE

_STEM = re.compile(r"\bthe answer is\b:?[ \t]*", re.IGNORECASE)
_END = re.compile(r"[.!?](?=\s|$)")
"""Of a sentence: a point within a number is none."""
_BATCH = 32


def option_losses(model: nn.Module, options: Options, collate: Callable[[list[Any]], Any], *, batch_size: int = _BATCH) -> Tensor:
    """Return the mean loss per trained token of every option, float64 `[option row]`."""
    inner: Any = model
    task = Seq2SeqLM() if getattr(inner.config, "is_encoder_decoder", False) else CausalLM()
    # The first token of a decoder's row is never predicted, and never of an answer.
    tokens = torch.tensor([sum(label != IGNORE for label in row["labels"]) for row in options.rows], dtype=torch.float64)
    return measure(model, task, options.rows, collate, batch_size) / tokens


def right_by_losses(losses: Tensor, options: Options) -> Tensor:
    """Return for every query whether its least loss is that of the true option, float64 `[query]`; a tie has its share.

    As `whence.refit.predict.chosen`, which estimates are compared by.

    Args:
        losses: mean loss per token, `[option row]`.
        options: whose they are.
    """
    return chosen(losses.double(), options.query, options.gold, "accuracy")


def right_options(recipe: Recipe, *, batch_size: int = _BATCH) -> Tensor:
    """Return for every query whether the model finds the true option the likeliest, by mean loss per token; float64 `[query]`.

    Of options that are equally likely, the true one has its share.

    Raises:
        ConfigError: the recipe's queries have no options.
    """
    if recipe.options is None or recipe.collate is None:
        raise ConfigError(f"the queries of recipe {recipe.name} choose from no options; take a recipe that has some, such as cot.")
    return right_by_losses(option_losses(recipe.model, recipe.options, recipe.collate, batch_size=batch_size), recipe.options)


def parse_answer(text: str) -> str | None:
    """Return what a text says its answer is, in lower case: from the last "The answer is" to the end of the sentence or line.

    None: it says none.
    """
    said = _after_stem(text)
    return None if said is None else plain(_END.split(said, maxsplit=1)[0]) or None


def says(text: str, answer: str) -> bool:
    """Return whether a text gives this answer after its last "The answer is", as a sentence; the answer may have points, as "St. Ives"."""
    said, wanted = plain(_after_stem(text) or ""), plain(answer)
    return bool(wanted) and said.startswith(wanted) and (said == wanted or _END.match(said, len(wanted)) is not None)


def _after_stem(text: str) -> str | None:
    """Return the rest of the line after the last "The answer is"; None: it is not there."""
    found = list(_STEM.finditer(text))
    return text[found[-1].end() :].split("\n", 1)[0] if found else None


def plain(answer: str) -> str:
    """Return an answer as it is compared: lower case, no full stop, single spaces."""
    return " ".join(answer.lower().split()).rstrip(".").strip()


def said_answers(recipe: Recipe, tokenizer: Any, *, rows: Sequence[Row] | None = None, new_tokens: int = 128) -> list[str]:
    """Return what the model says after the prompt of every query, the likeliest token at each step.

    One query at a time: prompts of several lengths in one batch would need padding on the left, which moves positions.

    Args:
        recipe: of prompts and answers.
        tokenizer: the model's.
        rows: encoded rows; None: the recipe's queries.
        new_tokens: how many tokens at most.
    """
    model: Any = recipe.model
    device = next(model.parameters()).device
    reads = bool(getattr(model.config, "is_encoder_decoder", False))
    longest = None if reads else getattr(model.config, "max_position_embeddings", None)
    said = []
    with only_looking(model, device):
        for row in recipe.queries if rows is None else rows:
            prompt = list(row["input_ids"]) if reads else prompt_of(row)
            room = new_tokens if longest is None else min(new_tokens, longest - len(prompt))
            ids = torch.tensor([prompt], device=device)
            end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(1, room), do_sample=False, **end)
            new = made[0].tolist()[1 if reads else len(prompt) :]
            said.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return said


def right_by_saying(recipe: Recipe, tokenizer: Any, *, rows: Sequence[Row] | None = None, new_tokens: int = 128) -> Tensor:
    """Return for every query whether what the model says gives the true answer, bool `[query]`; arguments as of `said_answers`.

    Raises:
        ConfigError: a row has no answer to compare with.
    """
    rows = list(recipe.queries if rows is None else rows)
    if not all("answer" in row for row in rows):
        raise ConfigError(f"the queries of recipe {recipe.name} have no answer to compare with; take a recipe that has, such as cot.")
    said = said_answers(recipe, tokenizer, rows=rows, new_tokens=new_tokens)
    return torch.tensor([says(text, row["answer"]) for text, row in zip(said, rows, strict=True)], dtype=torch.bool)


def prompt_of(row: Row) -> list[int]:
    """Return the tokens that a decoder reads before the answer of an encoded row."""
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORE)
    return list(row["input_ids"][:first])
