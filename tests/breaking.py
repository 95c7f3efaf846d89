"""Calls that are broken off ahead of a write to an index, or to another store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whence.storage import shards


def broken_off(monkeypatch: pytest.MonkeyPatch, after: int, call: Callable[[], Any], kind: str = "index") -> bool:
    """Kill a call ahead of one of its writes to or deletions from a store of a kind; whether it came so far."""
    made = {"calls": 0}

    def breaking(real: Any, folder: Callable[..., Path]) -> Any:
        def broken(*arguments: Any) -> None:
            if folder(*arguments).parent.name == kind:
                made["calls"] += 1
                if made["calls"] > after:
                    raise KeyboardInterrupt
            real(*arguments)

        return broken

    with monkeypatch.context() as patch:
        for name in ("write_bytes_atomic", "write_json_atomic"):
            patch.setattr(shards, name, breaking(getattr(shards, name), lambda path, data: path.parent))
        patch.setattr(shards.ShardStore, "_unlink", breaking(shards.ShardStore._unlink, lambda store, name, shard: store.folder))
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False
