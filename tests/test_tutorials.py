"""The tutorials are valid notebooks that were executed, without errors and without paths of the machine that did it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs/tutorials"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|work|var|Users|private)/|[A-Z]:\\\\|0x[0-9a-f]{8,}")


def notebook(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorials_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_for_a_classifier_and_one_for_a_language_model() -> None:
    assert NAMES == ["digits", "stdlib"]
    assert set(maker().NAMES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_code_compiles_and_imports_what_exists(name: str) -> None:
    for cell in code_cells(name):
        tree = ast.parse(text_of(cell["source"]))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("whence"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_there_without_errors_or_places(name: str) -> None:
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "executed in order, in one go"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    for output in outputs:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        texts = [output.get("text", ""), *(value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))]
        for text in map(text_of, texts):
            assert not MACHINE.search(text), MACHINE.search(text)
    assert set(notebook(name)["metadata"]) == {"kernelspec"}
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for cell in notebook(name)["cells"]:
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([^)#]+)", text_of(cell["source"])):
                assert (FOLDER / link).exists(), link


def test_what_is_of_one_machine_is_taken_out() -> None:
    clean = maker().clean
    assert clean("/tmp/x1/runs/digits and /tmp/x1", "/tmp/x1") == "runs/digits and ."
    assert clean("<object at 0x7f00aa>", "/tmp/x1") == "<object>"


@pytest.mark.slow
def test_the_classifier_tutorial_runs() -> None:
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(package)
    made = maker().execute(FOLDER / "digits.ipynb", timeout=600)
    shown = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 4
    assert any("120 of them with a wrong label" in output.get("text", "") for output in shown)
