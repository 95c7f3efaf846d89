"""A tiny index of rows that carry any text, and a server of it in threads of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import case_run
import whence
from whence.serve.answers import Answers
from whence.serve.app import make_app
from whence.serve.desk import Desk
from whence.serve.run import listening, url_of


def readable(text: str = "sample") -> whence.Recipe:
    """Return a recipe of a classifier that reads texts by their length."""
    found = case_run.recipe(text)

    def ask(said: str) -> Any:
        inputs = torch.tensor([len(said) % 5 - 2.0, 1.0, 0.5, -1.0])
        with torch.no_grad():
            return inputs, int(found.model(inputs).argmax()), said

    found.ask = ask
    return found


def answers_of(found: whence.Recipe, folder: Path, **options: Any) -> tuple[Answers, whence.Attributor]:
    attributor = whence.Attributor(found.model, found.task, run_dir=folder, collate=found.collate, progress=False, device="cpu")
    attributor.fit(found.train, strategy="ekfac")
    return Answers(found, attributor.index(found.train, keep=1), **options), attributor


@contextlib.contextmanager
def working() -> Iterator[Desk]:
    """Give a desk whose jobs are done by a thread."""
    desk, going = Desk(), [True]
    thread = threading.Thread(target=desk.work, args=(lambda: going[0],))
    thread.start()
    try:
        yield desk
    finally:
        going[0] = False
        thread.join()


@contextlib.contextmanager
def served(answers: Answers) -> Iterator[str]:
    """Give the address of a page that a thread serves."""
    import uvicorn

    with listening("127.0.0.1", 0) as bound, working() as desk:
        server = uvicorn.Server(uvicorn.Config(make_app(answers, desk), log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                thread.join(0.02)
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join()
