"""Recall of wrong labels, on rankings small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from whence.errors import ConfigError, DataError
from whence.evaluate.mislabeled import recall_at, recall_curve, roc_area

WRONG = torch.tensor([True, False, True, False])


def test_a_ranking_by_hand():
    # Order by falling score: rows 2, 1, 0, 3.
    curve = recall_curve(torch.tensor([1.0, 2.0, 3.0, 0.0]), WRONG)
    assert curve.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.recalls.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.area == pytest.approx(0.25 * (0.25 + 0.5 + 0.75 + 1))


def test_the_best_and_the_worst_ranking():
    assert recall_curve(WRONG.double(), WRONG).recalls.tolist() == [0, 0.5, 1, 1, 1]
    assert recall_curve(-WRONG.double(), WRONG).recalls.tolist() == [0, 0, 0, 0.5, 1]


def test_equal_scores_do_as_well_as_chance_whatever_their_order():
    torch.testing.assert_close(recall_curve(torch.zeros(4), WRONG).recalls, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    # Rows 0 and 1 share the first place, and one of them is wrong: half a wrong label after one row.
    scores = torch.tensor([5.0, 5.0, 1.0, 0.0])
    assert recall_curve(scores, WRONG).recalls.tolist() == [0, 0.25, 0.5, 1, 1]
    swapped = torch.tensor([1, 0, 2, 3])
    assert recall_curve(scores[swapped], WRONG[swapped]).recalls.tolist() == [0, 0.25, 0.5, 1, 1]


def test_order_of_rows_is_of_no_account():
    torch.manual_seed(0)
    scores, wrong = torch.randint(0, 20, (300,)).float(), torch.rand(300) < 0.2
    shuffle = torch.randperm(300)
    torch.testing.assert_close(recall_curve(scores, wrong).recalls, recall_curve(scores[shuffle], wrong[shuffle]).recalls)


def test_random_scores_find_what_chance_finds():
    torch.manual_seed(0)
    wrong = torch.rand(20_000) < 0.1
    curve = recall_curve(torch.rand(20_000), wrong)
    # About 2,000 wrong labels: a share's standard deviation is at most 0.011; four of those.
    assert (curve.recalls - curve.fractions).abs().max() < 0.045


def test_shares_round_down_to_whole_rows():
    scores, wrong = torch.arange(100, 0, -1).float(), torch.ones(100, dtype=torch.bool)
    assert recall_at(scores, wrong, 0.29) == pytest.approx(0.29), "0.29 * 100 is a hair below 29"
    assert recall_at(scores, wrong, 0.295) == pytest.approx(0.29)
    assert recall_at(scores, wrong, 0) == 0
    assert recall_at(scores, wrong, 1) == 1


@pytest.mark.parametrize(
    ("scores", "wrong", "message"),
    [
        ([1.0, 2.0], [True], r"shape \(2,\) and flipped \(1,\)"),
        ([1.0, float("nan")], [True, False], r"score of row 1 is NaN"),
        ([1.0, 2.0], [False, False], r"no label is marked as wrong"),
        ([], [], r"no label is marked"),
    ],
)
def test_rankings_that_cannot_be(scores, wrong, message):
    with pytest.raises(DataError, match=message):
        recall_curve(torch.tensor(scores), torch.tensor(wrong, dtype=torch.bool))


def test_a_share_outside_zero_to_one_is_an_error():
    with pytest.raises(ConfigError, match=r"fraction=10 is no share"):
        recall_at(torch.tensor([1.0]), torch.tensor([True]), 10)


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    wrong = torch.tensor([True, False, True, False])
    assert roc_area(torch.tensor([3.0, 2.0, 1.0, 0.0]), wrong) == 0.75
    assert roc_area(torch.ones(4), wrong) == 0.5
