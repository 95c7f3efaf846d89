"""Counterfactuals: which rows are removed, with which seeds, and how often anything is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from procedures import TRAIN, Additive, additive, printed
from whence.errors import ConfigError, DataError
from whence.evaluate.counterfactual import RANDOM, counterfactual
from whence.evaluate.retrain import repeat_seed


def top_sum(values: Tensor, count: int) -> Tensor:
    """The sum of each row's `count` largest values, positive ones only."""
    return values.clamp(min=0).sort(1, descending=True).values[:, :count].sum(1)


def test_each_query_rises_by_what_its_own_rows_were_worth():
    procedure = additive(noise=0.1)
    result = counterfactual({"exact": procedure.values}, procedure, remove=[3, 1], mode="each", repeats=2)
    assert result.methods == ("exact", RANDOM)
    assert result.removed == (1, 3)
    assert result.queries == (0, 1, 2, 3)
    assert result.base.shape == (2, 4)
    assert result.after.shape == (2, 2, 2, 4)
    for number, count in enumerate((1, 3)):
        wanted = top_sum(procedure.values, count)
        # The noise has the same seed with and without the rows: it drops out.
        torch.testing.assert_close(result.after[0, number] - result.base, wanted.expand(2, 4))
        effect = result.effect("exact", count)
        assert effect.rise.value == pytest.approx(float(wanted.mean()))
        assert effect.rise.low < effect.rise.value < effect.rise.high
        assert effect.mean_removed == count
        assert effect.short == 0


def test_only_helpful_rows_are_removed_and_the_shortage_is_told():
    values = torch.zeros(2, TRAIN).double()
    values[0, [2, 5]] = torch.tensor([1.0, 3.0]).double()
    values[1] = -1.0
    procedure = Additive(values, values.sum(1) - 1)
    result = counterfactual({"exact": values}, procedure, remove=[1, 2, 6], mode="each", repeats=1)
    ours = [gone for gone in procedure.removed() if set(gone) <= {2, 5}]
    assert sorted(set(ours)) == [(), (2, 5), (5,)], "past the last helpful row nothing more is removed"
    assert ours.count((2, 5)) == 1, "and nothing is trained for it again"
    effects = [result.effect("exact", count) for count in (1, 2, 6)]
    assert [effect.short for effect in effects] == [1, 1, 2]
    assert [effect.mean_removed for effect in effects] == [0.5, 1.0, 1.0]
    assert effects[1].rise == effects[2].rise
    assert result.after[0, :, 0, 1].tolist() == [-1.0] * 3, "a query without helpful rows keeps its model"
    assert result.effect(RANDOM, 6).short == 0


def test_queries_that_a_base_model_misclassifies_are_left_out_and_counted():
    procedure = additive(queries=6, noise=1.0)
    seeds = [repeat_seed(7, 0, repeat) for repeat in range(5)]
    everything = list(range(TRAIN))
    right = torch.stack([procedure(everything, seed) < 0 for seed in seeds])
    some = right.all(0)
    assert 0 < some.sum() < right[:2].all(0).sum(), "the case must tell five base models from two"
    options = {"remove": [2], "mode": "each", "repeats": 2, "base_repeats": 5, "seed": 7}
    result = counterfactual({"exact": procedure.values}, procedure, **options)
    assert result.queries == tuple(some.nonzero().flatten().tolist())
    assert result.left_out == tuple((~some).nonzero().flatten().tolist())
    assert result.base.shape == (5, len(result.queries))
    assert f"{len(result.left_out)} left out" in printed(result)
    asked = [*result.left_out, result.queries[0]]
    part = counterfactual({"exact": procedure.values}, procedure, queries=asked, **options)
    assert (part.queries, part.left_out) == (result.queries[:1], result.left_out)
    with pytest.raises(DataError, match=r"none of 1 queries is classified right by all of 5 models .* measures 'margin'"):
        counterfactual({"exact": procedure.values}, procedure, queries=result.left_out[:1], **options)


def test_all_orders_and_removals_share_the_seeds_of_their_repeats():
    procedure = additive(rows=1000)
    orders = {"exact": procedure.values, "opposite": -procedure.values}
    counterfactual(orders, procedure, remove=[1, 2], mode="each", repeats=2, base_repeats=3, seed=5)
    seeds = [repeat_seed(5, 0, repeat) for repeat in range(3)]
    everything = tuple(range(1000))
    assert [seed for rows, seed in procedure.calls if rows == everything] == seeds
    assert {seed for rows, seed in procedure.calls if rows != everything} == set(seeds[:2])
    assert len(procedure.calls) == 3 + 3 * 2 * 2 * 4
    for query in range(4):
        best = int(procedure.values[query].argmax())
        with_best_removed = [seed for rows, seed in procedure.calls if set(everything) - set(rows) == {best}]
        assert set(with_best_removed) >= set(seeds[:2])


def test_the_random_order_draws_from_all_rows_anew_for_every_query_and_repeat():
    queries, rows, counts, repeats = 5, 60, (4, 8), 3
    values = -torch.ones(queries, rows).double()  # no helpful row: every removal is a random one
    procedure = Additive(values, values.sum(1) - 1)
    options = {"remove": counts, "mode": "each", "repeats": repeats}
    result = counterfactual({"none": values}, procedure, **options)
    drawn = [set(gone) for gone in procedure.removed() if gone]
    assert len(drawn) == queries * len(counts) * repeats
    small, large = ([gone for gone in drawn if len(gone) == count] for count in counts)
    assert len({tuple(sorted(gone)) for gone in small}) == queries * repeats, "every draw is another one"
    assert all(sum(few < many for few in small) == 1 for many in large), "more rows are the same and others"
    # 15 draws of 8: a row is missed by all of them with probability (52 / 60) ** 15 = 0.12.
    assert len(set().union(*large)) > 40
    assert max(set().union(*large)) >= 50
    more = Additive(procedure.values, procedure.start)
    counterfactual({"none": values}, more, **(options | {"repeats": 4}))
    few = Additive(procedure.values, procedure.start)
    counterfactual({"none": values}, few, queries=[4, 2], **options)
    assert set(few.calls) < set(procedure.calls) < set(more.calls), "more queries and repeats only add to what there is"
    # Removing rows of value -1 lowers the measurement by one each.
    assert result.effect(RANDOM, 8).rise.value == pytest.approx(-8)


def test_rows_of_equal_score_come_in_a_random_order():
    procedure = additive()
    same = torch.ones_like(procedure.values)
    counterfactual({"same": same}, procedure, remove=[3], mode="each", repeats=1)
    first = (0, 1, 2)
    assert first not in procedure.removed()


def test_the_sum_removes_the_same_rows_for_all_queries():
    procedure = additive(queries=5)
    orders = {"exact": procedure.values}
    result = counterfactual(orders, procedure, remove=[0, 2, 4], mode="sum", queries=[0, 2, 3], repeats=2)
    summed = procedure.values[[0, 2, 3]].sum(0)
    for number, count in enumerate((2, 4)):
        rows = summed.topk(count).indices
        assert (summed[rows] > 0).all()
        assert tuple(sorted(rows.tolist())) in procedure.removed()
        wanted = procedure.values[[0, 2, 3]][:, rows].sum(1)
        torch.testing.assert_close(result.after[0, number] - result.base, wanted.expand(2, 3))
    assert result.queries == (0, 2, 3)
    assert result.left_out == ()
    assert len(procedure.calls) == 2 + 2 * 2 * 2
    effect = result.effect("exact", 4)
    assert effect.flipped is None
    assert effect.perplexity is None
    assert effect.mean_removed == 4
    assert "Flipped" not in printed(result)


def test_the_sum_stops_at_the_last_helpful_row_too():
    values = torch.full((2, TRAIN), -1.0).double()
    values[0, 3], values[1, 4] = 5.0, 0.5
    procedure = Additive(values, values.sum(1))
    result = counterfactual({"exact": values}, procedure, remove=[2], mode="sum", repeats=1)
    assert (3,) in procedure.removed()
    assert (result.effect("exact", 2).short, result.effect("exact", 2).mean_removed) == (1, 1.0)


def test_nothing_is_trained_twice_and_what_was_interrupted_goes_on(tmp_path):
    options = {"remove": [1, 3], "mode": "each", "repeats": 2, "folder": tmp_path}
    first = additive(rows=1000, stop_at=10)
    orders = {"exact": first.values}
    with pytest.raises(KeyboardInterrupt):
        counterfactual(orders, first, **options)
    second = additive(rows=1000)
    result = counterfactual(orders, second, **options)
    assert not set(first.calls) & set(second.calls)
    assert len(first.calls) + len(second.calls) == 2 + 2 * 2 * 2 * 4
    third = additive(rows=1000)
    again = counterfactual(orders, third, **options)
    assert third.calls == []
    assert torch.equal(again.after, result.after)
    assert again.to_json() == result.to_json()
    counterfactual({"exact": third.values, "half": third.values / 2}, third, **options)
    assert third.calls == [], "the same rows by another name are the same trainings"
    counterfactual(orders, third, **(options | {"remove": [1, 2, 3]}))
    assert len(third.calls) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"orders": {}}, ConfigError, r"give one or more, none of them 'random'"),
        ({"orders": {"random": torch.zeros(4, TRAIN)}}, ConfigError, "the random order is drawn here"),
        ({"orders": {"a": torch.zeros(4, TRAIN), "b": torch.zeros(4, 3)}}, DataError, "of the same queries and rows"),
        ({"orders": {"a": torch.zeros(TRAIN)}}, DataError, r"give scores \[query, train\]"),
        ({"orders": {"a": torch.full((4, TRAIN), math.nan)}}, DataError, "order 'a': the score of query 0 and row 0 is nan"),
        ({"orders": {"a": torch.zeros(3, TRAIN)}}, DataError, "the orders are of 3 queries, the procedure measures 4"),
        ({"remove": []}, ConfigError, "whole numbers of rows from 1 to 11"),
        ({"remove": [0]}, ConfigError, "whole numbers of rows from 1 to 11"),
        ({"remove": [12]}, ConfigError, r"remove=\[12\] of 12 training rows"),
        ({"remove": [-1]}, ConfigError, "whole numbers of rows"),
        ({"remove": [2.5]}, ConfigError, "whole numbers of rows"),
        ({"mode": "all"}, ConfigError, "mode='all' is not known; choose 'each' or 'sum'"),
        ({"repeats": 0}, ConfigError, "repeats=0, base_repeats=0; give 1 or more"),
        ({"base_repeats": 1}, ConfigError, "no fewer on all rows than on some"),
        ({"resamples": 1}, ConfigError, "resamples=1 gives no interval"),
        ({"tokens": torch.ones(4)}, ConfigError, "perplexities, which are of mode='sum'"),
        ({"tokens": torch.ones(3), "mode": "sum"}, DataError, "for each of 4 queries"),
        ({"tokens": torch.zeros(4), "mode": "sum"}, DataError, "give one number, 1 or more"),
        ({"queries": [4]}, ConfigError, "queries: 4 is no row of a data set of 4 rows"),
    ],
)
def test_what_cannot_be_is_refused(changed, error, text):
    procedure = additive()
    given = {"orders": {"exact": procedure.values}, "remove": [1], "mode": "each", "repeats": 2, **changed}
    orders = given.pop("orders")
    with pytest.raises(error, match=text):
        counterfactual(orders, procedure, **given)
    late = "the procedure measures" in text  # which only a training can tell
    assert len(procedure.calls) == (2 if late else 0), "before long work starts"
