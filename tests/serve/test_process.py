"""`whence serve` as people start it: a process, its page, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from whence.cli.main import main
from whence.errors import ConfigError
from whence.serve.run import listening, url_of

pytest.importorskip("uvicorn")

# What a shell starts in the background ignores Ctrl-C, and so do its children, down to the program under test.
HEEDS_INTERRUPTS = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("whence", run_name="__main__", alter_sys=True)
"""
RECIPE = """
import time
import torch
from torch import nn
import whence

def tiny():
    torch.manual_seed(0)
    rows = [(torch.randn(4), place % 2) for place in range(12)]
    def ask(text):
        if text == "slow":
            print("slow", flush=True)
            for _ in range(600):
                time.sleep(0.1)
        return torch.ones(4), 1
    return whence.Recipe(name="tiny", model=nn.Linear(4, 2), task=whence.tasks.Classification(), train=rows, queries=rows[:3], ask=ask)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "recipe.py:tiny"]) == 0
    assert main(["index", "recipe.py:tiny", "--keep", "1"]) == 0
    return tmp_path


def ask(url: str, body: dict[str, Any], timeout: float = 30) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}api/query", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        found: dict[str, Any] = json.loads(response.read())
        return found


def started(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Return the process, and the address that it tells on standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDS_INTERRUPTS, "serve", *arguments, "--port", "0"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"Serving .* at (http://127\.0\.0\.1:\d+/) ", line)
        if found:
            return process, found[1]
    process.kill()
    raise AssertionError("".join(lines))


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Press Ctrl-C; return both streams. It has a few seconds, on a busy machine."""
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Stopped serving" in err
    return out, err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_serving_ends_with_ctrl_c(folder: Path) -> None:
    process, url = started(folder, "recipe.py:tiny", "--json")
    told = ask(url, {"text": "hello", "k": 2})
    assert len(told["sides"][0]) <= 2
    with urllib.request.urlopen(url, timeout=30) as page:
        assert b"whence serve" in page.read()
    out, _ = ended(process)
    assert json.loads(out) == {"url": url, "recipe": "tiny", "index": "runs/tiny/index/ekfac"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.slow
def test_ctrl_c_ends_a_question_too(folder: Path) -> None:
    process, url = started(folder, "runs/tiny", "--recipe", "recipe.py:tiny")
    asking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
            "import urllib.request as u; u.urlopen(u.Request(sys.argv[1] + 'api/query', b'{\"text\": \"slow\"}', "
            "{'Content-Type': 'application/json'}), timeout=60)",
            url,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdout.readline() == "slow\n"
    with urllib.request.urlopen(f"{url}api/index", timeout=10) as response:
        assert json.loads(response.read())["name"] == "tiny", "the page answers while the model works"
    ended(process)
    assert asking.wait(timeout=60) != 0


def test_a_port_that_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        capsys.readouterr()
        assert main(["serve", "recipe.py:interrupted", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"whence: --port {port}: 127.0.0.1 cannot be listened on: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "text"), [(["--k", "500"], "rows on each side are 1 to 100"), (["--batch-size", "4"], "--batch-size is for verbs that")]
)
def test_options_that_would_do_nothing(capsys: pytest.CaptureFixture[str], options: list[str], text: str) -> None:
    assert main(["serve", "nowhere/index/x", "--port", "0", *options]) == 2
    assert text in capsys.readouterr().err


def test_addresses_that_are_none_of_this_machine() -> None:
    with pytest.raises(ConfigError, match="--host no host at all"), listening("no host at all", 0):
        pass
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 cannot be listened on"), listening("192.0.2.1", 0):
        pass
    with listening("0.0.0.0", 0) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")


def test_an_open_address_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nowhere/index/x", "--host", "0.0.0.0", "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert "there is no password" in told
    assert "there is no such folder" in told


def test_an_index_of_another_model_is_refused_before_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = folder / "recipe.py"
    recipe.write_text(recipe.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    assert main(["serve", "recipe.py:tiny", "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert "was written with other settings" in told
    assert "Serving" not in told
