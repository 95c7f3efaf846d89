"""The documented functions, methods and classes of the standard library of the Python that runs; read, never imported."""

from __future__ import annotations

import ast
import platform
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from whence.errors import DataError
from whence.recipes.rows import Row

HELD_OUT_EVERY = 60
"""One function of so many is held out, to be asked about."""

# Tests and tools, what is there on some systems alone, interfaces to other programs, tables, and what is very large for what it is.
# fmt: off
_SKIPPED = frozenset({
    "__pycache__", "_pyrepl", "config", "ctypes", "curses", "dbm", "dist-packages", "distutils", "encodings", "ensurepip",
    "idlelib", "imaplib", "importlib", "lib-dynload", "lib2to3", "mailbox", "msilib", "multiprocessing", "nntplib", "pydoc_data",
    "site-packages", "sqlite3", "test", "tests", "tkinter", "turtle", "turtledemo", "unittest",
})
# fmt: on
_PURE = {"_collections_abc": "collections.abc", "_pydatetime": "datetime", "_pydecimal": "decimal"}
"""Files with an underscore that are the Python source of public modules."""
_LINES = 60
"""Lines of source that are kept of a row; the tokenizer cuts further."""

PROMPTS = (
    'def median(data):\n    """Return the',
    'def close(self):\n    """Close',
    'def copyfile(src, dst):\n    """Copy',
    'def dumps(obj):\n    """Serialize',
    'def warning(self, msg, *args):\n    """Log',
    'class Handler:\n    """A handler class which',
    'def acquire(self, timeout=None):\n    """Acquire',
    'def is_private(self):\n    """Return True if',
)
"""Beginnings of functions written by hand, to be asked about."""


def version() -> str:
    """Return the name of what is read, for people."""
    return f"the standard library of Python {platform.python_version()}"


def library() -> Path:
    """Return the folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def functions(folder: Path | None = None) -> list[Row]:
    """Return a row per documented public function, method or class, by file name and line.

    A row is `{"module", "name", "file", "line", "text"}`: the text is a comment with the full name, then the source from its
    first decorator on; of a class what stands before its first method.

    Args:
        folder: of the library; None: the one of this interpreter.

    Raises:
        DataError: there is no source.
    """
    root = library() if folder is None else folder
    found = list(_found(root))
    if not found:
        raise DataError(f"{root} holds no source of Python's standard library. Use a Python that comes with its .py files.")
    return found


def split(name: str) -> list[Row]:
    """Return the rows of `"train"`, or of `"validation"`: prompts by hand, then functions that are held out.

    Raises:
        DataError: there is no source.
    """
    rows = _all(library())
    if name == "train":
        return [row for place, row in enumerate(rows, start=1) if place % HELD_OUT_EVERY]
    prompts = [{"module": "", "name": "prompt", "file": "", "line": 0, "text": text} for text in PROMPTS]
    return [*prompts, *rows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]]


@lru_cache(maxsize=1)
def _all(folder: Path) -> tuple[Row, ...]:
    # Both splits are asked for, and reading takes seconds.
    return tuple(functions(folder))


def _found(root: Path) -> Iterator[Row]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith("config-") or (parts[0].startswith("_") and parts[0] not in _PURE):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and data that only look like a module
        module = ".".join([_PURE.get(parts[0], parts[0]), *parts[1:]]).removesuffix(".__init__")
        lines = source.splitlines()
        for name, node in _definitions(tree.body, ""):
            row = {"module": module, "name": name, "file": path.relative_to(root).as_posix(), "line": node.lineno}
            yield row | {"text": f"# {module}.{name}\n{_source(lines, node)}"}


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, _Definition]]:
    """Give documented public definitions with their qualified names, also those below `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _definitions(node.body, prefix)
        if not isinstance(node, _Definition) or (node.name.startswith("_") and not node.name.endswith("__")):
            continue
        if ast.get_docstring(node) is not None:
            yield f"{prefix}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")


def _source(lines: list[str], node: _Definition) -> str:
    first = min([node.lineno, *(part.lineno for part in node.decorator_list)])
    last = node.end_lineno or node.lineno
    if isinstance(node, ast.ClassDef):
        inner = [part for part in node.body if isinstance(part, _Definition)]
        starts = [min([part.lineno, *(one.lineno for one in part.decorator_list)]) for part in inner[:1]]
        last = min([last, *(start - 1 for start in starts)])
    return textwrap.dedent("\n".join(lines[first - 1 : min(last, first - 1 + _LINES)])).rstrip() + "\n"
