"""What the recipe stdlib makes of Python's own source."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import library
from finetuned import started
from whence.errors import ConfigError, DataError
from whence.recipes import functions
from whence.recipes.base import load_recipe
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import train_recipe
from whence.recipes.settings import DataSettings, TrainingSettings

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SOURCE = '''
    """A module."""
    import sys
    raise SystemExit("nobody may import this")

    @cache
    def outer(a, *, b=1):
        """Say what outer does."""
        return a

    def silent(): pass

    def _private():
        """Nobody reads this."""

    class Thing(Base):
        """A thing."""
        size = 3

        @property
        def name(self):
            """Its name."""

        def __len__(self):
            """Its length."""

    class Bare:
        def method(self):
            """Of a class without a docstring."""

    try:
        import fast
    except ImportError:
        pass
    if sys.platform == "win32":
        def windows():
            """Only there."""
'''


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name in ("thing.py", "package/__init__.py", "package/sub.py", "test/test_thing.py", "package/tests/test_it.py", "_inner.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(dedent(SOURCE), encoding="utf-8")
    (root / "_pydecimal.py").write_text('def exp(x):\n    """E to the x."""\n', encoding="utf-8")
    (root / "site-packages").mkdir()
    (root / "site-packages/other.py").write_text('def f():\n    """Not of the library."""\n', encoding="utf-8")
    (root / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (root / "latin.py").write_bytes(b'# \xe9\ndef f():\n    """In another encoding."""\n')
    return root


NAMES = ["outer", "Thing", "Thing.name", "Thing.__len__", "Bare.method", "windows"]


def test_documented_public_functions_of_the_library_are_rows(made_up: Path) -> None:
    rows = functions.functions(made_up)
    assert rows == functions.functions(made_up), "the same every time"
    names = [(row["module"], row["name"]) for row in rows]
    assert names == [("decimal", "exp"), *((module, name) for module in ("package", "package.sub", "thing") for name in NAMES)]
    assert rows[0]["file"] == "_pydecimal.py", "where it stands is said as it is"
    by_name = {row["name"]: row for row in rows if row["module"] == "thing"}
    assert by_name["outer"]["text"] == ('# thing.outer\n@cache\ndef outer(a, *, b=1):\n    """Say what outer does."""\n    return a\n')
    assert by_name["Thing"]["text"] == '# thing.Thing\nclass Thing(Base):\n    """A thing."""\n    size = 3\n'
    assert by_name["Thing.name"]["text"] == '# thing.Thing.name\n@property\ndef name(self):\n    """Its name."""\n'
    lines = dedent(SOURCE).splitlines()
    assert all(by_name[name]["text"].splitlines()[-1].strip() in "\n".join(lines) for name in NAMES)
    assert [lines[by_name[name]["line"] - 1].split("(")[0].split()[-1].rstrip(":") for name in NAMES] == [
        name.rpartition(".")[2] for name in NAMES
    ]


def test_this_python_is_read_and_not_imported() -> None:
    functions.library()  # sysconfig reads a module of its own
    before = set(sys.modules)
    rows = functions.functions()
    assert set(sys.modules) == before
    assert len(rows) > 2000
    found = {(row["module"], row["name"]): row for row in rows}
    row = found["textwrap", "dedent"]
    assert "def dedent(" in linecache.getline(str(functions.library() / row["file"]), row["line"])
    parts = {part for row in rows for part in row["file"].split("/")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages"}


def test_a_python_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no source of Python's standard library\. Use a Python that comes with its \.py files\."):
        functions.functions(tmp_path)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = library.write_library(tmp_path / "lib")
    library.use_library(monkeypatch, folder)
    return folder


def test_queries_are_prompts_and_functions_held_out(small: Path) -> None:
    train, asked = functions.split("train"), functions.split("validation")
    assert [row["text"] for row in asked[: len(functions.PROMPTS)]] == list(functions.PROMPTS)
    held = [(row["file"], row["line"]) for row in asked[len(functions.PROMPTS) :]]
    trained = [(row["file"], row["line"]) for row in train]
    assert held
    assert not set(held) & set(trained)
    assert sorted(held + trained) == sorted((row["file"], row["line"]) for row in functions.functions(small))


def test_a_function_is_a_row_that_is_cut_or_ends(small: Path) -> None:
    _, tokenizer, train, queries, settled = started("stdlib", max_length=40)
    assert settled.max_length == 40
    end = tokenizer.eos_token_id
    assert len(train.encoded) == len(train.raw)
    lengths = {len(row["input_ids"]) for row in train.encoded}
    assert max(lengths) == 40
    assert min(lengths) < 40
    for raw, row in zip(train.raw, train.encoded, strict=True):
        ids = row["input_ids"]
        assert end not in ids[:-1]
        whole = tokenizer(raw["text"])["input_ids"]
        assert ids == [*whole, end][:40]
        assert row["text"] == f"# {raw['file']}, line {raw['line']}\n" + tokenizer.decode(whole[:40])
    first = queries.encoded[0]
    assert first["text"] == functions.PROMPTS[0], "a prompt is from no file"
    assert end not in first["input_ids"], "and is not at its end"


@pytest.mark.usefixtures("small")
def test_it_trains_without_being_told_anything_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHENCE_DATA", str(tmp_path / "elsewhere"))
    training = TrainingSettings(preset="tiny", num_train_epochs=1)
    folder = tmp_path / "ck"
    recipe = train_recipe(FAMILIES["stdlib"], folder, data=DataSettings(max_train_rows=48), training=training, snapshots=2)
    assert len(recipe.train) == 48
    assert recipe.raw is not None
    assert set(recipe.raw[0]) == {"module", "name", "file", "line", "text"}
    assert len(recipe.snapshots) == 2
    assert recipe.ask is not None
    asked = recipe.ask("def median(data):")
    assert asked["text"] == "def median(data):"
    assert recipe.tokens is not None
    assert "".join(recipe.tokens(asked)) == "def median(data):"
    again = load_recipe("stdlib", checkpoint_dir=folder)
    assert again.train == recipe.train


@pytest.mark.usefixtures("small")
def test_rows_of_another_python_are_refused(tmp_path: Path, small: Path) -> None:
    folder = tmp_path / "ck"
    training = TrainingSettings(preset="tiny", num_train_epochs=1)
    train_recipe(FAMILIES["stdlib"], folder, data=DataSettings(max_train_rows=16), training=training, snapshots=0)
    functions._all.cache_clear()
    (small / "argparse.py").write_text('def f():\n    """Another."""\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"the training rows of the standard library of Python [\d.]+ are not those that .*ck was trained on"
    ):
        load_recipe("stdlib", checkpoint_dir=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "folder"}, r"data='folder': stdlib reads the standard library of Python [\d.]+\. Leave --data out; .*take wikitext\."),
        ({"flip": 0.1}, r"flip replaces labels, and text has none\."),
        ({"max_length": 1}, r"max_length=1 leaves nothing to predict"),
    ],
)
def test_what_stdlib_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES["stdlib"].settled(DataSettings(**options))


def test_a_model_that_is_named_is_taken_instead_of_a_small_one(tmp_path: Path, small: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model '.*nowhere' cannot be loaded"):
        train_recipe(
            FAMILIES["stdlib"],
            tmp_path / "ck",
            data=DataSettings(max_train_rows=16),
            training=TrainingSettings(model=str(tmp_path / "nowhere")),
        )
