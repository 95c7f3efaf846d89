"""Queries explained as one, groups of rows, and what an index shows in notebooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import whence
from case_run import HOSTILE, Elements
from cases import case_named
from compare import assert_close
from whence import indexing
from whence.evaluate.clean import decide
from whence.index import turns
from whence.scores.groups import Together

MLP = case_named("mlp")
ROWS, QUERIES = MLP.data()


@cache
def attributor() -> whence.Attributor:
    return MLP.attributor(MLP.model()).fit(ROWS, strategy="ekfac", empirical=True)


def made(**options: Any) -> whence.Index:
    return attributor().index(ROWS, **{"projection": "none", "keep": 1, "dtype": "float32", "name": "together", **options})


@pytest.mark.parametrize("rescore", [0.0, 0.5, 1.0])
def test_queries_together_are_the_mean_of_their_scores(rescore: float) -> None:
    answer = made().query(QUERIES, k=3, rescore=rescore, together=True)
    mean = attributor().scores(QUERIES, ROWS).values.mean(0)
    assert answer.exact is (rescore > 0)
    assert [row for row, _ in answer.top(0)] == mean.argsort(descending=True)[:3].tolist()
    assert [score for _, score in answer.top(0)] == pytest.approx(mean.sort(descending=True)[0][:3].tolist(), rel=1e-4)
    assert [row for row, _ in answer.bottom(0)] == mean.argsort()[:3].tolist()
    assert answer.agreement is not None
    assert answer.agreement.queries == len(QUERIES)


def test_one_query_together_is_that_query() -> None:
    one, together = (made().query(QUERIES, query_rows=[2], together=together) for together in (False, True))
    assert together.top(0) == [(row, pytest.approx(score, rel=1e-9)) for row, score in one.top(0)]
    assert one.agreement is None


@pytest.mark.parametrize("several", [1, 3])
def test_queries_that_do_not_fit_into_memory_together_are_taken_in_turns(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made().scores(QUERIES, query_rows=[3, 0, 1])
    numbers = sum(layer.parameters for layer in attributor()._layers)
    monkeypatch.setattr(turns, "QUERY_BYTES", several * 4 * numbers)
    assert_close(made().scores(QUERIES, query_rows=[3, 0, 1]), whole, "in turns", rtol=1e-5, atol_of_largest=1e-6)


def test_groups_are_of_the_rows_of_the_index() -> None:
    index = made(ids=range(50, 50 + len(ROWS)), name="groups")
    index.delete([52])
    kept = [row for row in range(len(ROWS)) if row != 2]
    assert index.places() == kept
    groups = [place % 3 for place in index.places()]
    scores = attributor().scores(QUERIES, ROWS, train_rows=kept)
    for together in (False, True):
        found = index.by_group(QUERIES, groups, together=together)
        wanted = scores.by_group(groups).sums
        assert_close(found.sums, wanted.mean(0, keepdim=True) if together else wanted, "sums", rtol=1e-4, atol_of_largest=1e-5)


def test_appended_rows_stand_behind_the_first() -> None:
    index = attributor().index(ROWS[:8], keep=0.5, name="appended")
    index.append(ROWS[8:], ids=range(100, 100 + len(ROWS) - 8))
    assert index.places() == list(range(len(ROWS)))


def test_the_same_object_may_be_appended_again() -> None:
    index = attributor().index(ROWS, keep=0.5, name="twice")
    index.append(ROWS, ids=range(100, 100 + len(ROWS)))
    assert index.places() == list(range(2 * len(ROWS)))
    assert (index.place(3), index.place(103)) == (3, None)
    assert index.row(103) is ROWS[3]


def test_places_are_known_without_reading_the_rows() -> None:
    class Counted(list):  # type: ignore[type-arg]
        read = 0

        def __getitem__(self, place: Any) -> Any:
            Counted.read += 1
            return super().__getitem__(place)

    index = whence.Index(attributor(), made().folder, train=Counted(ROWS))
    first = index.places()
    Counted.read = 0
    assert index.places() == first
    assert Counted.read == 0


def test_no_call_holds_more_queries_than_scores_does(monkeypatch: pytest.MonkeyPatch) -> None:
    real, held = indexing._held, list[int]()
    monkeypatch.setattr(indexing, "_held", lambda ready, rows: held.append(len(rows)) or real(ready, rows))
    monkeypatch.setattr(turns, "QUERY_BYTES", 1)
    index = made(name="one-at-a-time")
    index.query(QUERIES, rescore=0)
    index.query(QUERIES, rescore=0, together=True)
    index.by_group(QUERIES, range(len(ROWS)), together=True)
    assert set(held) == {1}
    monkeypatch.undo()
    whole = made(name="all-at-once")
    assert index.fidelity == whole.fidelity
    for query in range(len(QUERIES)):
        wanted = whole.query(QUERIES, rescore=0).top(query)
        assert index.query(QUERIES, rescore=0).top(query) == [(row, pytest.approx(score, rel=1e-4)) for row, score in wanted]


def test_answers_in_turns_are_those_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    index = made()
    whole, explained = index.query(QUERIES, k=3, rescore=0), index.query(QUERIES, k=3, rescore=0, together=True)
    monkeypatch.setattr(turns, "QUERY_BYTES", 2 * 4 * sum(layer.parameters for layer in attributor()._layers))
    again = index.query(QUERIES, k=3, rescore=0)
    for side in ("proponents", "opponents"):
        assert torch.equal(getattr(again, side).ids, getattr(whole, side).ids)
        assert_close(getattr(again, side).values, getattr(whole, side).values, side, rtol=1e-5)
    assert index.query(QUERIES, k=3, rescore=0, together=True).top() == [
        (row, pytest.approx(score, rel=1e-4)) for row, score in explained.top()
    ]


def test_together_keeps_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    index, seen = made(), list[int]()
    real = Together.add
    monkeypatch.setattr(Together, "add", lambda own, values: seen.append(len(values)) or real(own, values))
    monkeypatch.setattr(turns, "QUERY_BYTES", 1)
    index.query(QUERIES, rescore=0, together=True)
    assert seen == [1] * len(QUERIES)


def test_answers_show_themselves_in_notebooks() -> None:
    folder = made().folder
    index = whence.Index(attributor(), folder, train=ROWS, describe=lambda row: f"{HOSTILE} {'long ' * 50}")
    for together in (False, True):
        table = index.query(QUERIES, together=together)._repr_html_()
        Elements(table)
        assert "<img" not in table
        assert "&lt;img" in table
        assert "..." in table, "texts are cut"
        assert ("mean correlation" in table) is together
        table.encode("utf-8")
    plain = made().query(QUERIES, rescore=0)._repr_html_()
    assert "the index&#x27;s own scores" in plain
    Elements(plain)


@pytest.mark.parametrize("classes", [None, torch.arange(20) % 2])
def test_decisions_show_themselves_in_notebooks(classes: torch.Tensor | None) -> None:
    decision = decide(torch.arange(20.0), count=12, classes=classes, keep_share=0.1)
    table = decision._repr_html_()
    Elements(table)
    assert "dropped 12 of 20 rows" in table
    assert "and 2 more" in table
    assert ("class 1: 6 of 10" in table) is (classes is not None)
