"""Every mistake is one line on standard error that says what came and what to do, and a status that scripts can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whence.cli.values import parse_damping
from whence.errors import ConfigError

MINE = "recipe.py:tiny"

USAGE_ERRORS = {
    "no recipe": (["fit"], ["fit", "recipe"]),
    "unknown verb": (["fitt", MINE], ["fitt", 'Did you mean "fit"?']),
    "unknown option": (["fit", MINE, "--stategy", "kfac"], ["--stategy", "Did you mean --strategy?", "whence fit --help"]),
    "unknown strategy": (["fit", MINE, "--strategy", "newton"], ["newton", "identity", "ekfac"]),
    "missing file": (["fit", "nothing.py:tiny"], ["nothing.py", "there is no file"]),
    "missing object": (["fit", "recipe.py:nothing"], ["'nothing'", "recipe.py:tiny"]),
    "no recipe object": (["fit", "recipe.py:number"], ["int", "whence.Recipe"]),
    "unknown recipe": (["fit", "numbers"], ["'numbers'", "digits", "file.py:object"]),
    "k 0": (["top", MINE, "--k", "0"], ["--k", "0 is too small", "1 or more"]),
    "k 1.5": (["self", MINE, "--k", "1.5"], ["--k", "'1.5' is not a whole number"]),
    "batch size -1": (["fit", MINE, "--batch-size", "-1"], ["--batch-size"]),
    "query x": (["top", MINE, "--query", "0,x"], ["--query", "0,x", "0,3,7"]),
    "empty layer": (["fit", MINE, "--layers", "0,,2"], ["--layers", "empty part"]),
    "unknown layer": (["fit", MINE, "--layers", "conv9"], ["conv9"]),
    "damping": (["score", MINE, "--damping", "relative"], ["--damping relative", "relative:0.1:model"]),
    "no such device": (["fit", MINE, "--device", "abacus"], ["abacus"]),
    "score before fit": (["score", MINE], ["factors", "whence fit"]),
    "top before score": (["top", MINE], ["runs/tiny/scores/ekfac", f"whence score {MINE}"]),
    "missing config": (["fit", MINE, "--config", "none.yaml"], ["none.yaml", "no such file"]),
}


@pytest.mark.parametrize("name", USAGE_ERRORS)
def test_usage_error(run: Any, name: str) -> None:
    arguments, expected = USAGE_ERRORS[name]
    done = run(*arguments)
    assert done.status == 2, done.err
    assert done.out == ""
    assert done.err.startswith("whence: ")
    assert done.err.count("\n") == 1, "one line"
    for text in expected:
        assert text in done.err


CONFIGS = {
    "unknown key": ("strategy: kfac\nstategy: kfac\n", ["stategy", "Did you mean --strategy?", "options.yaml"]),
    "unknown key within a value": ("seed:\n  deep: 3\n", ["[seed]", "deep"]),
    "wrong choice": ("strategy: newton\n", ["newton", "ekfac"]),
    "wrong number": ("seed: 1.5\n", ["seed", "'1.5' is not a whole number"]),
    "wrong flag": ("empirical: perhaps\n", ["empirical", "perhaps"]),
    "no YAML": ("a: [1\n", ["options.yaml", "not valid YAML", "line 2"]),
    "a list": ("- strategy\n", ["options.yaml", "holds a list"]),
    "numbers as keys": ("1: kfac\n", ["options.yaml", "names as keys"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_error_in_a_file(run: Any, here: Path, name: str) -> None:
    text, expected = CONFIGS[name]
    (here / "options.yaml").write_text(text, encoding="utf-8")
    done = run("fit", MINE, "--config", "options.yaml")
    assert done.status == 2, done.err
    assert done.out == ""
    for part in expected:
        assert part in done.err


def test_an_empty_file_changes_nothing(run: Any, here: Path) -> None:
    (here / "options.yaml").write_text("", encoding="utf-8")
    assert run("fit", MINE, "--config", "options.yaml").status == 0


def test_a_query_that_was_not_scored(run: Any) -> None:
    run("fit", MINE, "--strategy", "identity")
    run("score", MINE, "--strategy", "identity")
    done = run("top", MINE, "--strategy", "identity", "--query", "3,7")
    assert done.status == 2
    assert "--query 7: there are 7 scored queries, numbered from 0 to 6." in done.err


def test_scores_of_other_data_are_not_listed(run: Any, here: Path) -> None:
    run("fit", MINE, "--strategy", "identity")
    run("score", MINE, "--strategy", "identity")
    (here / "recipe.py").write_text(
        (here / "recipe.py").read_text(encoding="utf-8").replace("rows(23, 1)", "rows(22, 1)"), encoding="utf-8"
    )
    done = run("top", MINE, "--strategy", "identity")
    assert done.status == 2
    assert "holds scores of 7 queries and 23 training rows; recipe tiny now has 7 and 22. Score again" in done.err


def test_a_failure_of_the_numbers_is_status_1(run: Any) -> None:
    done = run("fit", "recipe.py:not_finite")
    assert done.status == 1
    assert done.out == ""
    assert "Traceback" not in done.err


def test_a_damaged_file_is_status_1(run: Any, here: Path) -> None:
    run("fit", MINE)
    run("score", MINE)
    shard = next((here / "runs/tiny/scores/ekfac").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    done = run("top", MINE)
    assert done.status == 1
    assert shard.name in done.err


def test_an_error_of_the_model_is_one_line_and_debug_shows_where(run: Any) -> None:
    done = run("fit", "recipe.py:broken_model")
    assert done.status == 1
    assert "AttributeError" in done.err
    assert "no_such_method" in done.err
    assert "Traceback" not in done.err
    assert "--debug" in done.err
    assert "Traceback" in run("fit", "recipe.py:broken_model", "--debug").err


def test_debug_shows_where_an_error_of_ours_comes_from(run: Any) -> None:
    done = run("--debug", "fit", "nothing.py:tiny")
    assert done.status == 2
    assert "Traceback" in done.err


def test_an_interruption_says_that_the_same_command_continues(run: Any) -> None:
    done = run("fit", "recipe.py:interrupted")
    assert done.status == 130
    assert done.err == "whence: interrupted. Finished parts are kept: the same command continues from there.\n"


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "inf", "relative:", "relative:x", "relative:0.1:row", "relative:-1", "absolute:1"])
def test_damping_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood\. Give a number"):
        parse_damping(text)


def test_damping_in_all_its_forms() -> None:
    from whence import Damping

    assert parse_damping("auto") == "auto"
    assert parse_damping("1e-3") == 1e-3
    assert parse_damping("0") == 0
    assert parse_damping("relative:0.2") == Damping(relative=0.2, scope="layer")
    assert parse_damping("relative:0.2:layer") == Damping(relative=0.2, scope="layer")
    assert parse_damping("relative:0.2:model") == Damping(relative=0.2, scope="model")
