"""Ask a small language model: how it goes on after a prompt, and what of its training data made it say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from whence.evaluate.baselines import only_looking
from whence.recipes.base import Recipe
from whence.tasks.likelihoods import IGNORE

TOKENS, TEMPERATURE = 32, 0.3


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A training row that speaks for what the model says: its score, and where it stands."""

    row: int
    score: float
    module: str
    name: str
    file: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model says after a prompt, and the rows it learned this from, the strongest first."""

    prompt: str
    says: str
    learned: tuple[Learned, ...] = ()

    def lines(self) -> list[str]:
        """Return the reply as lines for people."""
        shown = [
            f"  {rank}. {one.module}.{one.name}  ({one.file}, line {one.line})  {one.score:+.3g}"
            for rank, one in enumerate(self.learned, 1)
        ]
        return ["Asked:", *_inset(self.prompt), "It says:", *_inset(self.says), "It learned this from:", *shown]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def _inset(text: str) -> list[str]:
    # A model may say anything, also what a terminal takes for a command.
    shown = "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text.strip("\n"))
    return [f"  | {line}".rstrip() for line in shown.split("\n")]


def answers(recipe: Recipe, folder: Path, prompts: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """Let the model go on after each prompt; return queries whose loss is that of what it said, the prompt being given.

    Args:
        recipe: with a language model.
        folder: with the model's tokenizer.
        prompts: texts of at least a token each.
        seed: of what is drawn.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in prompts:
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = _continuation(recipe.model, given, tokenizer.eos_token_id, generator)
        text = tokenizer.decode(said, skip_special_tokens=True)
        labels = [IGNORE] * len(given) + said
        rows.append({"input_ids": [*given, *said], "labels": labels, "prompt": prompt, "says": text, "text": f"{prompt} ▸{text}"})
    return rows


def _continuation(model: Any, given: list[int], end: int, generator: torch.Generator) -> list[int]:
    """Draw tokens until the end of text, the most that are asked for, or all positions of the model."""
    device, tokens = next(model.parameters()).device, list(given)
    most = min(len(given) + TOKENS, int(model.config.n_positions))
    with only_looking(model, device):
        while len(tokens) < most:
            logits = model(torch.tensor([tokens], device=device)).logits[0, -1].double().cpu()
            drawn = int(torch.multinomial((logits / TEMPERATURE).softmax(0), 1, generator=generator))
            tokens.append(drawn)
            if drawn == end:
                break
    return tokens[len(given) :]


def learned(recipe: Recipe, hits: Sequence[tuple[int, float]]) -> tuple[Learned, ...]:
    """Return the rows of an answer with where they stand; those that speak against it are left out."""
    assert recipe.raw is not None
    places = ("module", "name", "file", "line")
    return tuple(Learned(row=row, score=score, **{key: recipe.raw[row][key] for key in places}) for row, score in hits if score > 0)
