"""An approximate index beside the rows of a large one, by FAISS: a query reads the lists near it instead of every row.

Rows are grouped by direction into lists (an inverted file), with 8 bits for each number. A query looks into the lists that it has
the largest products with, and its negative into others, for the other end. What is found there only names candidates; they are
scored again with the rows as they are stored. In the folder of the index:

    nearest.FIRST16OFSHA256.faiss   written by faiss.write_index, with the places of the rows
    nearest.json                    its size and checksum, and that of the manifest whose rows it was made of
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.errors import ConfigError, StorageError
from whence.index.dense import DenseRows
from whence.index.stored import StoredIndex, by_shard
from whence.runtime.packages import need
from whence.runtime.progress import Stages
from whence.storage.manifest import MANIFEST
from whence.storage.run import explain_write_errors, read_json, sha256_file, sync_folder, write_json_atomic
from whence.storage.shards import ShardStore

RECORD = "nearest.json"
SHARE = 16
"""One list of so many is read for each end, if nothing else is said."""
_SAMPLE_BYTES = 2**31
_PER_LIST = 64
_CHUNK_NUMBERS = 2**25


def require_faiss() -> ModuleType:
    """Import FAISS.

    Raises:
        ConfigError: it is not installed.
    """
    return need("faiss", "an approximate index needs", "faiss")


def check_projection(projection: str) -> None:
    """Refuse rows that are no vectors.

    Raises:
        ConfigError: they are triplets.
    """
    if projection == "factors":
        raise ConfigError(
            "projection='factors' keeps triplets, which have no approximate index. "
            "Index with a dense projection: 'pca', 'kronecker', 'sjlt' or 'none'."
        )


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """An approximate index that was opened: that of FAISS, the rows in it, and its lists."""

    searched: Any
    rows: int
    lists: int

    def candidates(self, queries: Tensor, several: int, nprobe: int | None) -> Tensor:
        """Return the places of rows among which are, as likely as not all, the `several` at either end of every query.

        Twice as many are taken as are asked for, since 8 bits mistake near ones; more lists are read where too few rows are found.

        Args:
            queries: as rows meet them, float32 `[query, number]`.
            several: how many.
            nprobe: lists that are read for each end of each query; None: one of `SHARE`.
        """
        faiss, least, wanted = require_faiss(), min(several, self.rows), min(self.rows, 2 * several + 64)
        both = torch.cat([queries, -queries]).numpy()
        probed = min(self.lists, nprobe or math.ceil(self.lists / SHARE))
        while True:
            _, found = self.searched.search(both, wanted, params=faiss.SearchParametersIVF(nprobe=probed))
            if probed == self.lists or bool((found[:, least - 1] >= 0).all()):  # -1 stands for no more rows
                return torch.from_numpy(np.unique(found[found >= 0]))
            probed = min(self.lists, 2 * probed)


def open_nearest(stored: StoredIndex) -> tuple[Nearest | None, str | None]:
    """Return the approximate index of an index, None if there is none; else None and why it is not used.

    Raises:
        ConfigError: FAISS is not installed. StorageError: its record cannot be read.
    """
    folder = stored.store.folder
    if not (folder / RECORD).exists():
        return None, None
    record = read_json(folder / RECORD)
    try:
        path, size, made_of, rows = folder / record["file"], record["bytes"], record["manifest"], record["rows"]
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{folder / RECORD} does not say what it should ({error}). Delete it, or make it anew with accelerate."
        ) from error
    if made_of != sha256_file(folder / MANIFEST):
        return None, f"{folder}: rows were appended or deleted since its approximate index was made"
    if path.parent != folder or not path.is_file() or path.stat().st_size != size:
        return None, f"{path} is missing or of another size than {size} bytes"
    faiss = require_faiss()
    # A format of FAISS's own: numbers and sizes, nothing that is run, unlike pickle. The lists stay on disk until they are read.
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if os.name == "posix" else 0
    try:
        searched = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise StorageError(f"cannot read {path}: {str(error).splitlines()[0]}. Delete it, or make it anew with accelerate.") from error
    return Nearest(searched=searched, rows=rows, lists=searched.nlist), None


def verify_nearest(folder: Path) -> None:
    """Compare the checksum of the approximate index in a folder, if there is one.

    Raises:
        StorageError: it is altered or missing.
    """
    if (folder / RECORD).exists():
        record = read_json(folder / RECORD)
        if sha256_file(folder / record["file"]) != record["sha256"]:
            raise StorageError(f"{folder / record['file']} is altered: expected checksum (SHA-256) {record['sha256']}. Make it anew.")


def write_nearest(stored: StoredIndex, projection: DenseRows, *, seed: int, stages: Stages) -> None:
    """Write the approximate index of an index, in place of an older one; the same bytes every time.

    The whole of it is in memory meanwhile: a byte for each number of each row.

    Raises:
        ConfigError: FAISS is not installed, or there is no row. StorageError: another process is writing the index, or the disk refuses.
    """
    require_faiss()
    folder = stored.store.folder
    with ShardStore(folder, kind="index", settings=stored.settings) as store:
        stored = StoredIndex.of(store)
        if not len(stored.ids):
            raise ConfigError(f"all rows of {folder} are deleted, so there is nothing to search; append rows, or index again.")
        built = _built(stored, projection, seed, stages)
        with explain_write_errors(folder):
            file = _written(built, folder)
        record = {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}
        record |= {"manifest": sha256_file(folder / MANIFEST), "rows": built.ntotal, "lists": built.nlist, "seed": seed}
        write_json_atomic(folder / RECORD, record)
        for old in folder.glob("nearest.*.faiss"):
            if old != file:
                old.unlink()


def _built(stored: StoredIndex, projection: DenseRows, seed: int, stages: Stages) -> Any:
    faiss, rows = require_faiss(), len(stored.ids)
    numbers = sum(part.size for part in projection.parts.values())
    lists = min(rows, round(4 * math.sqrt(rows)))
    built = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(numbers), numbers, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    built.cp.seed, built.cp.niter, built.cp.max_points_per_centroid, built.cp.min_points_per_centroid = seed + 1, 10, _PER_LIST, 1
    alive = stored.alive
    several = min(rows, max(lists, min(_PER_LIST * lists, _SAMPLE_BYTES // (4 * numbers))))
    drawn = alive[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:several]].sort().values
    with _one_thread(faiss), stages.stage("Approximate index"), stages.track(rows, "Approximate index") as advance:
        built.train(torch.cat([values for _, values in _numbers(stored, projection, drawn)]).numpy())
        for places, values in _numbers(stored, projection, alive):
            built.add_with_ids(values.numpy(), places.numpy())
            advance(len(places))
    return built


def _numbers(stored: StoredIndex, projection: DenseRows, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows at some places, ascending, as float32 `[row, number]`, a few at a time."""
    chunk = max(1, _CHUNK_NUMBERS // sum(part.size for part in projection.parts.values()))
    for name, first, here in by_shard(((name, len(ids)) for name, ids in stored.shards()), places):
        rows = stored.store.view(name)
        for some in here.split(chunk):
            yield some + first, projection.numbers(projection.at(rows, some)).contiguous()


def _written(built: Any, folder: Path) -> Path:
    """Write FAISS's index into a folder, under a name with its checksum."""
    temporary = folder / f".nearest.{secrets.token_hex(4)}.tmp"  # of the form that the next writer of the folder clears away
    try:
        require_faiss().write_index(built, str(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        path = folder / f"nearest.{sha256_file(temporary)[:16]}.faiss"
        temporary.replace(path)
        sync_folder(folder)
    except RuntimeError as error:  # FAISS's own way to say that the disk refuses
        raise StorageError(f"cannot write into {folder}: {str(error).splitlines()[0]}. Free some space, then run again.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


@contextmanager
def _one_thread(faiss: ModuleType) -> Iterator[None]:
    """Let sums be made in one order, so that the bytes do not depend on the cores."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
