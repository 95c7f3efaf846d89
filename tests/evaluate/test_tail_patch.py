"""Tail-patch: the step against one taken by hand, and the model as it was found."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import cases
from whence import second_moments
from whence.errors import ConfigError, DataError, NumericalError
from whence.evaluate.tail_patch import tail_patch
from whence.tasks import Classification, Regression

RATE = 0.05


def rows(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator).double()
    return [(row, row[:1] - row[1:2]) for row in x]


def network() -> nn.Module:
    return cases.build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))


def by_hand(model, train, query, chosen, *, rate=RATE, steps=1, moments=None) -> float:
    """The fall of a query after gradient steps on a copy of the model."""
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}

    def loss(row):
        return 0.5 * (torch.func.functional_call(model, weights, (row[0],)) - row[1]).square().sum()

    before = loss(query).item()
    for _ in range(steps):
        mean = sum(loss(train[row]) for row in chosen) / len(chosen)
        gradients = torch.autograd.grad(mean, list(weights.values()))
        for (name, weight), gradient in zip(list(weights.items()), gradients, strict=True):
            scale = 1.0 if moments is None else 1 / (moments[name].sqrt() + 1e-8)
            weights[name] = (weight - rate * scale * gradient).detach().requires_grad_()
    return before - loss(query).item()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("adam", [False, True])
def test_falls_are_those_of_steps_taken_by_hand(steps, adam):
    model, train, queries = network(), rows(9, 1), rows(4, 2)
    scores = {"some": torch.randn(4, 9), "others": torch.randn(4, 9)}
    moments = {name: torch.rand(p.shape).double() + 0.1 for name, p in model.named_parameters()} if adam else None
    found = tail_patch(
        model, Regression(), queries, train, scores, k=3, steps=steps, learning_rate=RATE, batch_size=2, second_moments=moments
    )
    for name, values in scores.items():
        wanted = [
            by_hand(model, train, query, values[number].topk(3).indices.tolist(), steps=steps, moments=moments)
            for number, query in enumerate(queries)
        ]
        assert found.falls[name].tolist() == pytest.approx(wanted, rel=1e-10)
        assert found.fall(name).value == pytest.approx(sum(wanted) / 4)
        assert found.fall(name).low <= found.fall(name).value <= found.fall(name).high
    gain = found.difference("some", "others")
    assert gain.value == pytest.approx(found.fall("some").value - found.fall("others").value)


def test_the_first_rows_are_taken_whatever_their_sign_and_the_size_of_batches_plays_no_part():
    model, train, queries = network(), rows(9, 1), rows(4, 2)
    scores = torch.rand(4, 9)
    results = [
        tail_patch(model, Regression(), queries, train, {"all": values}, k=4, learning_rate=RATE, batch_size=size).falls["all"]
        for values in (scores, scores - 5)
        for size in (1, 3, 32)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=0)


def test_rows_of_equal_score_come_in_a_random_order():
    model, train, queries = network(), rows(9, 1), rows(2, 2)
    found = tail_patch(model, Regression(), queries, train, {"same": torch.zeros(2, 9)}, k=2, learning_rate=RATE)
    assert found.falls["same"][0].item() != pytest.approx(by_hand(model, train, queries[0], [0, 1]))


def test_gradient_products_beat_chance_and_their_opposite_does_harm():
    model, train, queries = network(), rows(30, 1), rows(10, 2)
    task = Regression()

    def gradients(data):
        found = []
        for x, y in data:
            loss = task.loss(model, (x.unsqueeze(0), y.unsqueeze(0))).sum()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        return torch.stack(found)

    products = gradients(queries) @ gradients(train).T
    orders = {"products": products, "chance": torch.rand(10, 30), "opposite": -products}
    found = tail_patch(model, task, queries, train, orders, k=5, learning_rate=0.01)
    assert found.difference("products", "chance").low > 0
    assert found.fall("products").low > 0
    assert found.fall("opposite").high < 0
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["queries"] == 10
    assert plain["falls"]["products"]["value"] == found.fall("products").value


def test_the_model_is_left_as_it_was_found_also_after_an_error():
    """Compared bit for bit by the fixture of conftest.py, which knows the model that `cases.build` made."""
    model = cases.build(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)))
    for number, module in enumerate(model):
        module.train(number != 3)
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    cases.watch(model)
    train = [(torch.randn(3).double(), number % 2) for number in range(6)]
    orders = {"some": torch.randn(2, 6)}
    first, second = (tail_patch(model, Classification(), train[:2], train, orders, k=6, learning_rate=0.1) for _ in range(2))
    assert torch.equal(first.falls["some"], second.falls["some"]), "dropout would make them differ"
    assert (first.falls["some"] != 0).all()
    with pytest.raises(NumericalError, match=r"the measurement of query 0 is nan. If a step made it so, give a lower learning_rate"):
        tail_patch(model, Classification(), train[:2], train, orders, k=6, steps=3, learning_rate=1e300)


def test_parameters_that_are_not_trained_are_not_stepped():
    model, train, queries = network(), rows(6, 1), rows(2, 2)
    orders = {"some": torch.randn(2, 6)}
    whole = tail_patch(model, Regression(), queries, train, orders, k=2, learning_rate=RATE)
    model[0].requires_grad_(False)
    cases.watch(model)
    head = tail_patch(model, Regression(), queries, train, orders, k=2, learning_rate=RATE)
    assert not torch.allclose(whole.falls["some"], head.falls["some"])
    model.requires_grad_(False)
    cases.watch(model)
    with pytest.raises(ConfigError, match="no parameter of the model requires a gradient"):
        tail_patch(model, Regression(), queries, train, orders, k=2, learning_rate=RATE)


def test_second_moments_of_an_optimizer_fit():
    model, train, queries = nn.Linear(3, 1).double(), rows(6, 1), rows(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = (torch.stack(side) for side in zip(*train, strict=True))
    (model(x) - y).square().sum().backward()
    optimizer.step()
    moments = second_moments(model, optimizer)
    orders = {"some": torch.randn(2, 6)}
    found = tail_patch(model, Regression(), queries, train, orders, k=2, learning_rate=0.01, second_moments=moments)
    wanted = by_hand(model, train, queries[0], orders["some"][0].topk(2).indices.tolist(), rate=0.01, moments=moments)
    assert found.falls["some"][0].item() == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(ConfigError, match=r"second_moments of 'bias': found none, expected \(1,\)"):
        tail_patch(model, Regression(), queries, train, orders, k=2, learning_rate=0.01, second_moments={"weight": moments["weight"]})


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"k": 0}, ConfigError, "give 1 to 6 rows, 1 step or more, and a rate above 0"),
        ({"k": 7}, ConfigError, "give 1 to 6 rows"),
        ({"steps": 0}, ConfigError, "1 step or more"),
        ({"learning_rate": 0.0}, ConfigError, "a rate above 0"),
        ({"learning_rate": float("nan")}, ConfigError, "a rate above 0"),
        ({"orders": {}}, ConfigError, "no order to test"),
        ({"orders": {"a": torch.zeros(2, 5)}}, DataError, r"order 'a' has shape \(2, 5\); .* 2 queries and 6 rows"),
        ({"orders": {"a": torch.full((2, 6), float("inf"))}}, DataError, "give finite scores"),
        ({"queries": []}, DataError, "the query data set is empty"),
        ({"resamples": 1}, ConfigError, "resamples=1 gives no interval"),
    ],
)
def test_what_cannot_be_is_refused(changed, error, text):
    given = {"queries": rows(2, 2), "orders": {"a": torch.zeros(2, 6)}, "k": 2, "learning_rate": RATE, **changed}
    queries, orders = given.pop("queries"), given.pop("orders")
    with pytest.raises(error, match=text):
        tail_patch(network(), Regression(), queries, rows(6, 1), orders, **given)


def test_an_order_that_is_not_there():
    found = tail_patch(network(), Regression(), rows(2, 2), rows(6, 1), {"a": torch.zeros(2, 6)}, k=2, learning_rate=RATE)
    with pytest.raises(ConfigError, match="there is no order 'b'; there are 'a'"):
        found.fall("b")
