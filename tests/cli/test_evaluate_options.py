"""Options that the verbs of evaluate, plan and clean share: they do something, or are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MINE = "recipe.py:tiny"

FEW = """
import torch
from torch.utils.data import default_collate

import whence


def at_most_two(rows):
    if len(rows) > 2:
        raise ValueError("more than two rows at a time")
    return default_collate(rows)


def few():
    recipe = whence.load_recipe("recipe.py:tiny")
    recipe.collate, recipe.queries = at_most_two, recipe.queries[:2]
    recipe.flipped = torch.arange(23) % 5 == 0
    return recipe
"""


@pytest.mark.parametrize(
    "asked",
    [
        ["tail-patch", "--scores", "identity", "--k", "3"],
        ["mislabeled", "--strategy", "identity"],
        ["duplicates", "--strategy", "identity", "--count", "2"],
    ],
    ids=lambda asked: asked[0],
)
def test_batches_are_as_large_as_asked_for(run: Any, here: Path, asked: list[str]) -> None:
    (here / "few.py").write_text(FEW, encoding="utf-8")
    assert run("score", "few.py:few", "--strategy", "identity", "--batch-size", "2").status == 0
    verb, *options = asked
    done = run("evaluate", verb, "few.py:few", *options, "--batch-size", "2")
    assert done.status == 0, done.err
    assert "more than two rows at a time" in run("evaluate", verb, "few.py:few", *options).err


@pytest.mark.parametrize(
    ("verb", "option"),
    [
        (["evaluate", "lds", MINE, "--scores", "ekfac"], "--overwrite"),
        (["evaluate", "counterfactual", MINE, "--scores", "ekfac", "--remove", "2"], "--overwrite"),
        (["evaluate", "tail-patch", MINE, "--scores", "ekfac"], "--overwrite"),
        (["evaluate", "mislabeled", MINE], "--overwrite"),
        (["evaluate", "duplicates", MINE], "--overwrite"),
        (["plan", MINE], "--overwrite"),
        (["plan", MINE, "--draws"], "1"),
        (["plan", MINE, "--name"], "mine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_options_without_a_meaning_are_not_there(run: Any, verb: list[str], option: str) -> None:
    done = run(*verb, option)
    assert done.status == 2
    assert "Unknown option" in done.err
