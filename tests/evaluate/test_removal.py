"""What removals come to: flips, rises, perplexities and their intervals, with procedures whose answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from procedures import TRAIN, Additive, additive, printed
from whence.errors import ConfigError
from whence.evaluate.counterfactual import RANDOM, counterfactual
from whence.evaluate.removal import BASE, RemovalEffect
from whence.evaluate.retrain import repeat_seed


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
