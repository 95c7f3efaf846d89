"""Commands that must succeed, and commands that must be refused."""

from __future__ import annotations

from typing import Any


def done(run: Any, *arguments: Any) -> Any:
    """Return what a command left that must succeed."""
    result = run(*map(str, arguments))
    assert result.status == 0, result.err
    return result


def refused(run: Any, *arguments: Any) -> str:
    """Return the one line that a command must be refused with."""
    result = run(*map(str, arguments))
    assert result.status == 2, (result.status, result.err)
    assert result.out == ""
    assert result.err.startswith("whence: ")
    assert result.err.count("\n") == 1, "one line"
    return result.err
