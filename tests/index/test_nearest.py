"""The approximate index beside many rows, against reading all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import whence
from cases import case_named
from whence.errors import ConfigError, StorageError
from whence.index.dense import SCALES, VALUES, DenseRows
from whence.index.encoding import encode
from whence.index.names import COUNT, FINGERPRINT, IDS, NORM, about, done, row_shards
from whence.index.nearest import write_nearest
from whence.index.projection import RowSettings
from whence.index.stored import StoredIndex
from whence.runtime.progress import Stages
from whence.storage.shards import ShardStore

pytest.importorskip("faiss")
MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()
MANY, SIZES = 5000, (20, 12)


@dataclass(frozen=True)
class Numbers:
    """A layer's part of a row, of which only the size is asked."""

    size: int


PROJECTION = DenseRows(parts={str(size): Numbers(size) for size in SIZES}, settings=RowSettings(projection="pca"))  # type: ignore[dict-item]


class Bench:
    """Queries are their own rows."""

    def index_queries(self, queries: Tensor, query_rows: Any, settings: Any) -> tuple[DenseRows, Tensor]:
        return PROJECTION, queries

    def index_nearest(self, folders: list[Path], rows: Any, settings: Any) -> None:
        write_nearest(StoredIndex.open(folders[0]), PROJECTION, seed=0, stages=Stages(enabled=False))


def clustered(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, sum(SIZES), generator=torch.Generator().manual_seed(0))
    drawn = torch.randint(50, (rows,), generator=generator)
    return centres[drawn] + 0.5 * torch.randn(rows, sum(SIZES), generator=generator)


def many(folder: Path) -> whence.Index:
    """Return an index of clustered rows, in three shards; ids count down."""
    with ShardStore(folder, kind="index", settings={"rows": PROJECTION.settings.to_json(), "layers": {"a": [1, 1, sum(SIZES)]}}) as store:
        store.write(about(0), {IDS: torch.arange(MANY).flip(0), FINGERPRINT: torch.zeros(32, dtype=torch.uint8)})
        first = 0
        for part in clustered(MANY, 1).split(2048):
            values, scales = zip(*(encode(own, "int8") for own in part.split(SIZES, dim=1)), strict=True)
            kept = {VALUES: torch.cat(values, dim=1), SCALES: torch.stack(scales, dim=1), NORM: torch.ones(len(part))}
            store.write(f"part-0000/rows-{first:09d}", kept)
            first += len(part)
        store.write(done(0), {COUNT: torch.tensor(MANY)})
    return whence.Index(Bench(), folder, train=[0])  # type: ignore[arg-type]


def shared(found: Tensor, wanted: Tensor) -> float:
    return float((found.unsqueeze(2) == wanted.unsqueeze(1)).any(1).double().mean())


def test_most_of_the_best_are_found_in_few_lists_and_all_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = many(tmp_path), clustered(20, 2)
    brute = index.query(queries, k=10, rescore=0)
    index.accelerate()
    read: list[int] = []
    real = DenseRows.scores
    with monkeypatch.context() as patch:
        patch.setattr(DenseRows, "scores", lambda own, rows, held, examples: read.append(examples) or real(own, rows, held, examples))
        near = index.query(queries, k=10, rescore=0)
    assert sum(read) < MANY, "all rows were read"
    for side in ("proponents", "opponents"):
        found, wanted = getattr(near, side), getattr(brute, side)
        assert shared(found.ids, wanted.ids) >= 0.9
        everywhere = getattr(index.query(queries, k=10, rescore=0, nprobe=10**6), side)
        assert torch.equal(everywhere.ids, wanted.ids)
        torch.testing.assert_close(everywhere.values, wanted.values, rtol=1e-6, atol=1e-5)
    assert torch.equal(index.query(queries, k=10, rescore=0, nprobe=0).proponents.ids, brute.proponents.ids)
    fewest = index.query(queries, k=10, rescore=0, nprobe=1)
    assert shared(fewest.proponents.ids, brute.proponents.ids) < 1, "one list has all of the best: the data are too easy"
    assert index.query(queries, k=MANY, rescore=0, nprobe=1).proponents.ids.shape == (20, MANY)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        many(tmp_path / name).accelerate()
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix} for name in "ab")
    assert one == other
    many(tmp_path / "a").accelerate()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.suffix} == one
    assert sum(name.endswith(".faiss") for name in one) == 1


def test_deleted_rows_are_left_out_and_noticed(tmp_path: Path) -> None:
    index, queries = many(tmp_path), clustered(3, 2)
    index.accelerate()
    best = index.query(queries, k=2, rescore=0).proponents.ids.flatten().unique()
    index.delete(best)
    with pytest.warns(UserWarning, match="appended or deleted since .* whence index --faiss"):
        brute = index.query(queries, k=5, rescore=0)
    index.query(queries, k=5, rescore=0)  # says it once
    index.accelerate()
    near = index.query(queries, k=5, rescore=0, nprobe=10**6)
    assert torch.equal(near.proponents.ids, brute.proponents.ids)
    assert not torch.isin(near.proponents.ids, best).any()


def test_a_missing_or_altered_file_is_noticed(tmp_path: Path) -> None:
    index, queries = many(tmp_path), clustered(3, 2)
    index.accelerate()
    index.verify()
    (file,) = tmp_path.glob("*.faiss")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match="is altered"):
        index.verify()
    file.unlink()
    with pytest.warns(UserWarning, match="is missing"):
        whence.Index(Bench(), tmp_path).query(queries, k=2, rescore=0)  # type: ignore[arg-type]
    (tmp_path / "nearest.json").write_text("{}")
    with pytest.raises(StorageError, match="does not say what it should"):
        whence.Index(Bench(), tmp_path).query(queries, k=2, rescore=0)  # type: ignore[arg-type]


def test_broken_off_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = many(tmp_path), clustered(3, 2)

    def killed(path: Path, value: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("whence.index.nearest.write_json_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            index.accelerate()
    assert not (tmp_path / "nearest.json").exists()
    wanted = index.query(queries, k=2, rescore=0)
    index.accelerate()
    assert torch.equal(index.query(queries, k=2, rescore=0, nprobe=10**6).proponents.ids, wanted.proponents.ids)
    assert len(list(tmp_path.glob("*.faiss"))) == 1
    assert row_shards(StoredIndex.open(tmp_path).store, 0)


@pytest.mark.parametrize("projection", ["pca", "kronecker", "sjlt", "none"])
def test_gradients_of_a_model(projection: str) -> None:
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    index = attributor.index(ROWS, projection=projection, keep=0.5, dtype="float32")
    wanted = index.query(QUERIES, k=3, rescore=0.5)
    before = index.row_bytes
    index.accelerate()
    assert index.row_bytes > before
    found = index.query(QUERIES, k=3, rescore=0.5, nprobe=10**6)
    assert torch.equal(found.proponents.ids, wanted.proponents.ids)
    assert torch.equal(found.opponents.values, wanted.opponents.values)
    index.delete(index.ids)
    with pytest.raises(ConfigError, match=r"all rows of .* are deleted"):
        index.accelerate()


def test_rows_without_an_approximate_index() -> None:
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    with pytest.raises(ConfigError, match=r"'factors' keeps triplets.*'pca'"):
        attributor.index(ROWS, keep=0.5).accelerate()
    index = attributor.index(ROWS, projection="none", name="none")
    with pytest.raises(ConfigError, match="open the index with train"):
        whence.Index(attributor, index.folder).accelerate()
    with pytest.raises(ConfigError, match="nprobe=-1"):
        index.query(QUERIES, nprobe=-1)
    model = MLP.model()
    both = whence.Checkpoints(model, MLP.task(), [model.state_dict()] * 2, collate=MLP.collate, device="cpu", progress=False)
    with pytest.raises(ConfigError, match="several checkpoints"):
        both.index(ROWS, strategy="identity", projection="none").accelerate()


def test_faiss_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    attributor = MLP.attributor(MLP.model()).fit(ROWS, empirical=True)
    with pytest.raises(ConfigError, match=r'an approximate index needs faiss.*pip install "whence\[faiss\]"'):
        attributor.index(ROWS, projection="none").accelerate()
