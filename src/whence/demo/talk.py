"""Ask a small language model: how it goes on after a prompt, and what of its training data made it say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from whence.errors import ConfigError
from whence.recipes.base import Recipe


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


def answers(recipe: Recipe, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Let the model go on after each prompt; return queries whose loss is that of what it said, the prompt being given.

    Raises:
        ConfigError: the recipe's model does not go on after texts. DataError: it goes on with nothing, or a prompt is too long.
    """
    if recipe.generate is None:
        raise ConfigError(f"the model of recipe {recipe.name} does not go on after texts. Take a recipe of a language model.")
    made = [recipe.generate(prompt) for prompt in prompts]
    return [
        {**row, "prompt": prompt, "says": row["continuation"], "text": f"{prompt} ▸{row['continuation']}"}
        for prompt, row in zip(prompts, made, strict=True)
    ]


def learned(recipe: Recipe, hits: Sequence[tuple[int, float]]) -> tuple[Learned, ...]:
    """Return the rows of an answer with where they stand; those that speak against it are left out."""
    assert recipe.raw is not None
    places = ("module", "name", "file", "line")
    return tuple(Learned(row=row, score=score, **{key: recipe.raw[row][key] for key in places}) for row, score in hits if score > 0)
