"""Indexes that are replaced, appended to and deleted from, kills in between, and rows that are not those that were indexed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import whence
from breaking import broken_off
from cases import case_named, watch
from whence.errors import ConfigError, MismatchError, StorageError
from whence.index import writer
from whence.index.index import Index

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()
WHOLE: dict[str, Any] = {"projection": "none", "keep": 1, "dtype": "float32"}


def fitted(run_dir: Path | None = None) -> whence.Attributor:
    return MLP.attributor(MLP.model(), run_dir=run_dir).fit(ROWS, empirical=True)


def files(index: Index) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in index.folder.iterdir() if path.suffix}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 4)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)


@pytest.mark.usefixtures("small_shards")
def test_a_replacement_broken_off_anywhere_leaves_the_old_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = ROWS[:8], ROWS[5:]
    made = fitted(tmp_path / "fresh").index(new, **WHOLE)
    fresh, new_scores = files(made), made.scores(QUERIES)
    attributor = fitted(tmp_path / "replaced")
    first = attributor.index(old, **WHOLE)
    before, scores = files(first), first.scores(QUERIES)
    for after in range(100):
        shutil.rmtree(first.folder)
        first.folder.mkdir()
        for name, data in before.items():
            (first.folder / name).write_bytes(data)
        broken = broken_off(monkeypatch, after, lambda: attributor.index(new, **WHOLE, overwrite=True))
        try:
            found = Index(attributor, first.folder)
        except StorageError as error:
            assert "unfinished" in str(error)  # noqa: PT017
        else:
            expected = scores if found._stored.parts[0].fingerprint == first._stored.parts[0].fingerprint else new_scores
            assert torch.equal(found.scores(QUERIES), expected)
        assert files(attributor.index(new, **WHOLE, overwrite=True)) == fresh
        if not broken:
            return
    raise AssertionError("so many writes?")


@pytest.mark.usefixtures("small_shards")
def test_an_append_broken_off_anywhere_leaves_the_index_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = list(range(5, len(ROWS)))
    whole = fitted(tmp_path / "whole").index(ROWS[:5], **WHOLE)
    before, scores = files(whole), whole.scores(QUERIES)
    whole.append(ROWS[5:], ids=more)
    attributor = fitted(tmp_path / "broken")
    index = attributor.index(ROWS[:5], **WHOLE)
    for after in range(100):
        shutil.rmtree(index.folder)
        index.folder.mkdir()
        for name, data in before.items():
            (index.folder / name).write_bytes(data)
        broken = broken_off(monkeypatch, after, lambda: Index(attributor, index.folder, train=ROWS).append(ROWS[5:], ids=more))
        found = Index(attributor, index.folder, train=ROWS)
        if len(found) == 5:
            assert torch.equal(found.scores(QUERIES), scores)
            assert attributor.index(ROWS[:5], **WHOLE).ids.tolist() == list(range(5))
            if after % 2:  # other rows take the place of the unfinished ones
                found.append(ROWS[7:9], ids=[7, 8])
                assert found.ids.tolist() == [*range(5), 7, 8]
                found.query(QUERIES, k=7, rescore=1.0)
                continue
            found.append(ROWS[5:], ids=more)
        else:
            attributor.index(ROWS[:5], **WHOLE)
        assert files(found) == files(whole)
        if not broken:
            return
    raise AssertionError("so many writes?")


def test_append_writes_to_its_own_folder(tmp_path: Path) -> None:
    attributor = fitted(tmp_path / "run")
    here = attributor.index(ROWS[:8], **WHOLE)
    shutil.copytree(here.folder, tmp_path / "elsewhere")
    there = Index(attributor, tmp_path / "elsewhere", train=ROWS[:8])
    there.append(ROWS[8:], ids=range(8, len(ROWS)))
    assert len(there) == len(ROWS)
    assert len(Index(attributor, here.folder)) == 8
    assert there.query(QUERIES, rescore=1.0).exact


def test_the_same_rows_may_be_appended_under_other_ids() -> None:
    index = fitted().index(ROWS[:5], **WHOLE)
    index.append(ROWS[:5], ids=range(20, 25))
    assert len(index.query(QUERIES, k=10, rescore=1.0).top()) == 10


def test_append_never_erases_an_index() -> None:
    model = MLP.model()
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    # In a temporary run folder other calls replace what is there.
    one, other = (MLP.attributor(which).fit(ROWS, empirical=True) for which in (MLP.model(), watch(model)))
    index = one.index(ROWS[:8], **WHOLE)
    with pytest.raises(MismatchError, match="model"):
        Index(other, index.folder).append(ROWS[8:], ids=range(8, len(ROWS)))
    assert len(Index(one, index.folder)) == 8


def test_exact_scores_leave_no_trace_and_are_of_the_queries_asked(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    index = attributor.index(ROWS, **WHOLE)
    exact = attributor.scores(QUERIES, ROWS, name="index").values
    records, coverage = (tmp_path / "run.json").read_bytes(), str(attributor.coverage)
    for query in (0, 1):
        answer = index.query(QUERIES, k=3, rescore=0.5, query_rows=[query])
        assert [score for _, score in answer.top(0)] == pytest.approx(exact[query].sort(descending=True).values[:3].tolist())
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["index"]
    assert torch.equal(whence.Scores.load(tmp_path / "scores/index").values, exact)
    assert ((tmp_path / "run.json").read_bytes(), str(attributor.coverage)) == (records, coverage)


def test_rows_that_are_not_the_indexed_ones_are_not_scored(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    ids = [50 + row for row in range(len(ROWS))]
    index = attributor.index(ROWS, **WHOLE, ids=ids)
    same = Index(attributor, index.folder, train=ROWS)
    assert same.query(QUERIES, rescore=1.0).top() == index.query(QUERIES, rescore=1.0).top()
    assert torch.equal(same.row(52)[0], ROWS[2][0])
    other = Index(attributor, index.folder, train=ROWS[::-1])
    assert other.row(52) is None
    with pytest.raises(MismatchError, match=r"not those that were indexed .*rescore=0"):
        other.query(QUERIES, rescore=0.5)
    assert other.query(QUERIES, rescore=0).top() == same.query(QUERIES, rescore=0).top()


def test_deletions_of_others_are_kept(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    one = attributor.index(ROWS, **WHOLE)
    other = Index(attributor, one.folder)
    one.delete([3])
    other.delete(np.array([9]))
    assert set(range(len(ROWS))) - set(other.ids.tolist()) == {3, 9}
    with pytest.raises(ConfigError, match="id 9 is not in the index"):
        one.delete([9])


def test_an_index_starts_anew_when_it_was_changed(tmp_path: Path) -> None:
    attributor = fitted(tmp_path)
    index = attributor.index(ROWS[:8], **WHOLE)
    fresh = files(index)
    index.append(ROWS[8:], ids=range(8, len(ROWS)))
    index.delete([1])
    with pytest.raises(ConfigError, match="id 8 and 4 more are in the index already"):
        index.append(ROWS[8:], ids=range(8, len(ROWS)))
    with pytest.raises(ConfigError, match="id 0 and 6 more are in the index already"):
        index.append(ROWS[:8], ids=range(8))
    assert len(attributor.index(ROWS[:8], **WHOLE)) == len(ROWS) - 1
    assert files(attributor.index(ROWS[:8], **WHOLE, overwrite=True)) == fresh


def test_an_index_without_rows_cannot_be_asked(tmp_path: Path) -> None:
    index = fitted(tmp_path).index(ROWS, **WHOLE)
    index.delete(range(len(ROWS)))
    with pytest.raises(ConfigError, match=r"all rows of .* are deleted"):
        index.query(QUERIES)
    assert index.scores(QUERIES).shape == (len(QUERIES), 0)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0, True], "entry 1 is True"),
        ([0, -1], "entry 1 is -1"),
        ([0, 1.5], "entry 1 is 1.5"),
        (["a", 1], "entry 0 is 'a'"),
        ([2**63, 1], "entry 0 is 9223372036854775808"),
        (torch.tensor([True, False]), "entry 0 is True"),
        (np.array([4, 4]), "ids repeat, id 4"),
        (5, "a list of whole numbers, not 5"),
    ],
)
def test_ids_that_cannot_be(ids: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        fitted().index(ROWS[:2], **WHOLE, ids=ids)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda ids: [np.int32(one) for one in ids]])
def test_ids_of_any_kind_of_whole_numbers(kind: Any) -> None:
    assert fitted().index(ROWS[:3], **WHOLE, ids=kind([4, 9, 2])).ids.tolist() == [4, 9, 2]


@pytest.mark.parametrize("projection", ["factors", "sjlt"])
def test_layers_that_no_row_reaches_are_left_out_of_the_coverage(tmp_path: Path, projection: str) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unused = torch.nn.Linear(3, 4), torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    torch.manual_seed(0)
    rows = [(torch.randn(3), number % 4) for number in range(6)]
    attributor = whence.Attributor(Two(), whence.tasks.Classification(), run_dir=tmp_path, progress=False)
    index = attributor.index(rows, projection=projection, keep=1, strategy="identity")
    assert "unused" in str(attributor.coverage)
    assert list(attributor.coverage.tracked) == ["body"]
    assert torch.isfinite(index.scores(rows)).all()
