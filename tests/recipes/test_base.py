"""Recipes are found by name or in a file, and every way to get one wrong is one clear error."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

from whence.errors import DataError, RecipeError
from whence.recipes.base import BUILT_IN, Recipe, load_recipe
from whence.tasks import Classification

HEAD = """
from torch import nn
from whence import Recipe
from whence.errors import DataError
from whence.tasks import Classification
"""
GOOD = "Recipe(name='mine', model=nn.Linear(2, 2), task=Classification(), train=[1], queries=[2])"


def write(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(HEAD + text)
    return str(folder / name)


def test_an_object_and_a_factory_are_both_recipes(tmp_path):
    file = write(tmp_path, f"ready = {GOOD}\ndef make(size=3): return {GOOD}\n")
    assert load_recipe(f"{file}:ready").train == [1]
    assert load_recipe(f"{file}:make").queries == [2]


def test_a_recipe_file_imports_its_neighbours_even_late_and_leaves_the_path_alone(tmp_path):
    (tmp_path / "neighbour_of_a_recipe.py").write_text("rows = [1, 2, 3]\n")
    file = write(
        tmp_path, f"def make():\n    from neighbour_of_a_recipe import rows\n    made = {GOOD}\n    made.train = rows\n    return made\n"
    )
    before = list(sys.path)
    assert load_recipe(f"{file}:make").train == [1, 2, 3]
    assert sys.path == before


def test_two_files_of_one_name_do_not_mix(tmp_path):
    for folder, name in (("a", "first"), ("b", "second")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, f"it = {GOOD.replace('mine', name)}\n")
    names = [load_recipe(f"{tmp_path / folder}/mine.py:it").name for folder in ("a", "b", "a")]
    assert names == ["first", "second", "first"]


def test_a_recipe_named_like_a_library_does_not_replace_it(tmp_path):
    import json

    file = write(tmp_path, f"it = {GOOD}\n", "json.py")
    assert load_recipe(f"{file}:it").name == "mine"
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("it = 3", "it", r"is of type int\. A recipe is a whence\.Recipe, or a function"),
        ("def it(): return 3", "it", r"returned of type int|returned .*type int"),
        ("def it(size, *, depth): return 3", "it", r"requires arguments \(size, depth\)"),
        ("def it(): return None", "it", r"returned None"),
        ("def it(): raise KeyError('colour')", "it", r"raised KeyError: 'colour' \(mine\.py, line 6\)"),
        ("raise OSError('no disk')", "it", r"running .*mine\.py raised OSError: no disk \(mine\.py, line 6\)"),
        ("import sys; sys.exit(2)", "it", r"raised SystemExit: 2 .*__main__"),
        ("def it(:", "it", r"raised SyntaxError: .* \(line 6\)"),
        ("import no_such_module_here", "it", r"ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def other(): pass\nthing = 1", "it", r"defines no 'it'\. Did you mean .*mine\.py:other\?"),
        ("thing = 1", "it", r"defines no 'it'\. Nothing in it looks like a recipe"),
        (f"it = {GOOD.replace('nn.Linear(2, 2)', '3')}", "it", r"Recipe mine: model is of type int; give a torch\.nn\.Module"),
    ],
)
def test_errors_of_files(tmp_path, text, name, message):
    file = write(tmp_path, text + "\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"{file}:{name}")


def test_an_error_of_whence_inside_a_recipe_passes_unchanged(tmp_path):
    file = write(tmp_path, "def it(): raise DataError('row 3 is bad')\n")
    with pytest.raises(DataError, match=r"^row 3 is bad$"):
        load_recipe(f"{file}:it")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", r"recipe 'digts' is neither a built-in name \(.*digits.*\) nor of the form file\.py:object\."),
        ("mine.py", r"did you mean mine\.py:recipe"),
        ("mine.py:", r"did you mean mine\.py:recipe"),
        ("mine.txt:it", r"nor of the form file\.py:object"),
        ("no/such/file.py:it", r"there is no file no/such/file\.py \(looked in"),
    ],
)
def test_errors_of_names(spec, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(spec)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../up", r"name='\.\./up' cannot name a run folder"),
        ("name", "", r"name='' cannot name"),
        ("task", Classification, r"task is the class Classification; give a whence\.tasks\.Task"),
        ("train", iter([1]), r"train is of type list_iterator; give rows with __len__ and __getitem__"),
        ("queries", None, r"queries is None"),
        ("describe", "text", r"describe is of type str; give a function or None"),
        ("collate", 3, r"collate is of type int"),
    ],
)
def test_errors_of_fields(field, value, message):
    fields = {"name": "mine", "model": nn.Linear(1, 1), "task": Classification(), "train": [1], "queries": [1]}
    with pytest.raises(RecipeError, match=message):
        Recipe(**{**fields, field: value})


def test_every_built_in_recipe_has_a_usable_name():
    assert all(re.fullmatch(r"[a-z-]+", name) for name in BUILT_IN)
