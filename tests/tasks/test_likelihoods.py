"""Likelihoods: samples have the model's distribution, columns give the exact Fisher matrix, log-odds are stable."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compare import assert_close
from whence.errors import ConfigError
from whence.runtime.noise import KeyedNoise
from whence.tasks import Classification, Regression, Task, likelihoods
from whence.tasks.likelihoods import IGNORE, Bernoulli, Categorical, Gaussian

DRAWS = 20_000


def noise(ids: list[int]) -> KeyedNoise:
    return KeyedNoise(seed=5, stream=0, ids=ids, device="cpu")


def per_example_gradients(model: nn.Module, values: Tensor) -> Tensor:
    """Gradients of each number, `[number, parameter]`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def fisher_of_columns(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Sum of outer products of the columns' gradients, for a batch of one."""
    J = per_example_gradients(model, task.columns(model, batch))
    return J.T @ J


class Places(nn.Module):
    """Logits `[batch, position, class]` from `[batch, position, feature]`, positions mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        return self.head(h + h.mean(1, keepdim=True))


def test_columns_of_labels_per_position_sum_to_the_fisher_matrix() -> None:
    """By enumeration of all labels; the middle position is ignored."""
    model, task = Places().double(), Classification()
    x = torch.randn(1, 3, 3, dtype=torch.float64)
    p = model(x).softmax(-1)[0].detach()
    wanted = torch.zeros(())
    for first, last in product(range(3), repeat=2):
        labels = torch.tensor([[first, IGNORE, last]])
        g = per_example_gradients(model, task.loss(model, (x, labels)))[0]
        wanted = wanted + p[0, first] * p[2, last] * torch.outer(g, g)
    assert task.columns(model, (x, torch.tensor([[0, IGNORE, 1]]))).shape == (9, 1)
    assert_close(fisher_of_columns(task, model, (x, torch.tensor([[0, IGNORE, 1]]))), wanted, "positions", rtol=1e-10)


def test_columns_belong_to_their_example() -> None:
    model, task = nn.Linear(3, 4).double(), Classification()
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 4
    together = task.columns(model, (x, labels))
    assert together.shape == (4, 5)
    alone = torch.cat([task.columns(model, (x[i : i + 1], labels[i : i + 1])) for i in range(5)], dim=1)
    assert_close(together, alone, "columns", rtol=1e-13)


@pytest.mark.parametrize("outputs", [None, 2])
def test_columns_of_a_regression_are_its_outputs(outputs: int | None) -> None:
    model = nn.Linear(3, outputs or 1).double()
    net = nn.Sequential(model, nn.Flatten(0)) if outputs is None else model
    x = torch.randn(4, 3, dtype=torch.float64)
    output = net(x)
    columns = Regression().columns(net, (x, torch.zeros_like(output)))
    assert torch.equal(columns, output.unsqueeze(0) if outputs is None else output.T)


def test_columns_of_yes_or_no_labels_sum_to_the_fisher_matrix() -> None:
    model, likelihood = nn.Linear(3, 2).double(), Bernoulli()
    x = torch.randn(1, 3, dtype=torch.float64)
    p, wanted = model(x).sigmoid()[0].detach(), torch.zeros(())
    for labels in product((0.0, 1.0), repeat=2):
        y = torch.tensor([labels])
        g = per_example_gradients(model, likelihood.loss(model(x), y))[0]
        wanted = wanted + (y[0] * p + (1 - y[0]) * (1 - p)).prod() * torch.outer(g, g)
    J = per_example_gradients(model, likelihood.columns(model(x), torch.zeros(1, 2)))
    assert_close(J.T @ J, wanted, "two labels", rtol=1e-10)


def test_a_task_without_columns_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Task does not define columns.*Define columns\(model, batch\).*solver='direct'"):
        Task().columns(nn.Linear(1, 1), None)


@pytest.mark.parametrize("slice_of", [3000, 2**24])
def test_classes_are_drawn_with_their_probabilities(monkeypatch: pytest.MonkeyPatch, slice_of: int) -> None:
    """20,000 draws: each frequency within 4 standard errors (at most 0.014); small slices change no draw."""
    monkeypatch.setattr(likelihoods, "_SLICE", slice_of)
    p = torch.tensor([[0.05, 0.6, 0.35], [0.3, 0.3, 0.4]], dtype=torch.float64)
    output, labels = p.log().expand(DRAWS, 2, 3), torch.zeros(DRAWS, 2, dtype=torch.long)
    drawn = Categorical().sample(output, labels, noise(list(range(DRAWS))))
    seen = torch.stack([(drawn == c).double().mean(0) for c in range(3)], -1)
    assert ((seen - p).abs() < 4 * (p * (1 - p) / DRAWS).sqrt()).all()
    uniform = noise(list(range(DRAWS))).uniform(2)
    assert torch.equal(drawn, (p.cumsum(-1)[None] < uniform.unsqueeze(-1)).sum(-1).clamp(max=2))


def test_yes_or_no_labels_and_numbers_are_drawn_with_their_distribution() -> None:
    """20,000 draws, 4 standard errors."""
    p = torch.tensor([0.1, 0.7], dtype=torch.float64)
    drawn = Bernoulli().sample(p.logit().expand(DRAWS, 2), torch.zeros(DRAWS, 2), noise(list(range(DRAWS))))
    assert ((drawn.mean(0) - p).abs() < 4 * (p * (1 - p) / DRAWS).sqrt()).all()
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 4 / DRAWS**0.5
    mean = torch.tensor([2.0], dtype=torch.float64)
    numbers = Gaussian().sample(mean.expand(DRAWS, 1), torch.zeros(DRAWS), noise(list(range(DRAWS))))
    assert abs(numbers.mean() - 2.0) < 4 / DRAWS**0.5
    assert abs(numbers.var() - 1.0) < 4 * (2 / DRAWS) ** 0.5


def test_draws_do_not_depend_on_the_batch_and_ignored_places_stay_ignored() -> None:
    output, labels = torch.randn(4, 5, 3), torch.zeros(4, 5, dtype=torch.long)
    labels[:, 3:] = IGNORE
    together = Categorical().sample(output, labels, noise([7, 8, 9, 10]))
    alone = Categorical().sample(output[2:3, :4], labels[2:3, :4], noise([9]))
    assert torch.equal(together[2:3, :4], alone)
    assert (together[:, 3:] == IGNORE).all()


def test_log_odds_are_stable_in_single_precision() -> None:
    """At odds of e^30 to 1 the probability rounds to 1, and a difference of logarithms would be infinite."""
    logits = torch.tensor([[30.0, 0.0, -1.0]])
    wanted = -(30.0 - torch.tensor([0.0, -1.0]).logsumexp(0))
    assert_close(Categorical().margin(logits, torch.tensor([0])), wanted[None], "odds", rtol=1e-6)
    assert_close(Bernoulli().margin(torch.tensor([[2.0, -3.0]]), torch.tensor([[1.0, 1.0]])), torch.tensor([1.0]), "odds", rtol=1e-6)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_half_precision_is_widened(likelihood: Any) -> None:
    output = torch.randn(2, 3).bfloat16()
    labels = torch.tensor([0, 2]) if isinstance(likelihood, Categorical) else torch.tensor([[0.0, 1.0, 0.0]] * 2)
    assert likelihood.loss(output, labels).dtype == torch.float32
    assert torch.equal(likelihood.loss(output, labels), likelihood.loss(output.float(), labels))
    assert likelihood.columns(output, labels).dtype == torch.float32
