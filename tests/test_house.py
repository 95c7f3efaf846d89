"""The house rules that a machine can hold: direction of imports, sizes, docstrings, no pickle, honest exports."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import whence

SRC = Path(whence.__file__).parent
ROOT = SRC.parents[1]
FILES = sorted(SRC.rglob("*.py"))

# Top to bottom: what stands on a line may import what stands on it or below it. The root package only passes names on,
# so it stands just above what it passes on.
ORDER = [
    "__main__",
    "cli",
    "demo",
    "serve",
    "evidence",
    "report",
    "__init__",
    "checkpoints",
    "attributor",
    "linearising",
    "indexing",
    "tokenwise",
    "plan",
    "workbench",
    "recipes",
    "pretrained",
    "refit",
    "evaluate",
    "index",
    "scores",
    "masks",
    "curvature",
    "capture",
    "storage",
    "runtime",
    "tasks",
    "errors",
]
# The version is a constant in the root package; the files that runs write record it.
CONSTANTS = {"whence.__version__"}
PICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
EXTRAS = {
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "jinja2",
    "matplotlib",
    "starlette",
    "uvicorn",
    "faiss",
    "dask",
    "ray",
    "torch_xla",
}
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


def part_of(module: str) -> str:
    """Return the line of ORDER that a module such as `whence.scores.matrix` belongs to."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def module_of(path: Path) -> str:
    pieces = ["whence", *path.relative_to(SRC).with_suffix("").parts]
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Give line and name of every whence module that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            names = [f"whence.{alias.name}" for alias in node.names] if node.module == "whence" else [node.module or ""]
        else:
            continue
        for name in names:
            if name not in CONSTANTS and name.split(".")[0] == "whence":
                # `from whence import Attributor` is an import of the root package, `from whence import tasks` of tasks.
                known = name == "whence" or part_of(name) in ORDER
                yield node.lineno, name if known else "whence"


def definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def rejected(path: Path, module: str) -> list[str]:
    rank = {name: place for place, name in enumerate(ORDER)}
    own = part_of(module)
    assert own in rank, f"{path} is new: give {own!r} its place in ORDER (tests/test_house.py) and in CONTRIBUTING.md"
    upward = [(line, name) for line, name in imported(path) if rank[part_of(name)] < rank[own]]
    return [f"{path}:{line}: {own} must not import {name}, which stands above it" for line, name in upward]


def test_imports_point_downwards() -> None:
    wrong = [line for path in FILES for line in rejected(path, module_of(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from whence.cli.main import main", True),
        ("import whence.attributor as a", True),
        ("def f():\n    from whence import Attributor", True),
        ("if TYPE_CHECKING:\n    from whence.curvature.fit import Fitter", True),
        ("from whence import tasks, errors", False),
        ("from whence.capture.pair import Pair\nfrom whence import __version__", False),
    ],
)
def test_the_check_of_imports_sees_them(tmp_path: Path, source: str, wrong: bool) -> None:
    path = tmp_path / "probe.py"
    path.write_text(source, encoding="utf-8")
    assert bool(rejected(path, "whence.capture.probe")) is wrong


def test_files_and_functions_are_short() -> None:
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > LONGEST_FILE:
            long.append(f"{path}: {lines} lines, at most {LONGEST_FILE}")
        for node in definitions(ast.parse(text)):
            if (lines := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION:
                long.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {LONGEST_FUNCTION}")
    assert not long, "\n".join(long)


def test_the_order_is_written_down() -> None:
    written = " > ".join(name for name in ORDER if not name.startswith("__"))
    assert written in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_everything_that_is_installed_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in ("hf", "report", "serve", "faiss", "tutorials", "dev") for name in project["optional-dependencies"][extra]),
    ]
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = {name.lower().replace("_", "-") for name in pins}
    missing = [want for want in wanted if re.split(r"[^\w.-]", want)[0].lower().replace("_", "-") not in plain]
    assert not missing, f"constraints.txt does not pin {missing}"


def test_nothing_goes_through_pickle() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{path}:{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLE]
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save", "joblib.load", "joblib.dump"):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)} uses pickle")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{path}:{node.lineno}: allow_pickle")
    assert not found, "\n".join(found)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_nodes(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public_nodes(child, f"{prefix}.{child.name}")


def test_public_things_have_docstrings() -> None:
    missing = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(tree) is None:
            missing.append(str(path))
        missing += [name for name, node in public_nodes(tree, module_of(path)) if ast.get_docstring(node) is None]
    assert not missing, "no docstring: " + ", ".join(missing)


def test_configuration_is_keyword_only() -> None:
    """Options and exported dataclasses made by position would break when a field is added in the middle."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and (node.name.endswith("Options") or node.name in {"Damping", "Recipe", "Scores"}):
                marks = " ".join(map(ast.unparse, node.decorator_list))
                if "kw_only=True" not in marks:
                    wrong.append(f"{path}:{node.lineno}: {node.name} is not a dataclass with kw_only=True")
    assert not wrong, "\n".join(wrong)


def test_every_exported_name_exists() -> None:
    assert whence.__all__ == sorted(whence.__all__)
    assert set(whence._LAZY) <= set(whence.__all__)
    for name in whence.__all__:
        value = getattr(whence, name)
        assert name.startswith("__") or inspect.getdoc(value), f"whence.{name} has no docstring"
    assert dir(whence) == whence.__all__


def test_other_lists_of_exports_are_true() -> None:
    for info in pkgutil.walk_packages([str(SRC)], "whence."):
        if info.name == "whence.__main__":
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", [])
        assert list(names) == sorted(names), f"{info.name}.__all__ is not sorted"
        missing = [name for name in names if not hasattr(module, name)]
        assert not missing, f"{info.name}.__all__ names {missing}, which do not exist"


def test_a_name_that_does_not_exist_is_an_error_that_lists_those_that_do() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Atributor'; it exports Attributor, "):
        whence.Atributor  # noqa: B018


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that are loaded after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stderr.split())


def test_importing_whence_is_quick() -> None:
    loaded = loaded_after("import whence")
    assert not loaded & {*EXTRAS, "torch", "numpy", "sklearn", "scipy", "pyarrow", "rich", "cyclopts"}


def test_the_library_needs_no_extra() -> None:
    loaded = loaded_after("import whence\nfor name in whence.__all__: getattr(whence, name)")
    assert not loaded & EXTRAS
    assert "cyclopts" not in loaded, "the library must not import the command line's parser"


def test_help_does_not_import_torch() -> None:
    loaded = loaded_after("from whence.cli.main import main\nassert main(['--help']) == 0\nassert main(['fit', '--help']) == 0")
    assert not loaded & {*EXTRAS, "torch", "numpy"}
