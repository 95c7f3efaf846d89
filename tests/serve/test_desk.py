"""The queue of questions, where Ctrl-C comes at an awkward moment."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from whence.serve.desk import Desk


def test_ctrl_c_just_behind_an_answer_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, future = Desk(), Future[int]()
    real = Future.set_result

    def interrupted(self: Future[Any], result: Any) -> None:
        real(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "set_result", interrupted)
    desk._jobs.put((lambda: 1, future))
    with pytest.raises(KeyboardInterrupt):
        desk.work(lambda: True)
    assert future.result() == 1
