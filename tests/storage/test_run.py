"""Fingerprints change when the content does and only then; the run folder and atomic files."""

from __future__ import annotations

import collections
import enum
import errno
import gc
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from whence.errors import DataError, StorageError
from whence.storage.run import (
    RunFolder,
    fingerprint_model,
    fingerprint_rows,
    fingerprint_source,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from whence.tasks import Classification, Regression

# Rows of which no two may have the same fingerprint.
DIFFERENT: list[Any] = [
    None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, 1j, "", "1", "\ud800", b"", b"1", "None",
    np.float32(1), np.float64(1), np.int64(1), np.bool_(True), np.str_("1"), np.array(1), np.array([1]), np.array([[1]]),
    np.array([1], dtype=np.int32), np.array([1], dtype=">i8"), np.array(["1"]), np.datetime64("2020-01-01"),
    torch.tensor(1), torch.tensor([1]), torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32), torch.tensor([1.0]),
    torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.float16), torch.tensor([True]),
    torch.tensor([1j]), torch.empty(0), torch.empty(0, 2), torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6),
    [], [[]], [1], [1, 1], [11], [1, [1]], [[1], 1], [[1, 1]], [True, 1], [1, None], ["a", "b"], ["ab"], ["a:1"],
    {}, {"a": 1}, {"a": 2}, {"b": 1}, {1: "a"}, {"1": "a"}, {"a": {"b": 1}}, {"a": 1, "b": None}, [("a", 1)],
]  # fmt: skip


def test_different_rows_have_different_fingerprints() -> None:
    assert len({fingerprint_rows([row]) for row in DIFFERENT}) == len(DIFFERENT)
    nested = [{"x": [torch.ones(1), {"y": (row, "z")}]} for row in DIFFERENT]
    assert len({fingerprint_rows([row]) for row in nested}) == len(DIFFERENT)


def test_order_and_borders_of_rows_matter() -> None:
    data = [[[1], [2]], [[2], [1]], [[1, 2]], [[1], [2], []], [[], [1], [2]], []]
    assert len({fingerprint_rows(rows) for rows in data}) == len(data)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": [2, {"c": 3, "d": 4}]}, {"b": [2, {"d": 4, "c": 3}], "a": 1}),
        ({1: "a", "1": "b", None: "c"}, {None: "c", "1": "b", 1: "a"}),
        ({"a": 1}, collections.OrderedDict(a=1)),
        ({"a": 1}, collections.UserDict(a=1)),
        ([1, 2], (1, 2)),
        (1, Colour.RED),
        (b"x", bytearray(b"x")),
        (torch.arange(6).reshape(2, 3).T, torch.arange(6).reshape(2, 3).T.contiguous()),
        (torch.ones(2), nn.Parameter(torch.ones(2))),
        (torch.tensor([1 - 1j]), torch.tensor([1 + 1j]).conj()),
        (np.arange(6).reshape(2, 3).T, np.ascontiguousarray(np.arange(6).reshape(2, 3).T)),
        (float("nan"), float("nan")),
    ],
)
def test_the_same_content_has_the_same_fingerprint(one: Any, other: Any) -> None:
    assert fingerprint_rows([one]) == fingerprint_rows([other])


def test_a_tensor_dataset_is_hashed_by_its_rows_and_inspect_changes_nothing() -> None:
    inputs, labels = torch.randn(50, 3), torch.arange(50)
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    seen: list[int] = []
    inspected = fingerprint_rows(dataset, inspect=lambda index, row: seen.append(index + 100 * int(row[1])))
    assert seen == [101 * index for index in range(50)]
    assert inspected == fingerprint_rows(dataset) == fingerprint_rows(list(zip(inputs, labels, strict=True)))
    inputs[49, 2] += 1e-3
    assert inspected != fingerprint_rows(dataset)


def test_fingerprints_do_not_change_between_versions() -> None:
    rows = [{"text": "grün", "label": 3, "ids": [1, 2], "x": torch.tensor([1.5, 2.0]), "y": None, "z": np.array([1.0])}]
    assert fingerprint_rows(rows) == hashlib.sha256(
        b"d6:s1:xttorch.float32[2]" + np.array([1.5, 2], "<f4").tobytes() + b"s1:yNs1:za<f8[1]" + np.array([1.0]).tobytes()
        + b"s3:idsl2:i1;i2;s4:texts5:gr\xc3\xbcns5:labeli3;"
    ).hexdigest()  # fmt: skip


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"x": [object()]}, r"an object of type builtins\.object"),
        ({1, 2}, r"an object of type builtins\.set"),
        (Path("x"), r"an object of type pathlib\.\w+"),
        (np.array([None]), r"a numpy array of Python objects"),
        (torch.eye(2).to_sparse(), r"a tensor that is sparse"),
        (torch.empty(2, device="meta"), r"a tensor that is sparse, quantized or on the meta device"),
    ],
)
def test_an_unsupported_object_is_named_with_its_row(row: Any, found: str) -> None:
    with pytest.raises(DataError, match=rf"row 2 holds {found}.* Rows may hold torch tensors, numpy .* Convert it in"):
        fingerprint_rows([1, 2, row])


def test_a_row_that_cannot_be_read_is_named() -> None:
    class Broken(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise KeyError("label")

    with pytest.raises(DataError, match=r"row 0 cannot be read: KeyError: 'label'\. Mend or drop"):
        fingerprint_rows(Broken([1]))


def test_what_inspect_raises_comes_through() -> None:
    def inspect(index: int, row: Any) -> None:
        if index == 1:
            raise DataError(f"row {index}: label {row} is out of range")

    with pytest.raises(DataError, match="row 1: label 9 is out of range"):
        fingerprint_rows([1, 9, object()], inspect=inspect)


def test_small_rows_are_hashed_quickly() -> None:
    rows = [(torch.randn(64), index) for index in range(2000)]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        fingerprint_rows(rows)
        best = min(best, time.perf_counter() - start)
    assert best / len(rows) < 30e-6


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(4), persistent=False)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight)
        if tied:
            self.second.weight = self.first.weight


def build(tied: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(tied)


def test_a_model_has_one_fingerprint_for_its_numbers() -> None:
    original = fingerprint_model(build())
    assert original == fingerprint_model(build())
    assert original == fingerprint_model(build().requires_grad_(False).eval())
    changes = {
        "a parameter": lambda m: m.first.weight.data[0, 0].add_(1e-6),
        "a buffer": lambda m: m.norm.running_mean.add_(1),
        "a buffer that is not saved": lambda m: m.table.add_(1),
        "bfloat16": lambda m: m.bfloat16(),
        "a shape": lambda m: setattr(m.first.weight, "data", m.first.weight.data.reshape(1, 9)),
        "names": lambda m: setattr(m, "third", m._modules.pop("second")),
        "one layer more": lambda m: setattr(m, "third", nn.Linear(1, 1, bias=False)),
    }
    prints = {"original": original, "tied": fingerprint_model(build(tied=True))}
    for name, change in changes.items():
        model = build()
        change(model)
        prints[name] = fingerprint_model(model)
    assert len(set(prints.values())) == len(prints)
    assert prints["tied"] == fingerprint_model(build(tied=True))


def test_registration_order_does_not_matter() -> None:
    model = build(tied=True)
    before = fingerprint_model(model)
    model._modules = dict(reversed(model._modules.items()))
    assert fingerprint_model(model) == before
    assert fingerprint_model(nn.ReLU()) == hashlib.sha256().hexdigest()


def test_the_source_of_a_task_is_that_of_its_class() -> None:
    assert fingerprint_source(Classification()) == fingerprint_source(Classification(labels="y")) == fingerprint_source(Classification)
    assert fingerprint_source(Classification) != fingerprint_source(Regression)
    assert fingerprint_source(build) != fingerprint_source(Net)
    typed_in: dict[str, Any] = {"__name__": "session"}
    exec("class A:\n    pass\nclass B:\n    pass", typed_in)  # source that cannot be read
    assert fingerprint_source(typed_in["A"]()) == hashlib.sha256(b"session.A").hexdigest()
    assert fingerprint_source(typed_in["B"]()) != fingerprint_source(typed_in["A"]())
    assert fingerprint_source(3) == fingerprint_source(4) != fingerprint_source("3")


def test_a_changed_base_class_changes_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for number, base in enumerate(("x = 1", "x = 2", "x = 1")):
        (tmp_path / f"changing{number}.py").write_text(f"class Base:\n    {base}\nclass Mine(Base):\n    pass\n")
        prints.append(fingerprint_source(__import__(f"changing{number}").Mine()))
        sys.modules.pop(f"changing{number}")
    assert prints[0] == prints[2] != prints[1]


def test_a_temporary_run_folder_goes_with_its_object() -> None:
    folder = RunFolder(None)
    path = folder.path
    folder.record({})
    assert (path / "run.json").exists()
    del folder
    gc.collect()
    assert not path.exists()


def test_a_run_folder_records_what_was_done(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    assert folder.sub("factors", "ekfac") == tmp_path / "runs" / "one" / "factors" / "ekfac"
    assert not folder.path.exists()
    folder.record({"command": "fit", "settings": {"strategy": "ekfac", "path": tmp_path}})
    RunFolder(str(folder.path)).record({"coverage": 0.5})
    first, second = json.loads((folder.path / "run.json").read_text())
    assert first["command"] == "fit"
    assert first["settings"] == {"strategy": "ekfac", "path": str(tmp_path)}
    assert first["versions"].keys() == {"whence", "torch", "python", "numpy"}
    assert first["versions"]["torch"] == torch.__version__
    assert first["time"].endswith("+00:00")
    assert first["git_commit"] is None or len(first["git_commit"]) in (40, 64)
    assert second["coverage"] == 0.5
    assert second["command"]


def test_no_git_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    RunFolder(tmp_path).record({})
    assert json.loads((tmp_path / "run.json").read_text())[0]["git_commit"] is None


@pytest.mark.parametrize("text", ["", "[", "{}"])
def test_a_damaged_run_json_is_named_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match=r"run\.json is not a list of records in JSON .* Move it away"):
        RunFolder(tmp_path).record({})
    assert (tmp_path / "run.json").read_text() == text


def test_left_over_temporary_files_of_run_json_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".run.json.0123abcd.tmp").write_text("half")
    RunFolder(tmp_path).record({})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run.json"]


def test_atomic_writes_replace_or_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"b": 1, "a": [2]})
    assert json.loads(path.read_text()) == {"b": 1, "a": [2]}
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*x\.json: No space left on device\. Free some space"):
        write_bytes_atomic(path, b"new")
    assert json.loads(path.read_text()) == {"b": 1, "a": [2]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*gone: No such file or directory\. Check the path"):
        sha256_file(tmp_path / "gone")
