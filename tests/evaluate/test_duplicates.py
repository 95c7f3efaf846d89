"""Planted duplicates: where copies are put, how they are ranked, and that real scores find them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cases
from whence import Attributor
from whence.errors import ConfigError, DataError
from whence.evaluate.duplicates import duplicate_ranks, plant, sample_rows
from whence.tasks import Classification


def test_copies_stand_at_the_end():
    train, queries = [f"row {n}" for n in range(5)], [f"query {n}" for n in range(8)]
    planted = plant(train, queries, count=3, seed=1)
    assert list(planted.chosen) == sample_rows(8, 3, seed=1)
    assert planted.positions == (5, 6, 7)
    assert [planted.train[row] for row in range(5)] == train
    copies = [queries[query] for query in planted.chosen]
    assert [planted.train[row] for row in planted.positions] == copies
    assert [planted.queries[place] for place in range(3)] == copies
    assert (len(planted.train), len(planted.queries)) == (8, 3)
    assert len(train) == 5, "the data set itself stays as it was"
    assert plant(train, queries, count=8).chosen == tuple(range(8))


def test_rows_are_drawn_without_replacement_by_the_seed():
    drawn = sample_rows(100, 20, seed=4)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 20
    assert drawn == sample_rows(100, 20, seed=4)
    assert drawn != sample_rows(100, 20, seed=5)
    for count in (0, 101):
        with pytest.raises(ConfigError, match="of 100 rows cannot be drawn; give 1 to 100"):
            sample_rows(100, count)
    with pytest.raises(ConfigError, match="count=3 of 2 rows"):
        plant([1], [1, 2], count=3)
    with pytest.raises(DataError, match="the training data set is empty"):
        plant([], [1, 2], count=1)


def test_ranks_and_what_they_come_to():
    scores = torch.tensor([[5.0, 1, 3, 2], [5, 1, 3, 2], [-1, -1, -1, -1], [4, 7, 7, 0]])
    found = duplicate_ranks(scores, [0, 3, 2, 2])
    assert found.ranks.tolist() == [1, 3, 2.5, 1.5], "equal scores share their mean rank"
    assert found.rows == 4
    assert found.mean_reciprocal.value == pytest.approx((1 + 1 / 3 + 1 / 2.5 + 1 / 1.5) / 4)
    assert found.recall(1).value == 0.25
    assert found.recall(2).value == 0.5
    assert found.recall().value == 1.0
    # Wilson's interval of 4 in 4.
    assert (found.recall().low, found.recall().high) == pytest.approx((0.5101, 1.0), abs=1e-4)
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (plain["queries"], plain["rows"], plain["recall_at_1"]["value"]) == (4, 4, 0.25)
    with pytest.raises(ConfigError, match="k=0 rows can hold no copy"):
        found.recall(0)


def test_random_scores_have_the_rank_that_is_said():
    found = duplicate_ranks(torch.rand(2000, 19), [3] * 2000)
    # Uniform on 1 to 19: standard deviation 5.5, so 0.12 of the mean.
    assert float(found.ranks.mean()) == pytest.approx(10, abs=0.6)


def test_cosines_of_gradients_find_the_row_itself():
    generator = torch.Generator().manual_seed(0)
    train = [(torch.randn(4, generator=generator).double(), number % 3) for number in range(30)]
    model = cases.build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    attributor = Attributor(model, Classification())
    rows = sample_rows(30, 8)
    scores = attributor.scores([train[row] for row in rows], train, strategy="identity", normalize="cosine").values
    assert duplicate_ranks(scores, rows).ranks.tolist() == [1.0] * 8
    planted = plant(train, train, count=8)
    both = attributor.scores(planted.queries, planted.train, strategy="identity", normalize="cosine").values
    twice = duplicate_ranks(both, planted.positions)
    assert all(1 <= rank <= 2 for rank in twice.ranks.tolist()), "the original and its copy share the first two ranks"
    shifted = duplicate_ranks(scores, [(row + 1) % 30 for row in rows])
    assert shifted.mean_reciprocal.value < 0.6, "rows that are off by one are seen"


@pytest.mark.parametrize(
    ("scores", "positions", "error", "text"),
    [
        (torch.zeros(3), [0], DataError, r"scores have shape \(3,\) for 1 copies"),
        (torch.zeros(2, 3), [0], DataError, "one copy per query"),
        (torch.full((1, 3), float("nan")), [0], DataError, "the score of query 0 and row 0 is NaN"),
        (torch.zeros(1, 3), [3], ConfigError, "positions: 3 is no row of a data set of 3 rows"),
    ],
)
def test_what_cannot_be_is_refused(scores, positions, error, text):
    with pytest.raises(error, match=text):
        duplicate_ranks(scores, positions)
