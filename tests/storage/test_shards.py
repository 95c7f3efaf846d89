"""Shards: round trips, kills at every system call, second writers, altered files, other settings, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from whence.errors import ConfigError, MismatchError, StorageError
from whence.storage.shards import ShardStore

SETTINGS: dict[str, Any] = {"model": "ab12", "fit": {"strategy": "ekfac", "damping": 0.1, "empirical": False}, "layers": ["a", "b"]}


def make(folder: Path, **settings: Any) -> ShardStore:
    return ShardStore(folder, kind="factors", settings=SETTINGS | settings)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shard_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_round_trip_of_every_kind_of_tensor(tmp_path: Path) -> None:
    matrix = torch.randn(4, 6, dtype=torch.float64)
    tensors = {
        "bfloat16": torch.randn(3, 2).bfloat16(),
        "integers": torch.arange(5, dtype=torch.int8),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": matrix.T,
        "shared": matrix,
        "overlapping": matrix[1:3],
        "trainable": torch.nn.Parameter(torch.randn(2)),
    }
    with make(tmp_path / "deep" / "store") as store:
        store.write("layer/0 ünicode", tensors)
        store.write("nothing", {})
    store = ShardStore.open(tmp_path / "deep" / "store", kind="factors", settings=SETTINGS)
    read = store.read("layer/0 ünicode")
    assert list(read) == sorted(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.detach()), name
    read["scalar"] += 1  # what was read may be written to
    assert store.read("nothing") == {}
    assert store.settings == SETTINGS


def test_names_complete_result_overwrite_and_remove(tmp_path: Path) -> None:
    with make(tmp_path) as store:
        assert (store.names, store.complete, store.result) == ((), False, {})
        for name in ("b", "a", "partial"):
            store.write(name, {"x": torch.zeros(2)})
        store.write("b", {"x": torch.ones(2)})
        store.remove("partial")
        assert store.names == ("b", "a")
        store.finish({"rows": 7, "mean": [1, 2]})
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
    store = ShardStore.open(tmp_path, kind="factors")
    assert (store.names, store.complete, store.result) == (("b", "a"), True, {"rows": 7, "mean": [1, 2]})
    assert store.read("b")["x"].tolist() == [1, 1]
    with make(tmp_path) as store:
        assert store.complete
        store.write("c", {})
        assert (store.complete, store.result) == (False, {})


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = torch.randn(3, 4), torch.arange(3)
    with make(tmp_path / "one") as store:
        store.write("s", {"a": first, "b": second})
        store.write("t", {"a": first})
        store.finish({"p": 1, "q": 2})
    with ShardStore(tmp_path / "two", kind="factors", settings=dict(reversed(SETTINGS.items()))) as store:
        store.write("s", {"b": second + 1})
        store.write("gone", {"b": second})
    with make(tmp_path / "two") as store:
        store.remove("gone")
        store.write("s", {"b": second, "a": first.T.contiguous().T})
        store.write("t", {"a": first})
        store.finish({"q": 2, "p": 1})
    assert files(tmp_path / "one") == files(tmp_path / "two")


# Runs in a process of its own: makes a store, once unharmed in `whole`, then killed just before its n-th system call; a kill
# at the call that follows the writing of a file leaves half of it.
KILLED = """
import os, pathlib, shutil, signal, sys
import torch
from whence.storage import shards

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a killed process loses nothing the kernel has: only a power cut would

def scenario(folder):
    with shards.ShardStore(folder, kind="factors", settings={"seed": 1}) as store:
        for name, value in (("a", 1.0), ("running", 2.0), ("running", 3.0), ("b", 4.0)):
            if value not in [float(store.read(n)["x"][0]) for n in store.names]:
                store.write(name, {"x": torch.full((8,), value)})
        if "running" in store.names:
            store.remove("running")
        store.finish({"n": 2})

def with_suppressed(call, *args):
    try:
        call(*args)
    except OSError:  # a folder
        pass

def kill_at(target):
    count = 0
    def wrap(owner, name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == target:
                if name == "fsync" and os.fstat(args[0]).st_size > 20:
                    with_suppressed(os.ftruncate, args[0], 20)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, call)
    for name in ("replace", "fsync"):
        wrap(os, name)
    for name in ("unlink", "mkdir"):
        wrap(pathlib.Path, name)

root = pathlib.Path(sys.argv[1])
scenario(root / "whole")
target, killed = 0, True
while killed:
    target += 1
    child = os.fork()
    if child == 0:
        try:
            kill_at(target)
            scenario(root / f"killed{target}")
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if killed:
        if (root / f"killed{target}").exists():
            shutil.copytree(root / f"killed{target}", root / f"seen{target}")
        scenario(root / f"killed{target}")
print(target - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_system_call_leaves_a_store_that_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 0, answer.stderr
    kills = int(answer.stdout)
    assert kills > 40
    whole = files(tmp_path / "whole")
    assert len(whole) == 4  # two shards, the manifest, the lock
    for n in range(1, kills + 1):
        assert files(tmp_path / f"killed{n}") == whole, f"killed at point {n}"
        seen = tmp_path / f"seen{n}"
        if not (seen / "manifest.json").exists():
            continue
        # As the kill left it: each finished shard is sound, with at most one half file and one whole shard not listed.
        store = ShardStore.open(seen, kind="factors")
        known = {entry["file"] for entry in json.loads((seen / "manifest.json").read_text())["shards"]}
        for name in store.names:
            assert store.read(name)["x"][0] in {"a": [1], "running": [2, 3], "b": [4]}[name]
        others = files(seen).keys() - known - {"manifest.json", ".lock"}
        half = {other for other in others if other.endswith(".tmp")}
        assert len(half) <= 1, f"killed at point {n}"
        assert len(others - half) <= 1, f"killed at point {n}"


HOLDS = """
import sys, time, torch
from whence.storage.shards import ShardStore
store = ShardStore(sys.argv[1], kind="factors", settings={})
store.write("a", {"x": torch.ones(3)})
print("ready", flush=True)
time.sleep(100)
"""


def test_a_second_writer_is_refused_at_once_and_let_in_after_a_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            start = time.perf_counter()
            with pytest.raises(StorageError, match=r"is being written by another process.*Wait for it to end"):
                ShardStore(tmp_path, kind="factors", settings={})
            assert time.perf_counter() - start < 1
            assert ShardStore.open(tmp_path, kind="factors").names == ("a",)  # readers are not kept out
        finally:
            holder.send_signal(signal.SIGKILL)
    with ShardStore(tmp_path, kind="factors", settings={}) as store:
        assert store.names == ("a",)


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with make(tmp_path), pytest.raises(StorageError, match="is being written by another process"):
        make(tmp_path)
    make(tmp_path).close()


def test_only_files_of_the_store_are_cleaned_away(tmp_path: Path) -> None:
    with make(tmp_path) as store:
        store.write("a", {"x": torch.ones(3)})
    before = files(tmp_path)
    (tmp_path / ".manifest.json.0123abcd.tmp").write_text("half")
    (tmp_path / "b.0123456789abcdef.safetensors").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine too")
    ShardStore.open(tmp_path, kind="factors")
    assert len(files(tmp_path)) == len(before) + 4
    make(tmp_path).close()
    assert files(tmp_path) == before | {"notes.txt": b"mine", "model.safetensors": b"mine too"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "cd34"}, r'other settings: model: stored "ab12", present "cd34"\. Use the stored value, or give another folder'),
        ({"fit": SETTINGS["fit"] | {"damping": 0.2}}, r"fit\.damping: stored 0\.1, present 0\.2"),
        ({"fit": SETTINGS["fit"] | {"empirical": 0}}, r"fit\.empirical: stored false, present 0"),
        ({"fit": SETTINGS["fit"] | {"new": None}}, r"fit\.new: stored absent, present null"),
        ({"fit": {"strategy": "ekfac"}}, r"fit\.damping: stored 0\.1, present absent; fit\.empirical: stored false, present absent"),
        ({"fit": "ekfac"}, r'fit: stored \{"damping": 0\.1.*, present "ekfac"'),
        ({"layers": ["a"]}, r'layers: stored \["a", "b"\], present \["a"\]'),
        ({"layers": ["x" * 500]}, r"present \[\"x+ \.\.\. \(504 characters\)"),
        ({"p": 1, "q": 1, "r": 1, "s": 1}, r"p: stored absent.*r: stored absent, present 1 \(and 1 more\)"),
    ],
)
def test_other_settings_are_named_field_by_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make(tmp_path).close()
    before = files(tmp_path)
    with pytest.raises(MismatchError, match=message):
        make(tmp_path, **changes)
    with pytest.raises(MismatchError, match=message):
        ShardStore.open(tmp_path, kind="factors", settings=SETTINGS | changes)
    assert files(tmp_path) == before
    make(tmp_path).close()  # the failed attempt did not keep the lock


def test_equal_settings_in_other_clothes_are_accepted(tmp_path: Path) -> None:
    make(tmp_path, n=1, nan=float("nan")).close()
    make(tmp_path, n=1.0, nan=float("nan"), layers=("a", "b")).close()
    ShardStore.open(tmp_path, kind="factors")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path).close()
    with pytest.raises(MismatchError, match="holds 'factors', but 'scores' was asked for"):
        ShardStore.open(tmp_path, kind="scores")


def test_settings_that_are_not_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings of a store must be JSON .*Tensor"):
        make(tmp_path, bad=torch.ones(1))
    with make(tmp_path) as store, pytest.raises(ConfigError, match="result of a store must be JSON"):
        store.finish({"bad": torch.ones(1)})


def alter_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"a\.\w+\.safetensors is missing: the manifest expects \d+ bytes\. Delete the folder .* and run again"),
        (lambda path: os.truncate(path, 50), r"a\.\w+\.safetensors is truncated: expected \d+ bytes, found 50\. Delete the folder"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), r"is altered: expected \d+ bytes, found \d+\."),
        (alter_one_byte, r"is altered: expected checksum \(SHA-256\) \w{64}, found \w{64}\. Delete the folder"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    with make(tmp_path) as store:
        store.write("a", {"x": torch.ones(30)})
    damage(shard_file(tmp_path))
    with pytest.raises(StorageError, match=message):
        ShardStore.open(tmp_path, kind="factors").read("a")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"x"', "{}", '{"format": 99}', '{"format": 1, "kind": "factors", "settings": {}, "shards": [3]}', "\udc80"],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    make(tmp_path).close()
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    for attempt in (lambda: make(tmp_path), lambda: ShardStore.open(tmp_path, kind="factors")):
        with pytest.raises(StorageError, match=r"manifest\.json is not a manifest .* delete the folder .* and run again"):
            attempt()


def test_missing_stores_and_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"manifest\.json is missing: nothing was stored there"):
        ShardStore.open(tmp_path / "no", kind="factors")
    assert not (tmp_path / "no").exists()
    with make(tmp_path) as store:
        with pytest.raises(StorageError, match="no finished shard 'b'; it has none"):
            store.read("b")
        store.write("a", {})
        with pytest.raises(StorageError, match="no finished shard 'b'; it has 'a'"):
            store.remove("b")


def test_readers_and_closed_stores_do_not_write(tmp_path: Path) -> None:
    with make(tmp_path) as closed:
        closed.write("a", {"x": torch.ones(1)})
    closed.close()
    assert closed.read("a")["x"] == 1
    for store in (closed, ShardStore.open(tmp_path, kind="factors")):
        for attempt in (lambda s: s.write("a", {}), lambda s: s.remove("a"), lambda s: s.finish()):
            with pytest.raises(StorageError, match="is not open for writing"):
                attempt(store)


@pytest.mark.parametrize("name", ["", "n" * 181, "ü" * 40])
def test_names_that_cannot_be_files_are_refused(tmp_path: Path, name: str) -> None:
    with make(tmp_path) as store, pytest.raises(StorageError, match="cannot be a file name: give 1 to 180 characters"):
        store.write(name, {})


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    with make(tmp_path / "store") as store:
        for name in ("..", "../x", "/x", "a\0b", "con", "n" * 180):
            store.write(name, {"x": torch.ones(1)})
            assert store.read(name)["x"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with make(tmp_path) as store:
        store.write("a", {"x": torch.ones(3)})
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            if call == "open":
                patch.setattr("io.open", full)
            for attempt in (lambda: store.write("b", {"x": torch.ones(1)}), store.finish):
                with pytest.raises(StorageError, match=r"cannot write .*: No space left on device\. Free some space"):
                    attempt()
        assert store.names == ("a",)
        assert not store.complete
        assert files(tmp_path) == before
        store.write("b", {})  # once there is space again, the same object goes on
    assert ShardStore.open(tmp_path, kind="factors").names == ("a", "b")


def test_a_disk_that_fills_between_shard_and_manifest_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with make(tmp_path) as store:
        store.write("a", {"x": torch.ones(3)})
        before = files(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(StorageError, match="No space left"):
                store.write("a", {"x": torch.zeros(3)})
        assert store.read("a")["x"].tolist() == [1, 1, 1]
    make(tmp_path).close()
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/store: .* make the folder writable"):
        make(tmp_path / "file" / "store")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    make(tmp_path / "store").close()
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(StorageError, match=r"cannot write .*store: Permission denied\."):
        make(tmp_path / "store")
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*manifest\.json: Permission denied"):
        ShardStore.open(tmp_path / "store", kind="factors")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_error(tmp_path: Path) -> None:
    make(tmp_path / "store").close()
    (tmp_path / "store").chmod(0o500)
    try:
        with pytest.raises(StorageError, match=r"cannot write .* make the folder writable"), make(tmp_path / "store") as store:
            store.write("a", {})
    finally:
        (tmp_path / "store").chmod(0o700)
