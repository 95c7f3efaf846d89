"""Checksummed safetensors shards beside a manifest, safe against kills, second writers and altered files.

A store is one folder:

    manifest.json                         kind, settings, finished shards (bytes, SHA-256), result
    NAME.FIRST16OFSHA256.safetensors      one file per shard; NAME is percent-encoded
    .lock                                 held by the one writer

The manifest decides what exists. A shard's file name holds its checksum, so overwriting a shard makes a new file, turns
the manifest to it, and only then drops the old one: a process killed anywhere leaves the old or the new shard, both sound.
The next writer removes files the manifest does not know. Nothing in a store depends on when or how often it was resumed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from whence.errors import StorageError
from whence.storage.manifest import MANIFEST, Manifest, Shard, compare_manifest, file_name, read_manifest
from whence.storage.run import explain_write_errors, write_bytes_atomic, write_json_atomic
from whence.storage.settings import plain_json, shorten

# Temporary files of `write_bytes_atomic`, and shards whose manifest entry was never made or already dropped.
_OURS = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|.+\.[0-9a-f]{16}\.safetensors", re.DOTALL)
_LONGEST_NAME = 180


class ShardStore:
    """A folder of named shards, opened for writing; a context manager.

    Opening makes the folder, or re-opens one that was written with the same kind and settings. The file lock is held
    until `close`. Settings are JSON values; tuples count as lists. `overwrite` starts again, with an empty store, where
    the folder was written with another kind or other settings or its manifest cannot be read.

    Raises:
        MismatchError: the folder was written with another kind or other settings.
        StorageError: another process is writing it, it cannot be written, or its manifest cannot be read.
        ConfigError: the settings are not JSON.
    """

    def __init__(self, folder: Path | str, *, kind: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        present = plain_json(settings, "settings")
        self._lock: FileLock | None = self._acquire()
        try:
            self._manifest = Manifest(kind, present, {}, False, {})
            if not self._reopened(overwrite):
                self._save(self._manifest)
            self._clean()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path | str, *, kind: str, settings: Mapping[str, Any] | None = None) -> Self:
        """Return an existing store for reading only: no lock is taken, nothing is written.

        Args:
            folder: where the store is.
            kind: what the store must hold.
            settings: what the store must have been written with; None accepts any.

        Raises:
            MismatchError: the folder holds another kind, or was written with other settings.
            StorageError: there is no such store, or its manifest cannot be read.
        """
        store = cls.__new__(cls)
        store.folder, store._lock = Path(folder), None
        store._manifest = read_manifest(store.folder)
        compare_manifest(store.folder, store._manifest, kind, None if settings is None else plain_json(settings, "settings"))
        return store

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the finished shards in the order written; an overwritten shard keeps its place."""
        return tuple(self._manifest.shards)

    @property
    def complete(self) -> bool:
        """Whether `finish` was called and nothing was written or removed since."""
        return self._manifest.complete

    @property
    def result(self) -> dict[str, Any]:
        """The JSON given to `finish`; empty before."""
        return dict(self._manifest.result)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the store was made with."""
        return dict(self._manifest.settings)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard atomically, replacing a shard of that name.

        Equal tensors give equal bytes, whatever their device, strides or order in the mapping.

        Raises:
            StorageError: the store is not open for writing, the name is unusable, or the disk refuses.
        """
        self._require_writer()
        if not name or len(quote(name, safe="")) > _LONGEST_NAME:
            raise StorageError(
                f"shard name {name!r} cannot be a file name: give 1 to {_LONGEST_NAME} characters, after percent-encoding of special ones."
            )
        data = safetensors.torch.save(_dense(tensors))
        old, new = self._manifest.shards.get(name), Shard(len(data), hashlib.sha256(data).hexdigest())
        write_bytes_atomic(self.folder / file_name(name, new), data)
        self._save(self._manifest._replace(shards=self._manifest.shards | {name: new}, complete=False, result={}))
        if old is not None and old != new:
            self._unlink(name, old)

    def read(self, name: str) -> dict[str, Tensor]:
        """Return a shard's tensors on the CPU, by sorted name, after checking size and checksum.

        Raises:
            StorageError: there is no such shard, or its file is missing, truncated or altered.
        """
        shard = self._find(name)
        path = self.folder / file_name(name, shard)
        remedy = f"Delete the folder {self.folder} and run again to make it anew, or restore the file from a copy."
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise StorageError(f"{path} is missing: the manifest expects {shard.bytes} bytes. {remedy}") from None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}. Check its permissions.") from error
        if len(data) != shard.bytes:
            state = "truncated" if len(data) < shard.bytes else "altered"
            raise StorageError(f"{path} is {state}: expected {shard.bytes} bytes, found {len(data)}. {remedy}")
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise StorageError(f"{path} is altered: expected checksum (SHA-256) {shard.sha256}, found {found}. {remedy}")
        return dict(sorted(safetensors.torch.load(data).items()))

    def view(self, name: str) -> dict[str, Tensor]:
        """Return a shard's tensors mapped into memory: read from disk when touched. The size is checked, the checksum is not.

        Raises:
            StorageError: there is no such shard, or its file is missing or of another size.
        """
        shard = self._find(name)
        path = self.folder / file_name(name, shard)
        try:
            found = path.stat().st_size
            if found != shard.bytes:
                raise StorageError(f"{path} is damaged: expected {shard.bytes} bytes, found {found}. Restore it, or make the folder anew.")
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in sorted(file.keys())}
        except (OSError, safetensors.SafetensorError) as error:
            raise StorageError(f"cannot read {path}: {error}. Restore it, or make the folder {self.folder} anew.") from error

    def remove(self, *names: str) -> None:
        """Remove shards, all at once: a process killed anywhere leaves every one of them or none.

        Raises:
            StorageError: there is no such shard, the store is not open for writing, or the disk refuses.
        """
        self._require_writer()
        gone = {name: self._find(name) for name in names}
        shards = {other: entry for other, entry in self._manifest.shards.items() if other not in gone}
        self._save(self._manifest._replace(shards=shards, complete=False, result={}))
        for name, shard in gone.items():
            self._unlink(name, shard)

    def finish(self, result: Mapping[str, Any] | None = None) -> None:
        """Mark the store complete and keep `result`, a JSON object, in the manifest.

        Raises:
            StorageError: the store is not open for writing, or the disk refuses.
            ConfigError: the result is not JSON.
        """
        self._require_writer()
        self._save(self._manifest._replace(complete=True, result=plain_json(result or {}, "result")))

    def close(self) -> None:
        """Let the next writer in. Reading still works; calling it again does nothing."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _reopened(self, overwrite: bool) -> bool:
        """Take up what the folder holds if it belongs to the present settings."""
        if not (self.folder / MANIFEST).exists():
            return False
        try:
            stored = read_manifest(self.folder)
            compare_manifest(self.folder, stored, self._manifest.kind, self._manifest.settings)
        except StorageError:
            if overwrite:
                return False
            raise
        self._manifest = stored
        return True

    def _acquire(self) -> FileLock:
        path = self.folder / ".lock"
        with explain_write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not per thread, so that whichever thread closes the store also frees it.
            lock = FileLock(path, timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                raise StorageError(
                    f"{self.folder} is being written by another process, which holds {path}. "
                    "Wait for it to end or stop it, or give another folder."
                ) from None
        return lock

    def _save(self, manifest: Manifest) -> None:
        write_json_atomic(self.folder / MANIFEST, manifest.to_json())
        self._manifest = manifest  # only now: memory never runs ahead of the disk

    def _clean(self) -> None:
        known = {file_name(name, shard) for name, shard in self._manifest.shards.items()}
        with explain_write_errors(self.folder):
            for path in self.folder.iterdir():
                if path.name not in known and _OURS.fullmatch(path.name):
                    path.unlink()

    def _unlink(self, name: str, shard: Shard) -> None:
        path = self.folder / file_name(name, shard)
        with explain_write_errors(path):
            path.unlink(missing_ok=True)

    def _find(self, name: str) -> Shard:
        if name not in self._manifest.shards:
            have = ", ".join(map(repr, self.names)) or "none"
            raise StorageError(f"{self.folder} has no finished shard {name!r}; it has {shorten(have)}. Run the step that writes it again.")
        return self._manifest.shards[name]

    def _require_writer(self) -> None:
        if self._lock is None:
            raise StorageError(f"{self.folder} is not open for writing. Make it with ShardStore(folder, kind=..., settings=...).")


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU tensors in row-major order of which no two share memory, as the file format asks."""
    dense: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        dense[name] = plain
    return dense


@contextmanager
def temporary_store(kind: str, settings: Mapping[str, Any]) -> Iterator[ShardStore]:
    """Open a store in a folder that goes with the body, for what is computed by shards and not kept."""
    with TemporaryDirectory() as folder, ShardStore(folder, kind=kind, settings=settings) as store:
        yield store
