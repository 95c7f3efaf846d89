"""The manifest of a store: what it is, what it was written with, and which shards are finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from whence.errors import MismatchError, StorageError
from whence.storage.settings import differences

FORMAT = 1
MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """A finished shard: its size, and its checksum in hex digits."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a store is, and what it holds."""

    kind: str
    settings: dict[str, Any]
    shards: dict[str, Shard]
    complete: bool
    result: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        shards = [{"name": name, "file": file_name(name, shard), **shard._asdict()} for name, shard in self.shards.items()]
        return {"format": FORMAT, **self._asdict(), "shards": shards}


def file_name(name: str, shard: Shard) -> str:
    """Return the name of a shard's file."""
    return f"{quote(name, safe='')}.{shard.sha256[:16]}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest in a folder.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, this version of whence reads {FORMAT}")
        shards = {str(entry["name"]): Shard(int(entry["bytes"]), str(entry["sha256"])) for entry in raw["shards"]}
        return Manifest(str(raw["kind"]), dict(raw["settings"]), shards, bool(raw["complete"]), dict(raw["result"]))
    except FileNotFoundError:
        raise StorageError(f"{path} is missing: nothing was stored there. Check the path, or run the step that writes it.") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}. Check its permissions.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is not a manifest ({type(error).__name__}: {error}). It was truncated or altered: "
            f"delete the folder {folder} and run again, or restore the file from a copy."
        ) from error


def compare_manifest(folder: Path, stored: Manifest, kind: str, present: dict[str, Any] | None) -> None:
    """Check that a store is of a kind, and was written with settings; None accepts any.

    Raises:
        MismatchError: it is another kind, or was written with others.
    """
    remedy = "Use the stored value, or give another folder, or delete this one to start again."
    if stored.kind != kind:
        raise MismatchError(f"{folder} holds {stored.kind!r}, but {kind!r} was asked for. {remedy}")
    found = [] if present is None else list(differences(stored.settings, present))
    if found:
        shown = "; ".join(f"{field}: stored {old}, present {new}" for field, old, new in found[:3])
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise MismatchError(f"{folder} was written with other settings: {shown}{more}. {remedy}")
