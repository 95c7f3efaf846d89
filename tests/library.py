"""A small standard library: a few modules of this Python, copied into a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from whence.recipes import functions

MODULES = ("argparse.py", "bisect.py", "calendar.py", "heapq.py", "json", "random.py", "shutil.py", "statistics.py", "textwrap.py")


def write_library(folder: Path) -> Path:
    for name in MODULES:
        source = functions.library() / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


def use_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let recipes read this folder as the standard library."""
    monkeypatch.setattr(functions, "library", lambda: folder)
    monkeypatch.setattr(functions, "HELD_OUT_EVERY", 12)
