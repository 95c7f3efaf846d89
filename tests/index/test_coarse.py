"""Coarse vectors of triplets: what they say of rows, and that a question looks at the right ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import whence
from breaking import broken_off
from cases import case_named
from whence.index import coarse, writer
from whence.index import index as index_module
from whence.index.factors import FactorRows
from whence.index.index import Index
from whence.index.names import COARSE
from whence.storage.shards import ShardStore

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()
WHOLE: dict[str, Any] = {"projection": "factors", "keep": 1, "dtype": "float32"}


def fitted(run_dir: Path | None = None) -> whence.Attributor:
    return MLP.attributor(MLP.model(), run_dir=run_dir).fit(ROWS, empirical=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST_ROWS": 4, "LEAST": 1, "SHARE": 100, "_CHUNK_ROWS": 3}.items():
        monkeypatch.setattr(coarse, name, value)
    monkeypatch.setattr(writer, "BLOCK", 4)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)


def asked(index: Index) -> tuple[FactorRows, Any]:
    projection, held = index._bench.index_queries(QUERIES, None, index.settings)
    assert isinstance(projection, FactorRows)
    return projection, held


def stored_rows(index: Index, projection: FactorRows) -> dict[str, Tensor]:
    parts = [(index._stored.store.read(name), len(ids)) for name, ids in index._stored.shards()]
    return projection.join([part for part, _ in parts], [count for _, count in parts])


def test_rows_at_some_places_have_their_scores() -> None:
    index = fitted().index(ROWS, **WHOLE)
    projection, held = asked(index)
    places = torch.tensor([1, 2, 5, 7])
    some = projection.at(stored_rows(index, projection), places)
    torch.testing.assert_close(projection.scores(some, held, 4).T, index.scores(QUERIES)[:, places])


def test_with_all_rows_as_landmarks_the_products_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "encode", lambda vectors, dtype: (vectors, torch.ones(len(vectors))))
    monkeypatch.setattr(coarse, "decode", lambda values, dtype, numbers: values)
    index = fitted().index(ROWS, **WHOLE)
    projection, held = asked(index)
    rows, shared = stored_rows(index, projection), index._stored.store.read(COARSE)
    queries = projection.scores(shared, held, len(ROWS)).T @ shared["basis"]
    found = coarse.products(coarse.coarse_vectors(projection, rows, len(ROWS), shared), queries).T
    expected = index.scores(QUERIES)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_a_question_finds_what_reading_all_rows_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the coarse vectors, which name some of the rows, of all numbers that the landmarks have; deleted rows are not found."""
    many = MLP.rows(torch.Generator().manual_seed(3), 60)
    index = fitted().index(many, **WHOLE)
    best = index.query(QUERIES, k=1, rescore=0, query_rows=[0], nprobe=0).top()[0][0]
    index.delete([best])
    read: list[int] = []
    of_some = FactorRows.at

    def counted(projection: FactorRows, rows: Any, places: Tensor) -> dict[str, Tensor]:
        read.append(len(places))
        return of_some(projection, rows, places)

    monkeypatch.setattr(FactorRows, "at", counted)
    one = index.query(QUERIES, k=1, rescore=0, query_rows=[0])
    assert 0 < sum(read) < len(many) / 2
    read.clear()
    everything = index.query(QUERIES, k=1, rescore=0, query_rows=[0], nprobe=0)
    assert not read
    assert one.top()[0][0] == everything.top()[0][0] != best
    assert one.bottom()[0][0] == everything.bottom()[0][0]
    assert one.top()[0][1] == pytest.approx(everything.top()[0][1], rel=1e-5)


def test_few_rows_are_all_read() -> None:
    index = fitted().index(ROWS, **WHOLE)
    assert COARSE in index._stored.store.names
    assert coarse.promising(index._stored, *asked(index), 1) is None


def test_only_the_rows_that_are_named_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    index = fitted().index(ROWS, **WHOLE)
    index.delete([3])
    scores = dict(zip(index.ids.tolist(), index.scores(QUERIES).T, strict=True))
    projection, held = asked(index)
    places = index._stored.alive[::2]
    monkeypatch.setattr(index_module, "promising", lambda *arguments: places)
    found = list(index._blocks((projection, held), 1, None))
    ids = torch.cat([some for some, _ in found])
    assert len(ids) == len(places) < len(scores)
    assert 3 not in ids
    assert set(ids.tolist()) < set(scores)
    for some, values in found:
        for example, own in zip(some.tolist(), values, strict=True):
            torch.testing.assert_close(own, scores[example])


@pytest.mark.parametrize("again", [True, False])
def test_an_index_that_is_older_than_coarse_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again: bool) -> None:
    """Written and appended to without; then the first part is written again, and the appended one has them too, or all rows are read."""
    many = MLP.rows(torch.Generator().manual_seed(3), 60)
    attributor = fitted(tmp_path)
    with monkeypatch.context() as older:
        older.setattr(coarse, "LEAST_ROWS", 10**9)
        attributor.index(many[:40], **WHOLE).append(many[40:], ids=range(40, 60))
    index = attributor.index(many[:40], **WHOLE)
    names = index._stored.store.names
    rows = {name for name in names if "/rows-" in name}
    assert {name.replace("/coarse-", "/rows-") for name in names if "/coarse-" in name} == rows
    assert any(name.startswith("part-0001") for name in rows)
    if not again:  # as one that was written while the appended rows were left without
        lost = next(name for name in names if name.startswith("part-0001/coarse-"))
        with ShardStore(index.folder, kind="index", settings=index._stored.store.settings) as store:
            store.remove(lost)
            store.finish(index._stored.store.result)
        index = Index(attributor, index.folder)
    one = index.query(QUERIES, k=1, rescore=0, query_rows=[0])
    everything = index.query(QUERIES, k=1, rescore=0, query_rows=[0], nprobe=0)
    assert one.top()[0][0] == everything.top()[0][0]
    named = coarse.promising(index._stored, *attributor.index_queries(QUERIES, [0], index.settings), 1)
    assert (named is not None) == again


def test_the_ends_are_among_the_promising(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = MLP.data()[0]
    many = [rows[i % len(rows)] for i in range(60)]
    attributor = MLP.attributor(MLP.model()).fit(rows, empirical=True)
    index = attributor.index(many, **WHOLE)
    one = attributor.index_queries(QUERIES, [0], index.settings)
    places = coarse.promising(index._stored, *one, 1)
    assert places is not None
    assert len(places) < len(many)
    scores = index.scores(QUERIES, query_rows=[0])[0]
    assert float(scores[places].max()) == pytest.approx(float(scores.max()))
    assert float(scores[places].min()) == pytest.approx(float(scores.min()))


def test_appended_rows_have_coarse_vectors_too() -> None:
    index = fitted().index(ROWS[:6], **WHOLE)
    index.append(ROWS[6:], ids=range(6, len(ROWS)))
    rows = [name for name in index._stored.store.names if "/rows-" in name]
    assert {name.replace("/coarse-", "/rows-") for name in index._stored.store.names if "/coarse-" in name} == set(rows)
    assert len(rows) > 1


def test_few_rows_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "LEAST_ROWS", len(ROWS) + 1)
    assert not [name for name in fitted().index(ROWS, **WHOLE)._stored.store.names if "coarse" in name]
    monkeypatch.setattr(coarse, "LEAST_ROWS", 1)
    assert not [name for name in fitted().index(ROWS, projection="pca", keep=1 / 4)._stored.store.names if "coarse" in name]


def test_an_index_broken_off_at_any_write_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix}

    fresh = fitted(tmp_path / "fresh").index(ROWS, **WHOLE)
    attributor = fitted(tmp_path / "broken")
    for after in range(100):
        broken = broken_off(monkeypatch, after, lambda: attributor.index(ROWS, **WHOLE))
        assert files(attributor.index(ROWS, **WHOLE).folder) == files(fresh.folder)
        if not broken:
            return
        shutil.rmtree(fresh.folder.parent.parent.parent / "broken" / "index")
    raise AssertionError("so many writes?")
