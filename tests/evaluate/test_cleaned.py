"""Cleaned data sets on disk: read back by others, whole or not there, and never over something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from whence.errors import ConfigError, DataError, StorageError
from whence.evaluate import cleaned
from whence.evaluate.clean import decide
from whence.evaluate.cleaned import id_column, write_cleaned
from whence.storage.run import fingerprint_rows

ROWS: list[dict[str, Any]] = [
    {"idx": 100 + n, "sentence": f"naïve “row” {n}\n\u2028", "label": n % 2, "weight": n / 3, "endings": ["a"] * (n % 3), "empty": None}
    for n in range(8)
]
SCORES = torch.tensor([0.0, 7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0])
DECISION = decide(SCORES, count=2, classes=torch.tensor([n % 2 for n in range(8)]))
KEPT = [ROWS[row] for row in (0, 2, 4, 5, 6, 7)]
FORMS = ["data.parquet", "data.jsonl", "data"]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that were written, without the package `datasets` where it is not needed."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return list(pytest.importorskip("datasets").load_from_disk(str(path)))


@pytest.mark.parametrize("name", FORMS)
def test_what_stays_is_as_it_was_read(tmp_path, name):
    if name == "data":
        pytest.importorskip("datasets")
    done = write_cleaned(ROWS, DECISION, tmp_path / "new" / name)
    assert done.path == tmp_path / "new" / name
    assert read(done.path) == KEPT
    assert sorted(path.name for path in done.path.parent.iterdir()) == [name, f"{name}.dropped.parquet", f"{name}.provenance.json"]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_datasets_loads_it(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    done = write_cleaned(ROWS, DECISION, tmp_path / name)
    kind = {"data.parquet": "parquet", "data.jsonl": "json"}[name]
    loaded = datasets.load_dataset(kind, data_files=str(done.path), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == KEPT
    dropped = datasets.load_dataset("parquet", data_files=str(done.dropped), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(dropped["idx"]) == [101, 103]


def test_progress_bars_of_datasets_are_left_as_they_were(tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    before = datasets.are_progress_bars_disabled()
    write_cleaned(ROWS, DECISION, tmp_path / "data")
    assert datasets.are_progress_bars_disabled() == before
    assert capfd.readouterr().err == ""


def test_the_dropped_rows_are_a_table_with_what_was_decided(tmp_path):
    table = parquet.read_table(write_cleaned(ROWS, DECISION, tmp_path / "data.jsonl").dropped).to_pylist()
    ours = {"whence_row": 1, "whence_score": 7.0, "whence_rank": 1, "whence_class": 1, "whence_reason": "score"}
    assert table == [ours | ROWS[1], ours | {"whence_row": 3, "whence_score": 6.0, "whence_rank": 2} | ROWS[3]]


def test_the_provenance_says_where_it_comes_from(tmp_path):
    done = write_cleaned(ROWS, DECISION, tmp_path / "data.parquet", origin={"recipe": "tiny", "drop": "mislabeled"})
    record = json.loads(done.provenance.read_text())
    assert record["dropped"] == [
        {"row": 1, "id": 101, "score": 7.0, "rank": 1, "class": 1, "reason": "score"},
        {"row": 3, "id": 103, "score": 6.0, "rank": 2, "class": 1, "reason": "score"},
    ]
    assert record["spared"] == []
    assert record["origin"] == {"recipe": "tiny", "drop": "mislabeled"}
    assert record["source"] == {"rows": 8, "sha256": fingerprint_rows(ROWS)}
    assert record["cleaned"] == {"name": "data.parquet", "form": "parquet", "rows": 6, "sha256": fingerprint_rows(read(done.path))}
    assert record["settings"]["count"] == 2
    assert record["summary"]["per_class"][1] == {"class": 1, "rows": 4, "dropped": 2}
    assert {"command", "time", "versions", "git_commit"} <= set(record)


def test_rows_are_named_by_an_id_where_all_have_one():
    assert id_column(ROWS) == "idx"
    assert id_column([{"id": "a", "idx": 1}, {"id": "b", "idx": 2}]) == "id"
    assert id_column([{"id": "a", "idx": 1}, {"id": None, "idx": 2}]) == "idx"
    assert id_column([{"text": "a"}]) is None
    assert id_column([]) is None


def test_types_are_those_of_all_rows(tmp_path):
    rows = [{"a": 1.5, "b": "x"}, {"a": None}, {"a": None, "c": [1]}]
    done = write_cleaned(rows, decide(torch.tensor([9.0, 1.0, 1.0]), count=1), tmp_path / "data.parquet")
    table = parquet.read_table(done.path)
    assert [(field.name, str(field.type)) for field in table.schema] == [("a", "double"), ("b", "string"), ("c", "list<element: int64>")]
    lines = write_cleaned(rows, decide(torch.tensor([9.0, 1.0, 1.0]), count=1), tmp_path / "data.jsonl")
    assert read(lines.path) == rows[1:], "a row of JSON lines has the keys it had"


def test_nothing_dropped_is_a_result_too(tmp_path):
    done = write_cleaned(ROWS, decide(SCORES, count=2, floor=99.0), tmp_path / "data.parquet")
    assert read(done.path) == ROWS
    assert parquet.read_table(done.dropped).num_rows == 0


def test_a_result_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "data.parquet"
    write_cleaned(ROWS, DECISION, path)
    with pytest.raises(ConfigError, match=r"data\.parquet exists\. Give another name, or allow it to be replaced"):
        write_cleaned(ROWS, DECISION, path)
    other = decide(-SCORES, count=1)
    done = write_cleaned(ROWS, other, path, overwrite=True)
    assert read(path) == ROWS[1:]
    assert json.loads(done.provenance.read_text())["dropped"][0]["row"] == 0
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious").write_text("x")
    with pytest.raises(ConfigError, match=r"runs exists and is no data set folder, so it is not replaced"):
        write_cleaned(ROWS, DECISION, tmp_path / "runs", overwrite=True)
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(ConfigError, match=r"d\.parquet exists and is no file"):
        write_cleaned(ROWS, DECISION, tmp_path / "d.parquet", overwrite=True)
    assert (tmp_path / "runs" / "precious").exists()


@pytest.mark.parametrize("name", ["data.csv", "data.json", "data.v2"])
def test_other_suffixes_are_errors(tmp_path, name):
    with pytest.raises(ConfigError, match=r"has a form that is not known; give NAME\.parquet, NAME\.jsonl, or the name of a folder"):
        write_cleaned(ROWS, DECISION, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("data.parquet", ROWS[:-1], r"there are 7 rows, but the decision is about 8"),
        ("data.parquet", [*ROWS[:-1], ("x", 1)], r"row 7 is of type tuple; give raw rows"),
        ("data.parquet", [*ROWS[:-1], {"label": "one"}], r"column 'label' cannot be held by a table: .* Give its values one type"),
        ("data.jsonl", [*ROWS[:-1], {"weight": float("nan")}], r"row 5 of those that stay cannot be written as JSON: .* Write \.parquet"),
        ("data.jsonl", [{"x": b"bytes"}] * 8, r"row 0 of those that stay cannot be written as JSON: .*bytes"),
    ],
)
def test_rows_that_cannot_be_written_leave_nothing(tmp_path, name, rows, message):
    with pytest.raises(DataError, match=message):
        write_cleaned(rows, DECISION, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_datasets_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'a data set folder, unlike NAME\.parquet, needs datasets, .*pip install "whence\[hf\]"'):
        write_cleaned(ROWS, DECISION, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "data.parquet"
    write_cleaned(ROWS, DECISION, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cleaned, "write_json_atomic", full)
    with pytest.raises(StorageError, match=r"cannot write .*data\.parquet: No space left on device"):
        write_cleaned(ROWS, decide(-SCORES, count=1), path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_rename_that_fails_brings_the_old_result_back(tmp_path, monkeypatch):
    path = tmp_path / "data.parquet"
    write_cleaned(ROWS, DECISION, path)
    (tmp_path / "data.parquet.dropped.parquet").unlink()
    (tmp_path / "data.parquet.dropped.parquet").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*data\.parquet"):
        write_cleaned(ROWS, decide(-SCORES, count=1), path, overwrite=True)
    assert read(path) == KEPT


# Runs in a process of its own, in which a child writes two results, the second over the first, and is killed just before
# its n-th change of the disk; each of them lies in a folder `killedN`.
KILLED = """
import os, pathlib, signal, sys
import torch
from whence.evaluate.clean import decide
from whence.evaluate.cleaned import write_cleaned
from whence.storage import run

torch.set_num_threads(1)
run._git_commit = lambda: None
EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
rows = [{"idx": n, "text": f"row {n}"} for n in range(5)]
scores = torch.arange(5.0)
name = sys.argv[2]

def scenario(folder):
    write_cleaned(rows, decide(scores, count=1), folder / name)
    write_cleaned(rows, decide(scores, count=2), folder / name, overwrite=True)

def kill_at(target):
    count = 0
    def due():
        nonlocal count
        count += 1
        if count == target:
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in EVENTS or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            due()
    sys.addaudithook(hook)
    os.fsync = lambda descriptor: due()  # not for the power cut: a file is written between its opening and this

root = pathlib.Path(sys.argv[1])
scenario(root / "whole")  # imports what is imported late, once and not in every child
target, killed = 0, True
while killed:
    target += 1
    (root / f"killed{target}").mkdir()
    child = os.fork()
    if child == 0:
        try:
            kill_at(target)
            scenario(root / f"killed{target}")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
print(target - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["data.parquet", *(pytest.param(name, marks=pytest.mark.slow) for name in FORMS[1:])])
def test_a_kill_at_any_moment_leaves_nothing_or_a_complete_result(tmp_path, name):
    if name == "data":
        pytest.importorskip("datasets")
    answer = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), name], capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 0, answer.stderr
    kills, seen = int(answer.stdout), []
    assert kills > 20
    for number in range(1, kills + 2):
        path = tmp_path / f"killed{number}" / name
        seen.append(len(read(path)) if path.exists() else 0)
        visible = {file.name for file in path.parent.iterdir() if not file.name.startswith(".")}
        if path.exists():
            record = json.loads(path.with_name(f"{name}.provenance.json").read_text())
            assert record["cleaned"]["rows"] == seen[-1], f"killed at point {number}"
            assert record["cleaned"]["sha256"] == fingerprint_rows(read(path)), f"killed at point {number}"
            assert parquet.read_table(path.with_name(f"{name}.dropped.parquet")).num_rows == 5 - seen[-1]
            assert visible == {name, f"{name}.provenance.json", f"{name}.dropped.parquet"}
        else:
            # The next run needs no permission, since there is no result.
            write_cleaned(ROWS, DECISION, path)
            assert read(path) == KEPT
    assert seen[0] == 0
    assert 4 in seen, "the first result"
    assert seen[-1] == 3, "the run that was not killed"
