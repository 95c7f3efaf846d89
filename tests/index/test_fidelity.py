"""How near an index says that it comes to exact scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import whence
from breaking import broken_off
from cases import case_named
from whence.index import writer
from whence.index.fidelity import drawn_for_fidelity, fidelity, recall
from whence.storage.shards import ShardStore
from whence.tasks import Task

MLP = case_named("mlp")
ROWS, _ = MLP.data()


def test_agreement_is_counted() -> None:
    exact = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    found = torch.tensor([[8.0, 6.0, 4.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    measured = fidelity(found, exact)
    assert (measured.spearman, measured.least, measured.recall) == (0.0, -1.0, 1.0)
    assert (measured.queries, measured.rows) == (2, 4)
    assert recall(found, exact, 2, 2) == 0.5
    assert recall(found, exact, 1, 3) == 0.5
    assert fidelity(torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])).spearman == 0


def test_queries_are_not_among_their_rows() -> None:
    assert drawn_for_fidelity(2, 0) is None
    asked, rows = drawn_for_fidelity(1000, 0) or ([], [])
    assert (len(asked), len(rows), set(asked) & set(rows)) == (16, 256, set())
    assert drawn_for_fidelity(1000, 0) == drawn_for_fidelity(1000, 0) != drawn_for_fidelity(1000, 1)


def test_an_index_knows_its_own(tmp_path: Path) -> None:
    attributor = MLP.attributor(MLP.model(), run_dir=tmp_path).fit(ROWS, empirical=True)
    whole = attributor.index(ROWS, projection="none", dtype="float32")
    assert whole.fidelity is not None
    assert whole.fidelity.spearman > 0.999
    assert (whole.fidelity.queries, whole.fidelity.rows) == (4, 9)
    coarse = attributor.index(ROWS, projection="sjlt", keep=0.1, name="coarse")
    assert coarse.fidelity is not None
    asked, places = drawn_for_fidelity(len(ROWS), 0) or ([], [])
    exact = attributor.scores(ROWS, ROWS, query_rows=asked, train_rows=places, name="drawn").values
    assert coarse.fidelity == fidelity(coarse.scores(ROWS, query_rows=asked)[:, places], exact)
    assert coarse.fidelity.spearman < 0.99
    assert "Spearman" in str(coarse.fidelity)
    again = whence.Index(attributor, coarse.folder)
    again.delete([0])
    assert again.fidelity == coarse.fidelity


class Targeted(Task):
    """A task whose measurement needs a key that training rows do not have, or that is not finite on them."""

    def __init__(self, missing: bool) -> None:
        self.missing = missing

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def measurement(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.missing or "target" in batch:
            return model(batch["x"]).gather(1, batch["target"][:, None])[:, 0]
        return model(batch["x"])[:, 0] * float("nan")


@pytest.mark.parametrize(("missing", "why"), [(True, "KeyError: 'target'"), (False, "NumericalError: Query gradients: ")])
def test_rows_that_cannot_be_measured_leave_a_whole_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: bool, why: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(5, generator=generator), "y": place % 3} for place in range(9)]
    queries = [{**row, "target": 1} for row in rows[:2]]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    attributor = whence.Attributor(model, Targeted(missing), run_dir=tmp_path, progress=False)
    for _ in range(2):  # the same call says it again, and changes nothing
        index = attributor.index(rows, strategy="identity", projection="none", dtype="float32")
        assert index.fidelity is None
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.count("\n") == 1
        assert why in told.err
        assert ShardStore.open(index.folder, kind="index").complete
    exact = attributor.scores(queries, rows, strategy="identity").values
    torch.testing.assert_close(index.scores(queries), exact, rtol=1e-4, atol=1e-6)


def test_a_measurement_broken_off_anywhere_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BLOCK", 8)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1)

    def made(folder: Path) -> whence.Index:
        attributor = MLP.attributor(MLP.model(), run_dir=folder)
        return attributor.index(ROWS, projection="none", dtype="float32", strategy="identity")

    def files(index: whence.Index) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in index.folder.iterdir() if path.suffix}

    whole = made(tmp_path / "whole")
    assert whole.fidelity is not None
    without = 0
    for after in range(100):
        folder = tmp_path / str(after)
        broken = broken_off(monkeypatch, after, lambda folder=folder: made(folder))  # type: ignore[misc]
        if (folder / "index/identity/manifest.json").exists():
            store = ShardStore.open(folder / "index/identity", kind="index")
            without += store.complete and "fidelity" not in store.names
        assert files(made(folder)) == files(whole)
        if not broken:
            break
    assert without, "complete before it is measured"
