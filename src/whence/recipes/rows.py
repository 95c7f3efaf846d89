"""Raw rows of a data set: files of a folder here, or a data set of the Hugging Face hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from whence.errors import ConfigError, DataError
from whence.pretrained.kinds import need

Row = dict[str, Any]
DATA_VARIABLE = "WHENCE_DATA"
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".txt", ".txt.gz")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set lies.

    Attributes:
        folder: its name within a folder of data sets, such as the one that `WHENCE_DATA` names.
        hub, config: its name and configuration on the Hugging Face hub.
        train, validation: the splits of the hub that training rows and queries come from.
        unfold: makes the rows of a split of those that were read, such as several of a question with several answers.
        made: gives the rows of a split that are made on this machine and read from nowhere; `hub` names them for people.
    """

    folder: str
    hub: str
    config: str | None = None
    train: str = "train"
    validation: str = "validation"
    unfold: Callable[[list[Row], str], list[Row]] | None = None
    made: Callable[[str], list[Row]] | None = None


def read_split(source: Source, data: str | None, split: str, *, limit: int | None = None, file: str | None = None) -> list[Row]:
    """Return the first `limit` rows of a split, `"train"` or `"validation"`.

    Args:
        source: where the data set lies by default.
        data: a folder (of this data set or of several), or another name on the hub; None: the folder that the environment
            variable `WHENCE_DATA` names, else the hub.
        split: which rows.
        limit: None for all.
        file: a file to take instead of the split's own.

    Raises:
        ConfigError: no such folder or file, a form that is not known, or the hub does not answer.
        DataError: there are no rows, or the file cannot be read.
    """
    if file is not None:
        rows = read_file(Path(file))
    elif source.made is not None:
        rows = source.made(split)
    else:
        folder = _folder(source, data)
        rows = _from_hub(source, data, split, limit) if folder is None else _from_folder(folder, source, split)
    rows = rows if source.unfold is None else source.unfold(rows, split)
    rows = rows[:limit]
    if not rows:
        raise DataError(f"the split {split!r} of {file or data or source.hub} has no rows. Give a data set with at least one.")
    return rows


def split_name(source: Source, data: str | None, split: str) -> str:
    """Return how the data set names the split that `read_split` takes for `"train"` or `"validation"`, such as `test`; arguments as there.

    Raises:
        ConfigError: as of `read_split`.
    """
    if source.made is not None:
        return split
    folder = _folder(source, data)
    return _hub_names(source, data, split)[2] if folder is None else _name_in_folder(folder, source, split)


def read_file(path: Path) -> list[Row]:
    """Return the rows of a file: parquet, JSON lines, CSV or text (a row `{"text": line}` per line), the last three also gzipped.

    A folder that `save_to_disk` wrote of one split, as `whence clean` does, is read too.

    Raises:
        ConfigError: there is no such file, or its suffix is not known. DataError: it cannot be read.
    """
    if (path / "state.json").is_file():
        return list(need("datasets").load_from_disk(str(path)))
    kind = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
    if not path.is_file() or kind is None:
        what = "is no file" if not path.is_file() else "has a form that is not known"
        raise ConfigError(f"{path} {what}; give one that ends in {', '.join(_SUFFIXES)}.")
    try:
        if kind == ".parquet":
            return pa.parquet.read_table(path).to_pylist()
        with pa.input_stream(str(path), compression="detect") as stream:
            if ".txt" in kind:
                return [{"text": line} for line in stream.read().decode().splitlines(keepends=True)]
            return _json_rows(stream.read().decode(), path) if ".json" in kind else _csv_rows(stream, path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}. Mend the file, or give another.") from None


def _json_rows(text: str, path: Path) -> list[Row]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines would cut at other signs too
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds something other than objects; give one JSON object per line.")
    return rows


def _csv_rows(stream: Any, path: Path) -> list[Row]:
    table = pa.csv.read_csv(stream, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
    for field in table.schema:
        if pa.types.is_binary(field.type):
            raise DataError(f"{path}: the column {field.name!r} is not in UTF-8. Save the file again in UTF-8.")
    return table.to_pylist()


def _folder(source: Source, data: str | None) -> Path | None:
    """Return the folder of the data set, None for the hub."""
    named = data if data is not None else os.environ.get(DATA_VARIABLE) or None
    if named is None:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        if data is not None and not folder.exists() and named.count("/") <= 1 and not named.startswith((".", "/", "~")):
            return None  # may be a name on the hub
        origin = "--data" if data is not None else DATA_VARIABLE
        raise ConfigError(
            f"{origin} {named}: there is no such folder. Give a folder with train and validation files, or a name on the hub."
        )
    return folder if _is_data_set(folder) or not (folder / source.folder).is_dir() else folder / source.folder


def _is_data_set(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or _file(folder, "train") is not None


def _file(folder: Path, split: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / f"{split}{suffix}").is_file()), None)


def _from_folder(folder: Path, source: Source, split: str) -> list[Row]:
    name = _name_in_folder(folder, source, split)
    if (folder / "dataset_dict.json").is_file():
        return list(need("datasets").load_from_disk(str(folder))[name])
    path = _file(folder, name)
    assert path is not None
    return read_file(path)


def _name_in_folder(folder: Path, source: Source, split: str) -> str:
    """Return the name of the split that is taken for `"train"` or `"validation"`."""
    # Some sets name their splits otherwise: mnli has validation_matched.
    names = [split] if split == "train" else list(dict.fromkeys([split, source.validation]))
    if (folder / "dataset_dict.json").is_file():
        splits = need("datasets").load_from_disk(str(folder))
        found = next((name for name in names if name in splits), None)
        if found is None:
            raise ConfigError(f"the data set in {folder} has the splits {', '.join(splits)}, but no {split!r}.")
        return found
    found = next((name for name in names if _file(folder, name) is not None), None)
    if found is None:
        within = "" if folder.name == source.folder else f", here or in a folder {source.folder}"
        raise ConfigError(f"{folder} has no {split!r} file; expected {split} with one of the endings {', '.join(_SUFFIXES)}{within}.")
    return found


def _hub_names(source: Source, data: str | None, split: str) -> tuple[str, str | None, str]:
    """Return name, configuration and split on the hub."""
    name, config = (source.hub, source.config) if data in (None, source.hub) else (str(data), None)
    wanted = source.train if split == "train" else source.validation
    if name != source.hub and "[" in wanted:
        wanted = split  # a slice is of the data set that it was chosen for
    return name, config, wanted


def _from_hub(source: Source, data: str | None, split: str, limit: int | None) -> list[Row]:
    datasets = need("datasets")
    name, config, wanted = _hub_names(source, data, split)
    try:
        loaded = datasets.load_dataset(name, config, split=wanted)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"the data set {name!r} cannot be had from the Hugging Face hub: {reason}. Check the name and the network, or give "
            f"--data FOLDER (or {DATA_VARIABLE}) with train and validation files."
        ) from error
    return list(loaded.select(range(min(limit, len(loaded)))) if limit is not None else loaded)


def need_columns(rows: Sequence[Row], columns: Sequence[str], what: str) -> None:
    """Check that rows have columns that are not empty.

    Raises:
        DataError: one is missing, in the first row or in a later one.
    """
    for number, row in enumerate(rows):
        for column in columns:
            if row.get(column) is None:
                have = "a null there" if column in row else f"the columns {', '.join(map(str, row))}"
                raise DataError(f"{what}: row {number} has no {column!r}; it has {have}. Name the columns with --columns and --label.")
