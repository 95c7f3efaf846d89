"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import whence

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(here: Path) -> None:
    recipe = whence.load_recipe("recipe.py:tiny")
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {"model": recipe.model, "train": recipe.train, "queries": recipe.queries}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].values.shape == (7, 23)
    assert len(names["suspects"]) == 23


def test_the_commands_of_the_readme_run(run: Any, here: Path) -> None:
    (here / "recipe.py").write_text((here / "recipe.py").read_text(encoding="utf-8") + "\n\nmine = tiny\n", encoding="utf-8")
    commands = re.findall(r"^    whence (.*)$", README, flags=re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = run(*shlex.split(command))
        assert done.status == 0, f"{command}: {done.err}"


def test_links_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert not missing, f"README.md links to {missing}, which do not exist"
    verbs = re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{verb}: " in makefile for verb in verbs)
