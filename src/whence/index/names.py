"""Names of an index's shards, and of the tensors in them."""

from __future__ import annotations

from whence.storage.shards import ShardStore

NORM, IDS, FINGERPRINT, COUNT = "norm", "ids", "fingerprint", "rows"
DELETED, FIDELITY, COARSE = "deleted", "fidelity", "coarse"


def about(part: int) -> str:
    """Return the name of the shard that says what a part is of."""
    return f"part-{part:04d}/about"


def done(part: int) -> str:
    """Return the name of the shard that says that a part is whole."""
    return f"part-{part:04d}/done"


def coarse_name(rows: str) -> str:
    """Return the name of the coarse vectors (`coarse.py`) of a shard of rows."""
    return rows.replace("/rows-", "/coarse-")


def row_shards(store: ShardStore, number: int) -> list[str]:
    """Return the names of a part's shards of rows."""
    return [name for name in store.names if name.startswith(f"part-{number:04d}/rows-")]
