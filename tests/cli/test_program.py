"""The program as people start it: help, examples, streams and signals."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

import finetuned
import whence
from commands import done
from whence.cli import options, options_refit
from whence.cli.main import EXAMPLES, VERBS

# Verbs that do not end by themselves; tests/serve/test_process.py runs them.
ENDLESS = {"serve"}
WHENCE = [sys.executable, "-m", "whence"]
SLOW_RECIPE = """
import time
from recipe import tiny

def slow():
    recipe = tiny()
    # Says so from within the work: a signal during an import can be lost on a busy machine.
    recipe.task.inspect_row = lambda *row: (print("ready", flush=True), time.sleep(30))
    return recipe
"""

# What a shell starts in the background ignores Ctrl-C, and so do its children, down to the program under test.
HEEDS_INTERRUPTS = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("whence", run_name="__main__", alter_sys=True)
"""


def program(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WHENCE, *arguments], capture_output=True, text=True, timeout=300, check=False, **more)


def test_every_verb_has_help_with_its_example(run: Any) -> None:
    assert set(EXAMPLES) == set(VERBS)
    overview = run("--help")
    assert overview.status == 0
    for verb, example in EXAMPLES.items():
        assert verb.split()[0] in overview.out
        done = run(*verb.split(), "--help")
        assert done.status == 0, done.err
        assert example in " ".join(done.out.split()), "a long line is broken"
        assert "--json" in done.out
        assert "--config" in done.out


def test_a_group_of_verbs_lists_them(run: Any) -> None:
    names = [verb.split()[1] for verb in VERBS if " " in verb]
    assert names
    for arguments in (["evaluate"], ["evaluate", "--help"]):
        done = run(*arguments)
        assert done.status == 0, done.err
        assert all(name in done.out for name in names)


def test_every_option_has_help() -> None:
    """A field without a docstring would be an option that nobody explains."""
    groups = [
        value
        for module in (options, options_refit)
        for name, value in vars(module).items()
        if name.endswith("Options") and is_dataclass(value)
    ]
    assert groups
    for group in groups:
        # Some inherit their fields from settings of the library.
        source = [line for kind in group.__mro__[:-1] for line in inspect.getsource(kind).splitlines()]
        for field in fields(group):
            places = [number for number, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
            assert places, field.name
            assert all(source[place + 1].startswith('    """') for place in places), f"{group.__name__}.{field.name}"


def test_strategies_are_those_of_the_library() -> None:
    from whence.curvature.strategies import STRATEGIES

    assert set(get_args(options.Strategy)) == set(STRATEGIES)


def test_version(run: Any) -> None:
    assert run("--version").out == f"whence {whence.__version__}\n"


def test_no_verb_shows_the_overview(run: Any) -> None:
    done = run()
    assert done.status == 0
    assert "demo" in done.out


@pytest.mark.skipif(sys.platform == "win32", reason="times of child processes")
def test_the_program_starts_quickly() -> None:
    fastest = min(seconds_of_help() for _ in range(3))
    assert fastest < 0.5, f"whence --help takes {fastest:.2f} s; is torch imported at the top of a module?"


def seconds_of_help() -> float:
    """Return processor seconds, which a busy machine does not change as it does the clock's."""
    before = os.times()
    assert program("--help").returncode == 0
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_the_program_from_end_to_end(here: Path) -> None:
    for arguments in (("fit", "recipe.py:tiny"), ("score", "recipe.py:tiny"), ("self", "recipe.py:tiny"), ("top", "recipe.py:tiny")):
        done = program(*arguments, "--json", cwd=here)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict)
    failed = program("fit", "nothing.py:x", cwd=here)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_the_examples_in_the_help_work(here: Path) -> None:
    """In their order, each on what those before it left; the data of the hub lie in a folder."""
    place = os.environ | {"WHENCE_DATA": str(finetuned.write_data(here / "data")), "HF_HUB_OFFLINE": "1"}
    needed = {"evaluate agreement": [["score", "digits", "--strategy", "identity"]]}
    for verb, example in EXAMPLES.items():
        name, *arguments = shlex.split(example)
        assert name == "whence"
        assert arguments[: len(verb.split())] == verb.split()
        if verb in ENDLESS:
            continue
        for command in [*needed.get(verb, []), arguments]:
            done = program(*command, cwd=here, env=place)
            assert done.returncode == 0, f"{command}: {done.stderr}"
            assert done.stdout
    assert (here / "runs/demo/report.html").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_with_one_line(here: Path) -> None:
    (here / "slow.py").write_text(SLOW_RECIPE, encoding="utf-8")
    started = subprocess.Popen(
        [sys.executable, "-c", HEEDS_INTERRUPTS, "fit", "slow.py:slow"],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout
    assert started.stdout.readline() == "ready\n"
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert out == ""
    assert "the same command continues" in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_has_enough_is_no_error(here: Path) -> None:
    for verb in ("fit", "score"):
        assert program(verb, "recipe.py:tiny", "--strategy", "identity", cwd=here).returncode == 0
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*WHENCE, "top", "recipe.py:tiny", "--strategy", "identity"],
        cwd=here,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


HELP = {
    "fit": ["--fallback", "--batch-size", "--precision", "--compile", "--offload", "--max-examples", "--seed", "--layers"],
    "score": [
        "--solver",
        "--response",
        "--normalize",
        "--aggregate",
        "--query-rank",
        "--per-token",
        "--per-layer",
        "--query-rows",
        "--train-rows",
        "--name",
        "--query-batch-size",
        "--batch-size",
        "--precision",
        "--offload",
        "--compile",
        "--fallback",
    ],
    "self": ["--on", "--response", "--damping", "--batch-size", "--precision", "--fallback"],
    "top": ["--name", "--query", "--bottom", "--strategy"],
}


@pytest.mark.parametrize("verb", HELP)
def test_help_shows_every_option_with_words(run: Any, verb: str) -> None:
    text = done(run, verb, "--help").out
    for option in HELP[verb]:
        lines = [line for line in text.splitlines() if option in line.replace("[", " ").split() or f"{option} " in f"{line} "]
        assert lines, f"{option} is not in the help of {verb}"
        assert any(len(line.split(option, 1)[1].split()) > 2 for line in lines), f"{option} has no words"
