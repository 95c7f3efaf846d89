"""Predictions beside loops over examples and options."""

from __future__ import annotations

import math

import pytest
import torch

from whence.errors import ConfigError, DataError
from whence.refit import predict as module
from whence.refit.linear import Linearised
from whence.refit.predict import OptionRows, Target, higher_is_better, predict


def drawn(examples: int, k: int = 4, seed: int = 0) -> Linearised:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (examples,), generator=generator)
    example = torch.arange(examples).repeat_interleave(lengths)
    return Linearised(
        outputs=torch.randn(len(example), generator=generator),
        gradients=torch.randn(len(example), k, generator=generator),
        example=example,
        weights=(1 / lengths.float())[example],
        examples=examples,
    )


def slow_loss(linear: Linearised, example: int, w: torch.Tensor) -> float:
    """Add up one example's token losses in Python."""
    total, count = 0.0, 0
    for row in range(linear.rows):
        if int(linear.example[row]) == example:
            output = float(linear.outputs[row]) + float(linear.gradients[row].double() @ w)
            total, count = total + math.log1p(math.exp(-output)), count + 1
    return total / count


def target() -> Target:
    gold = torch.zeros(12, dtype=torch.bool)
    gold[[0, 4, 8, 9]] = True
    options = OptionRows(linear=drawn(12, seed=1), query=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]), gold=gold)
    return Target(linear=drawn(6), options=options, groups=list("aabbbc"), query_groups=list("xxyy"), split="dev")


def test_losses_and_choices_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES", 30)  # two subsets at a time
    given, w = target(), torch.randn(5, 4, dtype=torch.float64)
    found = predict(given, w)
    assert given.linear is not None
    assert given.options is not None
    for subset, own in enumerate(w):
        losses = [slow_loss(given.linear, example, own) for example in range(6)]
        assert found.of("loss")[subset] == pytest.approx(sum(losses) / 6, rel=1e-6)
        assert found.of("loss/b")[subset] == pytest.approx(sum(losses[2:5]) / 3, rel=1e-6)
        option = [slow_loss(given.options.linear, number, own) for number in range(12)]
        right, chance = [], []
        for query in range(4):
            places = range(3 * query, 3 * query + 3)
            (gold,) = (place for place in places if given.options.gold[place])
            right.append(float(min(places, key=lambda place: option[place]) == gold))
            chance.append(math.exp(-option[gold]) / sum(math.exp(-option[place]) for place in places))
        assert found.of("accuracy")[subset] == pytest.approx(sum(right) / 4)
        assert found.of("accuracy/x")[subset] == pytest.approx(sum(right[:2]) / 2)
        assert found.of("probability")[subset] == pytest.approx(sum(chance) / 4, rel=1e-6)
    assert found.split == "dev"
    table = found.table()
    assert len(table) == 5 * len(found.metrics) == 5 * 10
    assert table[0] == {"subset": 0, "metric": "loss", "value": pytest.approx(float(found.values[0, 0]))}
    assert found.to_json()["metrics"][0] == "loss"


def test_options_that_tie_share_the_query() -> None:
    linear = Linearised(
        outputs=torch.tensor([1.0, 1.0, 0.0]),
        gradients=torch.zeros(3, 2),
        example=torch.arange(3),
        weights=torch.ones(3),
        examples=3,
    )
    options = OptionRows(linear=linear, query=torch.zeros(3, dtype=torch.int64), gold=torch.tensor([True, False, False]))
    assert float(options.units(torch.zeros(2, dtype=torch.float64), "accuracy")) == 0.5


def test_units_can_be_differentiated() -> None:
    given = target()
    for metric in ("loss", "probability"):
        w = torch.randn(4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda at, metric=metric: given.units(at, metric).mean(), w)


def test_which_way_is_better() -> None:
    assert not higher_is_better("loss/task")
    assert higher_is_better("accuracy")


def test_what_cannot_be_predicted() -> None:
    only_loss = Target(linear=drawn(6))
    with pytest.raises(ConfigError, match="needs options"):
        predict(only_loss, torch.zeros(1, 4, dtype=torch.float64), ["accuracy"])
    with pytest.raises(ConfigError, match="metric='f1'"):
        only_loss.check("f1")
    with pytest.raises(ConfigError, match="there are loss"):
        predict(only_loss, torch.zeros(1, 4, dtype=torch.float64)).of("loss/q")
    with pytest.raises(ConfigError, match="nothing to predict"):
        Target()
    with pytest.raises(DataError, match="groups has 1 entries for 6"):
        Target(linear=drawn(6), groups=["a"])
    with pytest.raises(DataError, match="with k=4"):
        predict(only_loss, torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(DataError, match="query 1 has 3 options, 0 of them gold"):
        OptionRows(linear=drawn(6), query=torch.tensor([0, 0, 0, 1, 1, 1]), gold=torch.tensor([True, False, False, False, False, False]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"outputs": torch.zeros(3)}, r"give \[row\] and \[row, k\]"),
        ({"outputs": torch.tensor([0.0, float("nan")])}, "outputs must be finite"),
        ({"example": torch.tensor([1, 0])}, "rising"),
        ({"example": torch.tensor([0, 0])}, "rows are of 1 examples"),
        ({"example": torch.tensor([0, 2]), "examples": 3}, "rows are of 2 examples, the last in place 2"),
        ({"weights": torch.tensor([1.0, 0.5])}, r"example 1 are negative or sum to 0\.5"),
        ({"weights": torch.tensor([1.0])}, "weights has shape"),
    ],
)
def test_rows_are_checked(change: dict[str, object], told: str) -> None:
    sound: dict[str, object] = {
        "outputs": torch.zeros(2),
        "gradients": torch.zeros(2, 3),
        "example": torch.tensor([0, 1]),
        "weights": torch.ones(2),
        "examples": 2,
    }
    Linearised(**sound)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=told):
        Linearised(**sound | change)  # type: ignore[arg-type]


def test_group_sums_are_weighted() -> None:
    linear, values = drawn(6), torch.randn(2, drawn(6).rows)
    groups = torch.tensor([1, 0, 1, 2, 2, 0])
    found = linear.group_sums(values, groups, 4)
    for group in range(4):
        inside = groups[linear.example] == group
        assert torch.allclose(found[:, group], (values * linear.weights)[:, inside].sum(1))
