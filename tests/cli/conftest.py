"""A tiny recipe in a file, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import finetuned
from whence.cli.main import main

RECIPE = """
import torch
from torch import nn

import whence


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator)
    return [(x, int(x[0] > 0)) for x in inputs]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def tiny():
    return whence.Recipe(
        name="tiny",
        model=network(),
        task=whence.tasks.Classification(),
        train=rows(23, 1),
        queries=rows(7, 2),
        describe=lambda row: f"class {row[1]}",
    )


def silent():
    recipe = tiny()
    recipe.describe = None
    return recipe


def broken_model():
    recipe = tiny()
    recipe.model[1].forward = lambda x: x.no_such_method()
    return recipe


def not_finite():
    recipe = tiny()
    with torch.no_grad():
        recipe.model[2].weight[0, 0] = float("nan")
    return recipe


def interrupted():
    raise KeyboardInterrupt


number = 3
"""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What one command left: exit status, and both streams."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The JSON on standard output."""
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that holds recipe.py."""
    (tmp_path / "recipe.py").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, in a folder with recipe.py."""

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = main(arguments)
        streams = capsys.readouterr()
        return Done(status=status, out=streams.out, err=streams.err)

    return call


@pytest.fixture
def offline_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `finetuned.offline_and_quick`."""
    finetuned.offline_and_quick(monkeypatch)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> finetuned.Place:
    """Train, fit and score a tiny model of every family, once for all tests; they leave it as it is."""
    folder = tmp_path_factory.mktemp("finetuned")
    found = finetuned.Place(data=finetuned.write_data(folder / "data"), models=folder / "models", runs=folder / "runs")
    for name in finetuned.NAMES:
        finetuned.trained(name, found.data, found.models / name)
        for verb in ("fit", "score"):
            assert main([verb, *found.options(name), "--strategy", "ekfac"]) == 0
    assert main(["score", *found.options("sst2"), "--strategy", "identity"]) == 0
    return found
