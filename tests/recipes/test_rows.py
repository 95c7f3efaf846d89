"""Rows from files, folders, saved data sets and the hub, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from whence.errors import ConfigError, DataError
from whence.recipes.rows import Source, need_columns, read_file, read_split, split_name

ROWS = [{"text": "one, and", "label": 0, "number": 0.5}, {"text": 'two "2"\nmore', "label": 1, "number": 1.5}]
SOURCE = Source(folder="mine", hub="someone/mine", config="small", validation="validation_matched")


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Write rows in the form that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), plain)
    elif plain.suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(rows), plain)
    elif plain.suffix == ".txt":
        plain.write_text("".join(row["text"] for row in rows), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz"])
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_file(write(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_is_rows_of_lines_with_their_ends(tmp_path: Path, name: str) -> None:
    lines = [" = Title = \n", " \n", "a last line, with an é"]
    assert read_file(write(tmp_path / name, [{"text": line} for line in lines])) == [{"text": line} for line in lines]


def test_lists_and_missing_values_of_json(tmp_path: Path) -> None:
    rows = [{"endings": ["a", "b"], "label": "1"}, {"endings": ["c", "d"], "label": None}]
    assert read_file(write(tmp_path / "a.jsonl", rows)) == rows
    assert read_file(write(tmp_path / "a.parquet", rows)) == rows


def test_separators_of_lines_within_a_text(tmp_path: Path) -> None:
    """As `whence clean` writes them: JSON escapes the line feed alone."""
    rows = [{"text": "one\u2028two\x85three\x0cfour\nfive"}, {"text": "six"}]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\r\n" for row in rows) + b"\n")
    assert read_file(tmp_path / "a.jsonl") == rows


def test_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    rows = [{"text": "2021-01-01"}, {"text": "2022-02-02"}]
    assert read_file(write(tmp_path / "a.jsonl", rows)) == rows


def test_line_ends_within_quotes_of_a_large_csv(tmp_path: Path) -> None:
    rows = [{"text": f"review {number}\n" + "word " * 60 + "\nend", "label": number % 2} for number in range(5000)]
    assert read_file(write(tmp_path / "a.csv", rows)) == rows, "more than one block of the reader"


# ------------------------------------------------------------------------------------------ folders


def folder_of_one(folder: Path, ending: str = ".jsonl") -> Path:
    write(folder / f"train{ending}")
    write(folder / f"validation{ending}", ROWS[:1])
    return folder


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv.gz"])
def test_a_folder_of_the_data_set_and_one_of_several(tmp_path: Path, ending: str) -> None:
    one = folder_of_one(tmp_path / "several" / "mine", ending)
    for given in (one, tmp_path / "several"):
        assert read_split(SOURCE, str(given), "train") == ROWS
        assert read_split(SOURCE, str(given), "validation") == ROWS[:1]
        assert read_split(SOURCE, str(given), "train", limit=1) == ROWS[:1]
        assert read_split(SOURCE, str(given), "train", limit=99) == ROWS


def test_the_variable_names_a_folder_and_an_option_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_one(tmp_path / "variable" / "mine")
    monkeypatch.setenv("WHENCE_DATA", str(tmp_path / "variable"))
    assert read_split(SOURCE, None, "train") == ROWS
    write(tmp_path / "option" / "train.jsonl", ROWS[1:])
    assert read_split(SOURCE, str(tmp_path / "option"), "train") == ROWS[1:]
    monkeypatch.setenv("WHENCE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(
        ConfigError, match=r"^WHENCE_DATA .*nowhere: there is no such folder\. Give a folder with train and validation files"
    ):
        read_split(SOURCE, None, "train")


def test_a_file_of_training_rows_goes_before_everything(tmp_path: Path) -> None:
    file = write(tmp_path / "cleaned.parquet", ROWS[1:])
    assert read_split(SOURCE, str(tmp_path / "nowhere"), "train", file=str(file)) == ROWS[1:]
    assert read_split(SOURCE, None, "train", file=str(write(tmp_path / "c.jsonl")), limit=1) == ROWS[:1]


def test_a_saved_data_set_of_the_package_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    splits = {"train": datasets.Dataset.from_list(ROWS), "validation": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "several" / "mine"))
    for given in (tmp_path / "several" / "mine", tmp_path / "several"):
        assert read_split(SOURCE, str(given), "train") == ROWS
        assert read_split(SOURCE, str(given), "validation") == ROWS[:1]
    datasets.DatasetDict({"train": splits["train"]}).save_to_disk(str(tmp_path / "half"))
    with pytest.raises(ConfigError, match=r"half has the splits train, but no 'validation'"):
        read_split(SOURCE, str(tmp_path / "half"), "validation")


def test_queries_may_lie_under_the_name_that_the_hub_gives_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    write(tmp_path / "files" / "train.jsonl")
    write(tmp_path / "files" / "validation_matched.jsonl", ROWS[1:])
    splits = {"train": datasets.Dataset.from_list(ROWS), "validation_matched": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for folder in ("files", "saved"):
        assert read_split(SOURCE, str(tmp_path / folder), "validation") == ROWS[1:]
        assert split_name(SOURCE, str(tmp_path / folder), "validation") == "validation_matched"
    write(tmp_path / "files" / "validation.jsonl", ROWS[:1])
    assert split_name(SOURCE, str(tmp_path / "files"), "validation") == "validation"


# ---------------------------------------------------------------------------------------------- hub


class Hub:
    """Stands in for `datasets.load_dataset`, and remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.datasets = pytest.importorskip("datasets")
        self.asked: list[tuple[str, str | None, str]] = []
        monkeypatch.setattr(self.datasets, "load_dataset", self)

    def __call__(self, name: str, config: str | None, *, split: str) -> Any:
        self.asked.append((name, config, split))
        return self.datasets.Dataset.from_list(ROWS)


def test_the_split_has_the_name_that_the_hub_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WHENCE_DATA", raising=False)
    sliced = Source(folder="sliced", hub="someone/sliced", train="train[:90%]", validation="train[90%:]")
    test = Source(folder="test", hub="someone/test", validation="test")
    for source, data in ((SOURCE, None), (sliced, None), (sliced, "other/data"), (test, None)):
        read_split(source, data, "validation")
        assert split_name(source, data, "validation") == hub.asked[-1][2]
    assert [split for _, _, split in hub.asked] == ["validation_matched", "train[90%:]", "validation", "test"]


def test_the_hub_is_asked_by_its_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert read_split(SOURCE, None, "train") == ROWS
    assert read_split(SOURCE, None, "validation", limit=1) == ROWS[:1]
    assert read_split(SOURCE, "other/data", "train") == ROWS
    assert read_split(SOURCE, "squad", "validation", limit=5) == ROWS
    assert read_split(SOURCE, "someone/mine", "train") == ROWS
    assert hub.asked == [
        ("someone/mine", "small", "train"),
        ("someone/mine", "small", "validation_matched"),
        ("other/data", None, "train"),
        ("squad", None, "validation_matched"),
        ("someone/mine", "small", "train"),
    ]


@pytest.mark.parametrize("data", [None, "someone/else"])
def test_without_the_hub(data: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    name = data or "someone/mine"
    message = rf"^the data set '{name}' cannot be had from the Hugging Face hub: .+ Check the name and the network, or give --data FOLDER"
    with pytest.raises(ConfigError, match=message) as caught:
        read_split(SOURCE, data, "train")
    assert "(or WHENCE_DATA)" in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- errors

BROKEN = {
    "a.parquet": (b"no parquet", r"cannot be read as \.parquet: .+\. Mend the file, or give another"),
    "a.jsonl": (b'{"a": \n', r"cannot be read as \.jsonl: "),
    "b.jsonl": (b"", r"(cannot be read as \.jsonl: |has no rows)"),
    "a.jsonl.gz": (b"no gzip", r"cannot be read as \.jsonl\.gz: "),
    "a.csv": (b"a,b\n1\n", r"cannot be read as \.csv: .*Expected 2 columns"),
    "b.csv": ("text,label\ncaf\u00e9,1\n".encode("latin-1"), r"UTF-8"),
    "a.txt": (b"caf\xe9", r"cannot be read as \.txt: "),
    "a.txt.gz": (b"no gzip", r"cannot be read as \.txt\.gz: "),
    "b.txt": (b"", r"has no rows\. Give a data set with at least one"),
    "a.json": (b'[{"text": "a"}]', r"cannot be read as \.json: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_split(SOURCE, None, "train", file=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("none.parquet", r"none\.parquet is no file; give one that ends in \.parquet, \.jsonl, \.jsonl\.gz, \.json, \.csv, "),
        ("rows.xlsx", r"rows\.xlsx has a form that is not known; give one that ends in "),
        ("folder", r"folder is no file"),
    ],
)
def test_no_file_of_a_known_form(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        read_split(SOURCE, None, "train", file=str(tmp_path / file))


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "train.jsonl")
    with pytest.raises(ConfigError, match=r"mine has no 'validation' file; expected validation with one of the endings \.parquet, "):
        read_split(SOURCE, str(tmp_path), "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no 'train' file; expected train .*, here or in a folder mine\.$"):
        read_split(SOURCE, str(tmp_path / "empty"), "train")


@pytest.mark.parametrize("given", ["./nowhere", "/no/where/at/all", "~/no-such-folder-here", "a/b/c"])
def test_no_such_folder(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--data {re.escape(given)}: there is no such folder\. Give .*, or a name on the hub\.$"):
        read_split(SOURCE, given, "train")


def test_no_rows_at_all(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"the split 'train' of .* has no rows\. Give a data set with at least one\."):
        read_split(SOURCE, str(tmp_path), "train")


def test_columns_that_are_missing_or_empty() -> None:
    need_columns(ROWS, ["text", "label"], "data")
    with pytest.raises(
        DataError, match=r"^data: row 0 has no 'words'; it has the columns text, label, number\. Name the columns with --columns"
    ):
        need_columns(ROWS, ["words"], "data")
    with pytest.raises(DataError, match=r"^data: row 1 has no 'text'; it has a null there\."):
        need_columns([{"text": "a"}, {"text": None}], ["text"], "data")


def test_data_may_move(tmp_path: Path) -> None:
    folder = folder_of_one(tmp_path / "here")
    shutil.move(folder, tmp_path / "there")
    with pytest.raises(ConfigError, match="no such folder"):
        read_split(SOURCE, str(folder), "train")
    assert read_split(SOURCE, str(tmp_path / "there"), "train") == ROWS
