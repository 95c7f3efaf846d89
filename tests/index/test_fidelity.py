"""How near an index says that it comes to exact scores."""

from __future__ import annotations

from pathlib import Path

import torch

import whence
from cases import case_named
from whence.index.fidelity import drawn_for_fidelity, fidelity, recall

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
