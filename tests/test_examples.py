"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(path: Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, path], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    assert [path.name for path in EXAMPLES] == ["01_five_lines.py", "02_tokens_and_solvers.py"]


def test_the_five_lines_find_like_digits(tmp_path: Path) -> None:
    """The strongest proponent of the first test digit shows the same digit."""
    first, *_, last = run(EXAMPLES[0], tmp_path).splitlines()
    digit = first.split(":")[0].removeprefix("test digit ")
    assert f"a {digit}, score +" in first
    assert last.startswith("most unusual training rows: [")


def test_tokens_and_solvers_agree(tmp_path: Path) -> None:
    """The exact solver's scores are those of a converged one, and the words that decide are found."""
    printed = run(EXAMPLES[1], tmp_path)
    assert "exact: correlation 1.000 with the exact inverse" in printed
    of, found = (int(number) for number in re.findall(r"\d+", printed.splitlines()[-1])[:2])
    assert found >= 15, printed
    assert of == 20
