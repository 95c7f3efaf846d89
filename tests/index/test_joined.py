"""Several checkpoints in one index: scores, changes, and kills between two folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import whence
from breaking import broken_off
from cases import case_named
from whence.errors import ConfigError, MismatchError, StorageError
from whence.index import writer

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()
WHOLE: dict[str, Any] = {"projection": "none", "keep": 1, "dtype": "float32"}


def several(run_dir: Path | None = None, count: int = 3, **fitting: Any) -> whence.Checkpoints:
    """Return checkpoints some way off the model, fitted."""
    model, generator = MLP.model(), torch.Generator().manual_seed(3)
    states = [
        {name: value + 0.3 * torch.randn(value.shape, generator=generator).to(value) for name, value in model.state_dict().items()}
        for _ in range(count)
    ]
    options: dict[str, Any] = {"collate": MLP.collate, "device": "cpu", "progress": False}
    return whence.Checkpoints(model, MLP.task(), states, run_dir=run_dir, **options).fit(ROWS, **{"empirical": True, **fitting})


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= 2e-6 * expected.abs().max()


def files(index: whence.Index) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in index.folders for path in folder.iterdir() if path.suffix}


def restore(index: whence.Index, before: dict[str, bytes]) -> None:
    for folder in index.folders:
        shutil.rmtree(folder)
        folder.mkdir()
    for path, data in before.items():
        Path(path).write_bytes(data)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 4)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_whole_rows_give_the_mean_of_the_scores(strategy: Any) -> None:
    checkpoints = several(strategy=strategy)
    index = checkpoints.index(ROWS, strategy=strategy, **WHOLE)
    exact = checkpoints.scores(QUERIES, ROWS, strategy=strategy).values
    close(index.scores(QUERIES), exact)
    close(index.self_influence, checkpoints.self_influence(ROWS, strategy=strategy))
    assert index.row_bytes == sum(whence.Index(None, folder).row_bytes for folder in index.folders)  # type: ignore[arg-type]


def test_the_best_are_scored_exactly() -> None:
    checkpoints = several()
    exact = checkpoints.scores(QUERIES, ROWS)
    index = checkpoints.index(ROWS, projection="sjlt", keep=0.3)
    answer = index.query(QUERIES, k=3, rescore=1.0)
    assert answer.exact
    for query in range(len(QUERIES)):
        assert answer.top(query) == [(row, pytest.approx(score, rel=1e-6)) for row, score in exact.top(query, 3)]
        assert answer.bottom(query) == [(row, pytest.approx(score, rel=1e-6)) for row, score in exact.bottom(query, 3)]
    together = index.query(QUERIES, k=3, rescore=1.0, together=True)
    assert together.proponents.values[0].tolist() == pytest.approx(exact.values.mean(0).sort(descending=True).values[:3].tolist())
    assert index.fidelity is not None
    own = [whence.Index(one, folder).fidelity for one, folder in zip(checkpoints.attributors, index.folders, strict=True)]
    assert index.fidelity.least == min(one.least for one in own if one)


def test_rows_are_appended_and_deleted_at_every_checkpoint(tmp_path: Path) -> None:
    checkpoints = several(tmp_path)
    exact = checkpoints.scores(QUERIES, ROWS).values
    index = checkpoints.index(ROWS[:8], **WHOLE)
    index.append(ROWS[8:], ids=range(8, len(ROWS)))
    close(index.scores(QUERIES), exact)
    index.delete([3, 9])
    kept = [row for row in range(len(ROWS)) if row not in (3, 9)]
    again = whence.Index(checkpoints, checkpoints.index_folders("ekfac"), train=ROWS)
    assert again.ids.tolist() == index.ids.tolist() == kept
    close(again.scores(QUERIES), exact[:, kept])
    assert again.query(QUERIES, k=2, rescore=1.0).top() == index.query(QUERIES, k=2, rescore=1.0).top()
    with pytest.raises(ConfigError, match="id 3 is not in the index"):
        index.delete([3])
    index.delete(kept)
    assert index.scores(QUERIES).shape == (len(QUERIES), 0)
    index.verify()
    file = max(index.folders[-1].glob("*rows*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="altered"):
        index.verify()


def test_tokens_are_means() -> None:
    case = case_named("norm_padded")
    train, queries = case.data()
    model = case.model()
    states = [{name: value * factor for name, value in model.state_dict().items()} for factor in (1.0, 1.2)]
    options: dict[str, Any] = {"collate": case.collate, "device": "cpu", "progress": False, "layers": case.layers}
    checkpoints = whence.Checkpoints(model, case.task(), states, **options)
    found = checkpoints.index(train, strategy="identity", **WHOLE).explain(queries, [2, 4])
    close(found.values, checkpoints.scores(queries, train, strategy="identity").values[:, [2, 4]])
    parts = []
    for state, attributor in zip(states, checkpoints.attributors, strict=True):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        parts.append(attributor.token_scores(queries, train, strategy="identity", train_rows=[2, 4]))
        model.load_state_dict(kept)
    for side in ("rows", "queries"):
        close(getattr(found, side), torch.stack([getattr(part, side) for part in parts]).mean(0))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["append", "delete"])
def test_a_change_broken_off_anywhere_is_there_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    checkpoints = several(tmp_path, count=2, strategy="identity")

    def opened() -> whence.Index:
        return whence.Index(checkpoints, checkpoints.index_folders("identity"), train=ROWS)

    def changed() -> None:
        opened().append(ROWS[9:], ids=range(9, len(ROWS))) if change == "append" else opened().delete([1, 2])

    index = checkpoints.index(ROWS[:9], strategy="identity", **WHOLE)
    before, old = files(index), index.scores(QUERIES)
    changed()
    after, new = files(opened()), opened().scores(QUERIES)
    between = 0
    for allowed in range(100):
        restore(index, before)
        broken = broken_off(monkeypatch, allowed, changed)
        now = opened()
        assert torch.equal(now.scores(QUERIES), new if len(now) == new.shape[1] else old)
        if len(now) == 9:  # not there yet, as long as it is not at every checkpoint
            between += len(whence.Index(checkpoints, index.folders[0])) != 9
            if change == "append" and allowed % 2:  # other rows take the place of those that were not finished
                now.append(ROWS[11:], ids=[11, 12])
                assert now.ids.tolist() == [*range(9), 11, 12]
                assert now.query(QUERIES, k=3, rescore=1.0).exact
                continue
            changed()
        else:
            checkpoints.index(ROWS[:9], strategy="identity", **WHOLE)
        if change == "append":
            assert files(now) == after
        assert torch.equal(opened().scores(QUERIES), new)
        if not broken:
            assert between, "no break came between the two folders"
            return
    raise AssertionError("so many writes?")


def test_an_index_broken_off_anywhere_goes_on_and_is_not_read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = several(tmp_path, count=2, strategy="identity")

    def make(rows: Any, **options: Any) -> whence.Index:
        return checkpoints.index(rows, strategy="identity", **{**WHOLE, **options})

    old = make(ROWS[:6])
    before, scores = files(old), old.scores(QUERIES)
    fresh = make(ROWS[4:], damping=0.5, overwrite=True)
    wanted, new_scores, seen = files(fresh), fresh.scores(QUERIES), set()
    for allowed in range(100):
        restore(old, before)
        broken = broken_off(monkeypatch, allowed, lambda: make(ROWS[4:], damping=0.5, overwrite=True))
        try:
            now = whence.Index(checkpoints, old.folders).scores(QUERIES)
        except StorageError as error:
            seen.add("not one index" in str(error))
        else:
            assert torch.equal(now, scores if now.shape == scores.shape else new_scores)
        assert files(make(ROWS[4:], damping=0.5, overwrite=True)) == wanted
        if not broken:
            assert seen == {True, False}
            return
    raise AssertionError("so many writes?")


@pytest.mark.parametrize("options", [{"damping": 0.5}, {"keep": 0.7}])
def test_indexes_that_were_made_otherwise_are_not_one(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoints = several(tmp_path, count=2)
    index = checkpoints.index(ROWS, keep=0.5)
    other = several(tmp_path / "other", count=2).index(ROWS, **{"keep": 0.5, **options})
    with pytest.raises(StorageError, match="are not one index: they differ in"):
        whence.Index(checkpoints, [index.folders[0], other.folders[1]])


def wrong_count(checkpoints: whence.Checkpoints, index: whence.Index) -> None:
    whence.Index(checkpoints, index.folders[:1], train=ROWS).scores(QUERIES)


def wrong_order(checkpoints: whence.Checkpoints, index: whence.Index) -> None:
    whence.Index(checkpoints, index.folders[::-1], train=ROWS).scores(QUERIES)


def one_model(checkpoints: whence.Checkpoints, index: whence.Index) -> None:
    whence.Index(checkpoints.attributors[0], index.folders, train=ROWS).scores(QUERIES)


@pytest.mark.parametrize(("ask", "text"), [(wrong_count, "of 1 checkpoints, not of 2"), (wrong_order, "model"), (one_model, "model")])
def test_an_index_of_other_checkpoints_is_refused(ask: Callable[..., None], text: str) -> None:
    checkpoints = several(count=2)
    with pytest.raises(MismatchError, match=text):
        ask(checkpoints, checkpoints.index(ROWS, keep=0.5))


def test_an_index_is_in_a_folder() -> None:
    with pytest.raises(ConfigError, match="folder is an empty list"):
        whence.Index(several(count=1), [])
