"""Data under the hub's column names and a tiny trained model of every recipe, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import finetuned


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all data sets, as WHENCE_DATA names one."""
    return finetuned.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a trained model by its name in `finetuned.SETTINGS`; tests only read in it."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if not (folder / name / "whence.json").exists():
            finetuned.trained(name, data, folder / name)
        return folder / name

    return get


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    finetuned.offline_and_quick(monkeypatch)
