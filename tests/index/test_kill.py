"""An index whose process is killed, three times, and started again: nothing of it is to be seen afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

SHARDS = 24
RECIPE = """
import torch
from torch import nn

import whence


def tiny():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(94, 4, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    rows = [(x, int(x[0] > 0)) for x in inputs]
    return whence.Recipe(name="tiny", model=model, task=whence.tasks.Classification(), train=rows, queries=rows[:3])
"""
# The command line with shards of four rows, each of which takes a moment and is noted when it begins.
PROGRAM = """
import os, sys, time
from whence.index import writer
from whence.cli.main import main

writer.BLOCK, writer.SHARD_BYTES = 4, 1
real = writer.IndexWriter._shard

def noted(own, rows, places, advance):
    with open("log", "a") as file:
        file.write(f"{places.start}\\n")
    time.sleep(float(os.environ["MOMENT"]))
    return real(own, rows, places, advance)

writer.IndexWriter._shard = noted
sys.exit(main(sys.argv[1:]))
"""


def started(folder: Path, moment: float) -> subprocess.Popen[bytes]:
    """Start the command in a folder."""
    arguments = ["index", "recipe.py:tiny", "--strategy", "identity", "--keep", "1", "--run-dir", "run"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env={**os.environ, "MOMENT": str(moment)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def written(folder: Path) -> int:
    return len(list((folder / "run/index/identity").glob("*rows-*.safetensors")))


def made_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.py").write_text(RECIPE, encoding="utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Return everything in a run folder, left-over temporary files too, but locks and the log of commands, which holds times."""
    found = (path for path in (folder / "run").rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != "run.json"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_three_kills_leave_the_files_of_an_undisturbed_run(tmp_path: Path) -> None:
    smooth, killed = made_in(tmp_path / "smooth"), made_in(tmp_path / "killed")
    assert started(smooth, 0).wait(timeout=120) == 0
    assert written(smooth) == SHARDS
    # The wait is up to the moment that a shard takes, so that kills come while it is computed and while it is written.
    for shards, later in ((1, 0.0), (9, 0.1), (SHARDS - 5, 0.2)):
        process = started(killed, 0.2)
        deadline = time.monotonic() + 120
        while written(killed) < shards:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert shards <= written(killed) < SHARDS
    assert started(killed, 0).wait(timeout=120) == 0
    wanted, found = files(smooth), files(killed)
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    begun = Counter((killed / "log").read_text().split())
    assert len(begun) == SHARDS
    assert SHARDS < sum(begun.values()) <= SHARDS + 3, f"a kill costs more than the shard at work: {begun}"
