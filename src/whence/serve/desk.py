"""One job at a time on the model, in the thread that owns it, while another thread answers the network."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
WAITING = 8


class StoppedError(Exception):
    """Nobody does the job any more."""


class Desk:
    """A short queue of jobs for one worker.

    A model is not safe for two threads. It is worked on in the main thread, where Ctrl-C arrives in the midst of a job and
    undoes what the job began, as anywhere else in Python.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue(WAITING)

    async def ask(self, job: Callable[[], T]) -> T:
        """Have a job done, and return what it returns.

        Raises:
            queue.Full: too many are waiting. StoppedError: the worker ended. What the job raises.
        """
        future: Future[T] = Future()
        asked = (job, future)
        self._jobs.put_nowait(asked)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # whoever asked is gone, and leaves the place to others
            with self._jobs.mutex:
                if asked in self._jobs.queue:
                    self._jobs.queue.remove(asked)
            raise

    def work(self, going: Callable[[], bool]) -> None:
        """Do jobs as they come, as long as `going` says so."""
        while going():
            try:
                job, future = self._jobs.get(timeout=0.5)
            except queue.Empty:
                continue
            if not future.set_running_or_notify_cancel():  # whoever asked is gone
                continue
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001  (raised again where it was asked for)
                future.set_exception(error)
            except BaseException:
                if not future.done():  # Ctrl-C may also come just behind the answer
                    future.set_exception(StoppedError())
                raise

    def close(self) -> None:
        """Send away whoever still waits."""
        while not self._jobs.empty():
            _, future = self._jobs.get_nowait()
            if future.set_running_or_notify_cancel():
                future.set_exception(StoppedError())
