"""What a checkpoint folder holds until its training has ended, so that an interrupted one goes on.

`unfinished/settings.json` says what the training is made of. Beside it lie the last `checkpoint-N/`, as the Trainer
writes it, and the snapshots taken up to there. A checkpoint is whole once `kept.json` is in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from whence.errors import ConfigError
from whence.storage.run import explain_write_errors, read_json, write_json_atomic

UNFINISHED, KEPT = "unfinished", "kept.json"
_SETTINGS = "settings.json"


def is_unfinished(folder: Path) -> bool:
    """Return whether a checkpoint folder holds a training to go on with."""
    return (folder / UNFINISHED / _SETTINGS).is_file()


@contextmanager
def unfinished(folder: Path, made_of: dict[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Give the folder of what a training goes on from; it is removed when the body ends without an error.

    Args:
        folder: the checkpoint folder.
        made_of: all that the weights depend on, JSON values by name.
        overwrite: start anew where a training of something else is there; one of the same goes on.

    Raises:
        ConfigError: a training of something else is there, or another process is at it. StorageError: it cannot be written.
    """
    place, made_of = folder / UNFINISHED, json.loads(json.dumps(made_of))
    with explain_write_errors(folder):
        place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"{folder} is being trained by another process. Wait for it to end, or give another folder.") from None
    try:
        last = last_checkpoint(place)
        if last is not None and (other := _differences(read_json(place / _SETTINGS), made_of)):
            if not overwrite:
                raise ConfigError(
                    f"{folder} holds a training that did not end, with another {', '.join(other)}. Give the same to go on with it, "
                    "another folder, or --overwrite to start anew."
                )
            last = None
        with explain_write_errors(folder):
            keep_only(place, last)
            for snapshot in place.glob("*.safetensors") if last is None else ():
                snapshot.unlink()  # of another training
            write_json_atomic(place / _SETTINGS, made_of)
        yield place
        # While the lock is held: nobody else begins in a folder that goes.
        shutil.rmtree(place, ignore_errors=True)
    finally:
        lock.release()


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [name for name, value in wanted.items() if found.get(name) != value]


def last_checkpoint(place: Path) -> Path | None:
    """Return the latest whole checkpoint."""
    whole = [path.parent for path in place.glob(f"checkpoint-*/{KEPT}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def keep_only(place: Path, checkpoint: Path | None) -> None:
    """Remove all checkpoints but one."""
    for other in place.glob("checkpoint-*"):
        if other != checkpoint:
            shutil.rmtree(other)
