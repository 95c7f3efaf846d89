"""A cleaned data set on disk: the rows that stay, the rows that went, and where they come from.

    cleaned.parquet                     the rows that stay, all columns as they were read (.parquet, .jsonl, or a folder)
    cleaned.parquet.dropped.parquet     the rows that went, highest score first, with the columns whence_row, whence_score, ...
    cleaned.parquet.provenance.json     command, versions, time, hashes, settings, and the list of dropped rows

The result exists once the first of them does, and it appears last: a process that is killed leaves nothing under its name,
or all three, complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from whence.errors import ConfigError, DataError
from whence.evaluate.clean import ID_COLUMNS
from whence.evaluate.decision import Decision
from whence.runtime.packages import need
from whence.storage.run import (
    explain_write_errors,
    fingerprint_rows,
    provenance,
    sync_folder,
    write_bytes_atomic,
    write_json_atomic,
    write_table_atomic,
)

Form = Literal["parquet", "jsonl", "folder"]
_FORMS: dict[str, Form] = {".parquet": "parquet", ".jsonl": "jsonl", "": "folder"}
_DATA_SET = ("dataset_info.json", "state.json")  # what `datasets` puts into a folder of its own
_DATA, _DROPPED, _RECORD, _OLD = "data", "dropped", "record", "old"


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """Where a cleaned data set lies.

    Attributes:
        path: the rows that stay.
        dropped: table of the rows that went.
        provenance: how it came about.
    """

    path: Path
    dropped: Path
    provenance: Path

    def to_json(self) -> dict[str, str]:
        """Return the paths as texts."""
        return {"path": str(self.path), "dropped": str(self.dropped), "provenance": str(self.provenance)}


def write_cleaned(
    rows: Sequence[dict[str, Any]],
    decision: Decision,
    out: str | Path,
    *,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Cleaned:
    """Write the rows that stay, in their order and with all their columns, and beside them what went and why.

    `datasets.load_dataset("parquet", data_files=...)`, the same with `"json"`, and `datasets.load_from_disk` read them.

    Args:
        rows: raw rows `[train]`, those that the decision's scores are of, in the same order.
        decision: which rows go.
        out: NAME.parquet, NAME.jsonl (one JSON object per line), or a folder, without a suffix, for a data set of the
            package `datasets`.
        origin: what the caller knows, JSON, kept in the provenance: recipe, kind of scores, seeds.
        overwrite: replace a result that is there. There is none for the moment in which the files are exchanged.

    Raises:
        ConfigError: `out` has another suffix, or exists and may not be replaced; `datasets` is needed and not installed.
        DataError: the rows are not those of the decision, or cannot be held by the form.
        StorageError: a file cannot be written. What was there is kept.
    """
    out = Path(out)
    form = check_out(out, overwrite=overwrite)
    table = _table(rows, decision)
    kept = [rows[row] for row in decision.kept]
    named = id_column(rows)
    ids = None if named is None else [row[named] for row in rows]
    gone = decision.describe(decision.dropped, ids)
    record = provenance() | {
        "settings": decision.settings,
        "origin": dict(origin or {}),
        "source": {"rows": len(rows), "sha256": fingerprint_rows(rows)},
        "cleaned": {"name": out.name, "form": form, "rows": len(kept), "sha256": fingerprint_rows(kept)},
        "summary": decision.to_json(),
        "id_column": named,
        "dropped": gone,
        "spared": decision.describe(decision.spared, ids),
    }
    done = Cleaned(path=out, dropped=_beside(out, "dropped.parquet"), provenance=_beside(out, "provenance.json"))
    with explain_write_errors(out), _staging(out) as staging:
        _WRITERS[form](staging / _DATA, table.take(pa.array(decision.kept, pa.int64())), kept)
        write_table_atomic(staging / _DROPPED, _dropped_table(table, gone))
        write_json_atomic(staging / _RECORD, record)
        _publish(staging, done)
    return done


def check_out(out: Path, *, overwrite: bool) -> Form:
    """Return the form that a path asks for; a verb calls this before it scores anything.

    Raises:
        ConfigError: the path has another suffix, or exists and may not be replaced.
    """
    form = _FORMS.get(out.suffix) if out.name else None
    if form is None:
        raise ConfigError(f"out={str(out)!r} has a form that is not known; give NAME.parquet, NAME.jsonl, or the name of a folder.")
    if not out.exists():
        return form
    if not overwrite:
        raise ConfigError(f"{out} exists. Give another name, or allow it to be replaced (overwrite).")
    ours = all((out / name).is_file() for name in _DATA_SET) if form == "folder" else out.is_file()
    if not ours:
        kind = "data set folder" if form == "folder" else "file"
        raise ConfigError(f"{out} exists and is no {kind}, so it is not replaced. Give another name, or move it away.")
    return form


def id_column(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the column that names rows, `id` or `idx`, if every row has a text or a whole number there."""
    for name in ID_COLUMNS:
        if len(rows) and all(isinstance(row.get(name), str | int) for row in rows):
            return name
    return None


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def _table(rows: Sequence[dict[str, Any]], decision: Decision) -> pa.Table:
    """Return all rows as a table, so that the rows that stay have the types of the whole."""
    if len(rows) != len(decision.scores):
        raise DataError(f"there are {len(rows)} rows, but the decision is about {len(decision.scores)}. Give the rows that were scored.")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not row or not all(isinstance(name, str) for name in row):
            raise DataError(f"row {number} is of type {type(row).__name__}; give raw rows, each a dict from column names to plain values.")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            raise DataError(f"column {name!r} cannot be held by a table: {error}. Give its values one type.") from error
    return pa.table(columns)


def _dropped_table(table: pa.Table, gone: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the dropped rows with what was decided about them in front."""
    numbers = pa.array([one["row"] for one in gone], pa.int64())
    types = {"row": pa.int64(), "score": pa.float64(), "rank": pa.int64(), "class": pa.int64(), "reason": pa.string()}
    present = [name for name in types if name != "class" or any("class" in one for one in gone)]
    ours = {f"whence_{name}": pa.array([one[name] for one in gone], types[name]) for name in present}
    own = table.take(numbers)
    return pa.table(ours | {name: own[name] for name in own.column_names if name not in ours})


def _write_parquet(path: Path, table: pa.Table, rows: Sequence[dict[str, Any]]) -> None:
    write_table_atomic(path, table)


def _write_lines(path: Path, table: pa.Table, rows: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per row, with the keys that the row has."""
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except (TypeError, ValueError) as error:
            raise DataError(f"row {number} of those that stay cannot be written as JSON: {error}. Write .parquet instead.") from error
    write_bytes_atomic(path, b"".join(lines))


def _write_folder(path: Path, table: pa.Table, rows: Sequence[dict[str, Any]]) -> None:
    datasets: Any = need("datasets", "a data set folder, unlike NAME.parquet, needs", "hf")
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        features = datasets.Features.from_arrow_schema(table.schema)
        datasets.Dataset.from_dict(table.to_pydict(), features=features).save_to_disk(str(path))
    finally:
        if shown:
            datasets.enable_progress_bars()
    for file in path.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    sync_folder(path)


_WRITERS = {"parquet": _write_parquet, "jsonl": _write_lines, "folder": _write_folder}


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """Make a hidden folder beside the result, so that what is in it can be renamed into place; a kill can leave it behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, done: Cleaned) -> None:
    """Move the finished files to their names, the result itself last."""
    old = staging / _OLD
    if done.path.exists():
        done.path.rename(old)
    try:
        (staging / _DROPPED).replace(done.dropped)
        (staging / _RECORD).replace(done.provenance)
        (staging / _DATA).replace(done.path)
    except BaseException:
        if old.exists() and not done.path.exists():
            old.rename(done.path)
        raise
    sync_folder(done.path.parent)
