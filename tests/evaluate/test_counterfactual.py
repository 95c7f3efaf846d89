"""Counterfactuals: procedures whose answer is known, what is removed, with which seeds, and how often anything is trained."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from rich.console import Console
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.counterfactual import RANDOM, counterfactual
from whence.evaluate.removal import BASE, RemovalEffect
from whence.evaluate.retrain import repeat_seed

TRAIN = 12


@dataclass
class Additive:
    """Every row takes its value off a query's measurement; the seed alone adds noise; remembers what it was asked."""

    values: Tensor
    start: Tensor
    noise: float = 0.0
    stop_at: int | None = None
    calls: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"additive {self.values.tolist()} {self.start.tolist()} {self.noise}"

    def __call__(self, rows, seed):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((tuple(rows), seed))
        noise = torch.randn(len(self.start), generator=torch.Generator().manual_seed(seed)).double()
        return self.start - self.values[:, list(rows)].sum(1) + self.noise * noise

    def removed(self) -> list[tuple[int, ...]]:
        """The rows that each training lacked."""
        return [tuple(sorted(set(range(self.values.shape[1])) - set(rows))) for rows, _ in self.calls]


def additive(queries: int = 4, rows: int = TRAIN, **options) -> Additive:
    values = torch.randn(queries, rows, generator=torch.Generator().manual_seed(3)).double()
    # Trained on all rows every query measures -1: right, by a little.
    return Additive(values, values.sum(1) - 1, **options)


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


def test_a_query_is_flipped_where_more_than_half_of_the_models_misclassify_it():
    # Without row 0 the measurements are 1, 0.5 and -0.5 plus what the seeds add.
    values = torch.zeros(3, TRAIN).double()
    values[:, 0] = torch.tensor([2.0, 1.5, 0.5])
    noise = {repeat_seed(0, 0, repeat): step for repeat, step in enumerate((-0.6, 0.0, -0.7, 0.4))}

    @dataclass
    class Stepped(Additive):
        def __call__(self, rows, seed):
            # The base stays right whatever the seed.
            return super().__call__(rows, seed) + (noise[seed] if 0 not in rows else 0.0)

    procedure = Stepped(values, values.sum(1) - 1)
    result = counterfactual({"exact": values}, procedure, remove=[1], mode="each", repeats=4)
    assert [(result.after[0, 0, :, query] > 0).sum().item() for query in range(3)] == [4, 2, 0]
    flipped = result.effect("exact", 1).flipped
    assert flipped is not None
    assert flipped.value == pytest.approx(1 / 3), "half of the models is not most of them"
    # Wilson's interval of 1 in 3.
    assert (flipped.low, flipped.high) == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert result.effect(BASE, 0).flipped.value == 0


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


def test_perplexity_is_of_all_tokens_together():
    values = torch.rand(4, TRAIN).double()
    tokens = torch.tensor([3, 5, 2, 10])
    procedure = Additive(values, values.sum(1) + 20, noise=0.5)
    options = {"remove": [3], "mode": "sum", "tokens": tokens}
    result = counterfactual({"exact": values}, procedure, **options)
    base, effect = result.effect(BASE, 0), result.effect("exact", 3)
    assert base.perplexity.value == pytest.approx(math.exp(float(result.base.mean(0).sum()) / 20))
    assert effect.perplexity.value == pytest.approx(math.exp(float(result.after[0, 0].mean(0).sum()) / 20))
    assert base.perplexity.low == base.perplexity.value == base.perplexity.high
    # The interval is that of the difference: it stays off the base, which the noise of the queries alone would not allow.
    assert base.perplexity.value < effect.perplexity.low < effect.perplexity.value < effect.perplexity.high
    some = counterfactual({"exact": values}, procedure, queries=[1, 3], **options)
    assert some.effect(BASE, 0).perplexity.value == pytest.approx(math.exp(float(some.base.mean(0).sum()) / 15))
    assert "Perplexity" in printed(result)


def test_intervals_cover_the_chance_of_training_too():
    """All queries of one model rise together by chance; more queries do not make that surer."""

    @dataclass
    class Shaky(Additive):
        def __call__(self, rows, seed):
            chance = torch.randn(1, generator=torch.Generator().manual_seed(seed + sum(rows))).double()
            return super().__call__(rows, seed) + chance

    values = torch.ones(50, TRAIN).double()
    result = counterfactual({"same": values}, Shaky(values, values.sum(1)), remove=[2], mode="sum", repeats=8)
    rise = result.effect("same", 2).rise
    assert rise.high - rise.low > 0.5
    one = counterfactual({"same": values}, Shaky(values, values.sum(1)), remove=[2], mode="sum", repeats=1)
    rise = one.effect("same", 2).rise
    assert rise.high - rise.low == pytest.approx(0), "one repeat says nothing of it"


def test_orders_are_compared_in_the_same_samples():
    procedure = additive(queries=30)
    worse = procedure.values + 2 * torch.randn(30, TRAIN)
    result = counterfactual({"exact": procedure.values, "worse": worse}, procedure, remove=[3], mode="each", repeats=1)
    gain = result.difference("exact", "worse", 3)
    rises = [result.effect(name, 3).rise for name in ("exact", "worse")]
    assert gain.value == pytest.approx(rises[0].value - rises[1].value)
    assert 0 < gain.low < gain.value < gain.high
    reverse = result.difference("worse", "exact", 3)
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx((-gain.value, -gain.high, -gain.low))
    same = result.difference("exact", "exact", 3)
    assert (same.low, same.value, same.high) == (0, 0, 0)
    over = [each for each in result.to_json()["differences"] if each["method"] == "exact"]
    assert over[0]["over"] == RANDOM
    assert over[0]["rise"]["value"] == pytest.approx(rises[0].value - result.effect(RANDOM, 3).rise.value)


@dataclass(frozen=True)
class Ridge:
    """Closed-form ridge regression on labels of -1 and 1; a query's measurement is minus its label times the prediction."""

    x: Tensor
    y: Tensor
    queries: Tensor
    labels: Tensor
    key: str = "ridge"

    def __call__(self, rows, seed):
        x, y = self.x[list(rows)], self.y[list(rows)]
        weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ y)
        return -self.labels * (self.queries @ weights)


def ridge(generator_seed: int = 0) -> Ridge:
    generator = torch.Generator().manual_seed(generator_seed)
    truth = torch.randn(5, generator=generator).double()
    x, queries = (torch.randn(count, 5, generator=generator).double() for count in (40, 15))
    return Ridge(x=x, y=torch.sign(x @ truth), queries=queries, labels=torch.sign(queries @ truth))


def test_rows_whose_removal_was_tried_one_by_one_hurt_more_than_random_ones():
    procedure = ridge()
    everything = list(range(40))
    alone = torch.stack([procedure([row for row in everything if row != gone], 0) for gone in everything], dim=1)
    exact = alone - procedure(everything, 0).unsqueeze(1)
    result = counterfactual({"removal": exact, "reversed": -exact}, procedure, remove=[1, 5, 10], mode="each", repeats=1)
    for query, measured in zip(result.queries, result.after[0, 0, 0], strict=True):
        assert measured == pytest.approx(float(alone[query].max())), "one row less is what the scores were made of"
    for count in (1, 5, 10):
        assert result.difference("removal", RANDOM, count).low > 0
        assert result.difference("reversed", RANDOM, count).high < 0
    flipped = [result.effect("removal", count).flipped.value for count in (1, 5, 10)]
    assert flipped == sorted(flipped)
    assert flipped[-1] > result.effect(RANDOM, 10).flipped.value


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


def test_the_result_as_json_and_as_a_table():
    procedure = additive()
    result = counterfactual({"exact": procedure.values}, procedure, remove=[1, 11], mode="each", repeats=1, seed=2)
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [(each["method"], each["removed"]) for each in plain["effects"]] == [
        (BASE, 0),
        ("exact", 1),
        ("exact", 11),
        (RANDOM, 1),
        (RANDOM, 11),
    ]
    assert plain["effects"][0]["rise"] == {"value": 0, "interval": [0, 0]}
    assert plain["settings"] == {"key": procedure.key, "seed": 2, "train": TRAIN}
    assert isinstance(result.effects[0], RemovalEffect)
    text = printed(result)
    assert "4 queries, repeats: 1" in text
    assert "11 (mean " in text
    single = counterfactual({"exact": procedure.values}, procedure, remove=[1], mode="each", queries=[0], repeats=1)
    assert single.to_json()["effects"][1]["rise"]["interval"] is None
    with pytest.raises(ConfigError, match=r"no removal of 5 rows by 'exact'; there are removals of 1, 11 rows by 'exact', 'random'"):
        result.effect("exact", 5)


def printed(result) -> str:
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(result.table())
    return capture.get()


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
