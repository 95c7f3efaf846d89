"""Decisions on which rows go, small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from whence.errors import ConfigError, DataError
from whence.evaluate.clean import copy_numbers, decide, duplicate_groups, harmful_scores

SCORES = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0, 0.0])


def test_the_highest_scores_go_however_the_number_is_asked_for():
    for asked in ({"count": 2}, {"fraction": 0.34}, {"threshold": 4.0}):
        decision = decide(SCORES, **asked)
        assert decision.dropped == (1, 3)
        assert decision.kept == (0, 2, 4, 5)
        assert decision.cut == 4
        assert decision.reasons == ("", "score", "", "score", "", "")
        assert {name: decision.settings[name] for name in asked} == asked


def test_shares_round_down_to_whole_rows():
    assert len(decide(torch.arange(100.0), fraction=0.29).dropped) == 29, "0.29 * 100 is a hair below 29"
    assert len(decide(torch.arange(100.0), fraction=0.299).dropped) == 29


def test_of_equal_scores_the_first_rows_go_and_the_summary_says_so():
    decision = decide(torch.tensor([1.0, 2.0, 2.0, 2.0]), count=2)
    assert decision.dropped == (1, 2)
    assert "1 kept rows have the score of the cut: among equal scores, the first rows go" in decision.lines()


def test_a_row_at_the_floor_never_goes():
    decision = decide(SCORES, count=5, floor=2.0)
    assert decision.dropped == (1, 2, 3)
    assert decide(SCORES, count=5, floor=9.0).dropped == ()
    assert decide(SCORES, count=5, floor=9.0).cut is None
    assert decide(SCORES, count=5, floor=9.0).lines() == ["dropped 0 of 6 rows (0.0%), 6 kept"]


def test_no_class_loses_more_than_its_share():
    classes = torch.tensor([0, 1, 1, 1, 1, 0])
    decision = decide(SCORES, count=4, classes=classes, keep_share=0.5)
    # Class 1 has rows 1, 3, 2, 4 by falling score and may lose two; class 0 has 0 and 5, and may lose one.
    assert decision.dropped == (0, 1, 3)
    assert [decision.reasons[row] for row in (2, 4, 5)] == ["class limit"] * 3
    assert decision.spared == (2, 4, 5)
    assert decision.per_class() == [{"class": 0, "rows": 2, "dropped": 1}, {"class": 1, "rows": 4, "dropped": 2}]


@pytest.mark.parametrize(("keep_share", "left"), [(0.0, 1), (0.1, 1), (0.25, 1), (0.26, 2), (0.7, 3), (0.75, 3), (1.0, 4)])
def test_the_kept_share_rounds_up_and_one_row_always_stays(keep_share, left):
    classes = torch.tensor([0, 1, 1, 1, 1, 0])
    decision = decide(SCORES, threshold=-1.0, classes=classes, keep_share=keep_share)
    assert sum(int(classes[row]) for row in decision.kept) == left


def test_the_floating_point_of_a_kept_share_costs_no_row():
    # 0.07 * 100 is a hair above 7.
    assert len(decide(torch.arange(100.0), threshold=-1.0, classes=torch.zeros(100, dtype=torch.int64), keep_share=0.07).kept) == 7


def test_limits_hold_for_any_scores():
    torch.manual_seed(0)
    for trial in range(50):
        classes = torch.randint(0, 4, (40,))
        groups = torch.arange(40) if trial % 2 else torch.randint(0, 15, (40,))
        decision = decide(torch.randn(40), count=12, classes=classes, keep_share=0.6, groups=groups)
        assert len(decision.dropped) <= 12
        assert sorted((*decision.dropped, *decision.kept)) == list(range(40))
        for one in decision.per_class():
            assert one["rows"] - one["dropped"] >= 0.6 * one["rows"]
        whole = {int(groups[row]) for row in decision.dropped} & {int(groups[row]) for row in decision.kept}
        assert not whole, "copies were torn apart"


def test_copies_go_together_and_stand_where_the_highest_stands():
    groups = torch.tensor([0, 1, 2, 3, 4, 1])
    decision = decide(SCORES, count=2, groups=groups)
    assert decision.dropped == (1, 5)
    assert decision.reasons[5] == "copy of row 1"
    assert decision.cut == 5, "the copy's own score is of no account"
    assert "1 of the dropped rows are copies that go with another row" in decision.lines()


def test_a_group_that_does_not_fit_stays_and_the_next_row_goes():
    groups = torch.tensor([0, 1, 2, 1, 1, 5])
    decision = decide(SCORES, count=2, groups=groups)
    assert decision.dropped == (0, 2)
    assert decision.spared == (1, 3, 4)
    assert "3 rows were kept in spite of their score: copies do not fit" in decision.lines()


def test_copies_count_against_the_limit_of_their_class():
    classes, groups = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0, 1, 2, 1, 4, 5])
    decision = decide(SCORES, count=3, classes=classes, groups=groups, keep_share=0.5)
    # Each class may lose one of its three rows; rows 1 and 3 are copies, both of class 1.
    assert decision.dropped == (2, 4)
    assert decision.spared == (0, 1, 3, 5)
    assert {decision.reasons[row] for row in decision.spared} == {"class limit"}


def test_ranks_and_the_description_of_rows():
    decision = decide(SCORES, count=2, classes=torch.zeros(6, dtype=torch.int64))
    assert decision.ranks.tolist() == [5, 1, 3, 2, 4, 6]
    assert decision.describe(decision.dropped, ids=list("abcdef")) == [
        {"row": 1, "id": "b", "score": 5.0, "rank": 1, "class": 0, "reason": "score"},
        {"row": 3, "id": "d", "score": 4.0, "rank": 2, "class": 0, "reason": "score"},
    ]


def test_the_summary_is_readable():
    decision = decide(SCORES, count=4, classes=torch.tensor([0, 1, 1, 1, 1, 0]))
    assert decision.lines() == [
        "dropped 3 of 6 rows (50.0%), 3 kept",
        "cut at a score of 1",
        "3 rows were kept in spite of their score: class limit",
        "  class      rows   dropped   share",
        "      0         2         1   50.0%",
        "      1         4         2   50.0%",
    ]
    assert decision.to_json()["spared"] == {"class limit": 3}


def test_harm_is_minus_the_sum_over_queries():
    # Row 0 helps both queries, row 1 harms more than it helps, row 2 does neither.
    scores = torch.tensor([[2.0, 1.0, 0.0], [1.0, -3.0, 0.0]])
    assert harmful_scores(scores).tolist() == [-3, 2, 0]
    assert decide(harmful_scores(scores), count=2, floor=0).dropped == (1,)
    with pytest.raises(DataError, match=r"scores have shape \(3,\); give \[query, train\]"):
        harmful_scores(scores[0])


ROWS = [
    {"idx": 0, "text": "one", "label": 1},
    {"idx": 1, "text": "two", "label": 0},
    {"idx": 2, "text": "one", "label": 1},
    {"idx": 3, "text": "one", "label": 0},
    {"idx": 4, "label": 1, "text": "one"},
]


def test_rows_of_the_same_content_are_one_group_whatever_their_number():
    assert duplicate_groups(ROWS).tolist() == [0, 1, 0, 3, 0]
    assert duplicate_groups(ROWS, ignore=()).tolist() == [0, 1, 2, 3, 4]
    assert duplicate_groups(ROWS, ignore=("idx", "label")).tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(DataError, match=r"row 1 holds an object of type builtins\.object"):
        duplicate_groups([{"x": 1}, {"x": object()}])


def test_the_first_of_several_copies_can_be_kept():
    numbers = copy_numbers(duplicate_groups(ROWS))
    assert numbers.tolist() == [0, 0, 1, 0, 2]
    assert decide(numbers, threshold=1).kept == (0, 1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"exactly one of fraction, count and threshold; got none of them"),
        ({"fraction": 0.5, "count": 1}, r"got fraction=0\.5 and count=1"),
        ({"fraction": 5}, r"fraction=5 is no share"),
        ({"fraction": math.nan}, r"fraction=nan is no share"),
        ({"fraction": 0.05}, r"fraction=0\.05 of 6 rows is less than one row; give at least 0\.17"),
        ({"count": 6}, r"count=6 of 6 rows cannot be dropped; give a whole number from 1 to 5"),
        ({"count": 0}, r"count=0 of 6 rows"),
        ({"count": True}, r"count=True of 6 rows"),
        ({"threshold": math.inf}, r"threshold=inf is no score"),
        ({"threshold": -1.0}, r"all 6 rows score -1\.0 or more, so that none would be kept"),
        ({"count": 1, "floor": math.nan}, r"floor=nan is no score"),
        ({"count": 1, "keep_share": 1.5}, r"keep_share=1\.5 is no share of a class"),
    ],
)
def test_numbers_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        decide(SCORES, **options)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([1.0, math.nan, 2.0], {}, r"the score of row 1 is nan"),
        ([1.0, 2.0, -math.inf], {}, r"the score of row 2 is -inf"),
        ([[1.0, 2.0]], {}, r"scores have shape \(1, 2\); give one number per row"),
        ([1.0], {}, r"of two rows or more"),
        ([1.0, 2.0], {"classes": torch.tensor([1])}, r"classes are torch\.int64 of shape \(1,\), the scores are of 2 rows"),
        ([1.0, 2.0], {"groups": torch.tensor([1.0, 2.0])}, r"groups are torch\.float32 of shape \(2,\)"),
    ],
)
def test_scores_that_cannot_be(scores, options, message):
    with pytest.raises(DataError, match=message):
        decide(torch.tensor(scores), count=1, **options)
