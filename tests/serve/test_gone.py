"""Who is slow, who goes away, and servers that do not start."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from case_serve import answers_of, readable, served
from whence.errors import ConfigError
from whence.serve import app
from whence.serve.answers import Answers
from whence.serve.desk import WAITING, Desk
from whence.serve.run import listening, serve

uvicorn = pytest.importorskip("uvicorn")

QUESTION = b'{"query": 0, "k": 1}'


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers_of(readable(), tmp_path_factory.mktemp("run"))[0]


def exchanged(answers: Answers, desk: Desk, *messages: dict[str, Any]) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Return status, body and headers of what is told to someone who sends these messages, and then nothing."""
    left, sent = list(messages), []

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(60)
        return left.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/api/query", "headers": headers, "query_string": b""}
    asyncio.run(asyncio.wait_for(app.make_app(answers, desk)(scope, receive, send), 20))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def test_a_body_that_does_not_come_is_not_waited_for(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.05)
    status, body, headers = exchanged(answers, Desk(), {"type": "http.request", "body": b"{", "more_body": True})
    assert (status, json.loads(body)) == (408, {"error": "the body did not come within 0.05 seconds."})
    assert headers[b"connection"] == b"close"


def test_who_goes_away_is_no_error(answers: Answers, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    assert exchanged(answers, desk, {"type": "http.disconnect"})[0] == 499
    asked = {"type": "http.request", "body": QUESTION, "more_body": False}
    assert exchanged(answers, desk, asked, {"type": "http.disconnect"})[0] == 499
    assert desk._jobs.empty(), "nobody waits for the answer"
    assert caplog.text == ""


def request_of(url: str, content: bytes) -> bytes:
    host = url.removeprefix("http://").rstrip("/")
    return (
        f"POST /api/query HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(QUESTION)}\r\n\r\n".encode()
        + content
    )


def connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


@pytest.fixture
def held(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Give two events: the model has begun; it may go on."""
    begun, goes_on, query = threading.Event(), threading.Event(), answers.index.query

    def waits(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert goes_on.wait(30)
        return query(*arguments, **options)

    monkeypatch.setattr(answers.index, "query", waits)
    yield begun, goes_on
    goes_on.set()


def test_places_of_those_who_are_gone_are_free_again(answers: Answers, held: tuple[threading.Event, threading.Event]) -> None:
    begun, goes_on = held
    told: list[int] = []

    def ask(url: str) -> None:
        body = urllib.request.Request(f"{url}api/query", QUESTION, {"Content-Type": "application/json"})
        with urllib.request.urlopen(body, timeout=30) as response:
            told.append(json.loads(response.read())["answer"])

    with served(answers) as url:
        first = threading.Thread(target=ask, args=(url,))
        first.start()
        assert begun.wait(20)
        for _ in range(WAITING):
            with connected(url) as other:
                other.sendall(request_of(url, QUESTION))
                time.sleep(0.05)
        time.sleep(0.2)
        last = threading.Thread(target=ask, args=(url,))
        last.start()
        time.sleep(0.2)
        goes_on.set()
        for thread in (first, last):
            thread.join(30)
    assert told == [told[0], told[0] + 1], "nothing was answered between"


def test_a_slow_body_is_sent_away(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_S", 0.2)
    with served(answers) as url, connected(url) as slow:
        slow.sendall(request_of(url, b"{"))
        told = b""
        while part := slow.recv(4096):  # until it is closed from there
            told += part
    assert told.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within" in told


def test_two_cannot_have_one_port() -> None:
    with listening("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: 127.0.0.1 cannot be listened on"), listening("127.0.0.1", port):
            pass


@pytest.mark.parametrize(("started", "text"), [(False, "could not be served"), (True, "ended by itself")])
def test_a_server_that_ends_is_an_error(answers: Answers, monkeypatch: pytest.MonkeyPatch, started: bool, text: str) -> None:
    def run(server: Any, sockets: Any) -> None:
        server.started = started

    monkeypatch.setattr(uvicorn.Server, "run", run)
    ready: list[str] = []
    with listening("127.0.0.1", 0) as bound, pytest.raises(ConfigError, match=text):
        serve(answers, bound, host="127.0.0.1", ready=ready.append)
    assert len(ready) == started


def test_what_an_index_told_of_itself_is_a_fact(tmp_path: Path) -> None:
    found = readable()
    asked, attributor = answers_of(found, tmp_path)
    assert dict(asked.about()["facts"])["Fidelity"] == str(asked.index.fidelity)
    assert "Response" not in dict(asked.about()["facts"])
    from whence.curvature.response import Unrolled

    index = attributor.index(found.train[:2], keep=1, response=Unrolled(time=1.5), name="unrolled")
    facts = dict(Answers(found, index).about()["facts"])
    assert facts["Response"] == "unrolled, a run of finite length 1.5"
    assert "Fidelity" not in facts
    assert facts["Index"] == f"{tmp_path.name}/index/unrolled"
