"""Arguments that people get wrong: one clear error, and nothing outside of the run folder is ever touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cases
import whence
from whence.errors import ConfigError, MismatchError
from whence.tasks import Classification

ROWS = [(torch.randn(4, generator=torch.Generator().manual_seed(n)).double(), n % 3) for n in range(9)]


def attributor(folder: Path) -> whence.Attributor:
    model = cases.build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return whence.Attributor(model, Classification(), run_dir=folder, device="cpu", progress=False).fit(ROWS)


@pytest.mark.parametrize("name", ["..", "../factors/ekfac", "a/b", "/abs", "", ".hidden"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    made = attributor(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="cannot name a folder"):
        made.scores(ROWS, ROWS, name=name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    made.scores(ROWS, ROWS)  # the factors are whole


def test_rows_may_be_a_tensor(tmp_path: Path) -> None:
    made = attributor(tmp_path)
    suspects = made.self_influence(ROWS).argsort(descending=True)[:3]
    scores = made.scores(ROWS, ROWS, train_rows=suspects, query_rows=range(2), name="some")
    assert scores.train_rows == suspects.tolist()
    assert scores.query_rows == [0, 1]


@pytest.mark.parametrize("rows", [torch.tensor([True] * 9), 3, [0.5], ["a"]])
def test_rows_that_are_no_indices(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(ConfigError, match="training rows must be"):
        attributor(tmp_path).scores(ROWS, ROWS, train_rows=rows)


@pytest.mark.parametrize(
    ("task", "what"), [("classification", "a str"), (Classification, "the class Classification"), (nn.Tanh(), "a Tanh")]
)
def test_what_is_no_task(task: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"task is {what}; give a task object"):
        whence.Attributor(nn.Linear(2, 2), task)


def test_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match=r"model is a str; give a torch\.nn\.Module"):
        whence.Attributor("bert", Classification())  # type: ignore[arg-type]


def test_other_scores_under_one_name_say_how_to_keep_both(tmp_path: Path) -> None:
    made = attributor(tmp_path)
    made.scores(ROWS, ROWS)
    with pytest.raises(MismatchError, match=r"overwrite=True to replace it, or with name='...' to keep both"):
        made.scores(ROWS, ROWS, per_layer=True)
    assert made.scores(ROWS, ROWS, per_layer=True, name="layers").per_layer
    made.self_influence(ROWS)
    made.self_influence(ROWS, on="measurement", name="margin")
