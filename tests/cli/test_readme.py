"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import whence

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(here: Path) -> None:
    recipe = whence.load_recipe("recipe.py:tiny")
    code, _ = BLOCKS
    names: dict[str, Any] = {"model": recipe.model, "train": recipe.train, "queries": recipe.queries}
    exec(compile(code, "README.md", "exec"), names)
    assert names["scores"].values.shape == (7, 23)
    assert len(names["suspects"]) == 23


def test_the_python_for_hugging_face_runs(here: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).save_pretrained(here / "model")
    rows = [{"input_ids": torch.randint(1, 20, (6,)), "labels": n % 2} for n in range(9)]
    names: dict[str, Any] = {"whence": whence, "tokenised_train": rows, "tokenised_queries": rows[:2]}
    exec(compile(BLOCKS[1].replace("path-or-name", str(here / "model")), "README.md", "exec"), names)
    assert (here / "runs" / "mine" / "scores" / "ekfac").exists()


def test_the_commands_of_the_readme_run(run: Any, here: Path) -> None:
    (here / "recipe.py").write_text((here / "recipe.py").read_text(encoding="utf-8") + "\n\nmine = tiny\n", encoding="utf-8")
    commands = re.findall(r"^    whence (.*)$", README, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        done = run(*shlex.split(command, comments=True))
        assert done.status == 0, f"{command}: {done.err}"


def test_links_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()]
    assert not missing, f"README.md links to {missing}, which do not exist"
    verbs = re.findall(r"^    make ([a-z-]+)", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{verb}: " in makefile for verb in verbs)
