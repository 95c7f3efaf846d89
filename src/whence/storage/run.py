"""The run folder and atomic files; the fingerprints of `fingerprints.py` are passed on from here."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from pyarrow import parquet

from whence.errors import StorageError
from whence.storage.fingerprints import fingerprint_model, fingerprint_rows, fingerprint_source, fingerprint_tensors

__all__ = [
    "RunFolder",
    "explain_write_errors",
    "fingerprint_model",
    "fingerprint_rows",
    "fingerprint_source",
    "fingerprint_tensors",
    "sha256_file",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_table_atomic",
]

_LOCK_WAIT_S = 30.0


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn any `OSError` of the body (disk full, folder read-only, ...) into one `StorageError` that names `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Free some space or make the folder writable, "
            "then run again: whatever was finished before is kept."
        ) from error


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old or its new content, whenever the process is killed.

    A kill can leave one temporary file `.NAME.XXXXXXXX.tmp` beside it.

    Raises:
        StorageError: the file cannot be written; the old content is untouched and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explain_write_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk."""
    # A renamed file survives a power cut only once its folder is on disk too; only POSIX lets one ask for that.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_table_atomic(path: Path, table: pa.Table) -> None:
    """Write a table as parquet, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, keys in their given order, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    write_bytes_atomic(path, (json.dumps(obj, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        StorageError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}. Check its permissions.") from error
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON: {error}. Delete it and run the command that makes it again.") from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits.

    Raises:
        StorageError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error


class RunFolder:
    """A folder for everything one run leaves, with `run.json`, the list of what was done in it.

    Args:
        path: the folder, made when first needed. None: a temporary one, removed with this object.

    Attributes:
        origin: JSON that every record of this object gets, such as the recipe that the command line opened.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.origin: dict[str, Any] = {}
        if path is not None:
            self.path = Path(path)
            return
        self.path = Path(tempfile.mkdtemp(prefix="whence-"))
        # Not tempfile.TemporaryDirectory: that one warns when it is collected instead of closed.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def sub(self, *parts: str) -> Path:
        """Return the path of a part of the run; nothing is made on disk."""
        return self.path.joinpath(*parts)

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one record to `run.json`: command, settings, versions, git commit, time; `entry` overrides and adds.

        Values JSON does not know, such as paths, are written as their `str`. The commit is that of the repository
        around the working directory, None outside of one. Time is UTC.

        Raises:
            StorageError: the folder cannot be written or its `run.json` cannot be read.
        """
        path = self.path / "run.json"
        with explain_write_errors(path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(self.path / ".run.lock", timeout=_LOCK_WAIT_S):
                    for left_over in self.path.glob(".run.json.*.tmp"):
                        left_over.unlink(missing_ok=True)
                    record = json.loads(json.dumps(provenance() | self.origin | dict(entry), default=str))
                    write_json_atomic(path, [*read_records(path), record])
            except Timeout:
                raise StorageError(f"{path} is being written by another process for {_LOCK_WAIT_S:.0f} s. Wait for it to end.") from None


def read_records(path: Path) -> list[Any]:
    """Return the records of a `run.json`, oldest first; none if there is no such file.

    Raises:
        StorageError: the file is no list of records.
    """
    try:
        records = json.loads(path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"expected a list of records, found {type(records).__name__}")
        return records
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise StorageError(f"{path} is not a list of records in JSON ({error}). Move it away and run again.") from error


def provenance() -> dict[str, Any]:
    """Return what a record of a run says of its making: command, settings, versions, git commit, time."""
    versions = {"torch": torch.__version__, "python": platform.python_version(), "numpy": np.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions = {"whence": importlib.metadata.version("whence")} | versions
    return {
        "command": shlex.join(sys.argv),
        "settings": {},
        "versions": versions,
        "git_commit": _git_commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
