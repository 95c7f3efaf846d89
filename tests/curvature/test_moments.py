"""Adam's second moments: what an optimizer gives, and scores with them against gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whence
from cases import build
from compare import assert_close
from whence.errors import ConfigError, MismatchError
from whence.tasks import Classification

EPS = 1e-8


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Text(nn.Module):
    """An embedding, a parameter without a layer, attention, a norm, and layers on its output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Parameter(torch.zeros(5, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) + self.places
        mixed, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        return self.head(self.norm(hidden + mixed).mean(1))


class Tied(nn.Module):
    """A head that is the embedding itself, with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.words(ids)))).mean(1)


class Other(nn.Module):
    """Key and value features of their own, so that attention has three weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attention(x[..., :4], x[..., 4:7], x[..., 7:], need_weights=False)
        return self.head(found.mean(1))


def pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, bias=False),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def ids(seed: int, count: int) -> Tensor:
    return torch.randint(9, (count, 5), generator=torch.Generator().manual_seed(seed))


SITUATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), lambda seed, n: some(seed, n, 4)),
    "pictures": (pictures, lambda seed, n: some(seed, n, 2, 4, 4)),
    "text": (Text, ids),
    "tied": (Tied, ids),
    "other": (Other, lambda seed, n: some(seed, n, 6, 12)),
}
TASK = Classification(measurement="margin")


@pytest.fixture(params=SITUATIONS)
def situation(request: pytest.FixtureRequest) -> tuple[nn.Module, list, list]:
    factory, inputs = SITUATIONS[request.param]
    model = build(factory)
    rows = [list(zip(inputs(seed, n), (torch.arange(n) * 2 + seed) % 3, strict=True)) for seed, n in ((1, 9), (2, 3))]
    return model, *rows


def drawn_moments(model: nn.Module) -> dict[str, Tensor]:
    """Moments over four orders of magnitude, different for every entry."""
    return {name: (2 * some(number, *p.shape)).exp() * 1e-3 for number, (name, p) in enumerate(model.named_parameters())}


def gradients(model: nn.Module, rows: list, objective: Any) -> dict[str, Tensor]:
    """Return every parameter's gradients, a row at a time."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in rows:
        value = objective(model, [x[None], y[None]]).sum()
        parts = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True, allow_unused=True)
        for (name, _), gradient in zip(model.named_parameters(), parts, strict=True):
            found[name].append(gradient.flatten())
    return {name: torch.stack(parts) for name, parts in found.items()}


def engine(model: nn.Module, moments: Any, **options: Any) -> whence.Attributor:
    settings = {"layers": "all", "fallback": True, "device": "cpu", "progress": False, **options}
    return whence.Attributor(model, TASK, second_moments=moments, **settings)


# ---------------------------------------------------------------------------------------------- what the optimizer gives


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_moments_of_a_run(kind: Any, steps: int) -> None:
    """`v = b v + (1 - b) g^2` from zero, divided by `1 - b^steps`; each group of parameters has its own b."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = kind(
        [{"params": model[0].parameters(), "betas": (0.9, 0.95)}, {"params": model[2].parameters()}], lr=0.05, weight_decay=0.01
    )
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    x, y = some(1, 8, 4), torch.arange(8) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            # Adam takes weight decay for a part of the gradient, AdamW does not.
            g = p.grad + 0.01 * p.detach() if kind is torch.optim.Adam else p.grad
            b = 0.95 if name.startswith("0") else 0.999
            wanted[name] = b * wanted[name] + (1 - b) * g.square()
        optimizer.step()
    found = whence.second_moments(model, optimizer)
    assert set(found) == set(wanted)
    for name, v in wanted.items():
        b = 0.95 if name.startswith("0") else 0.999
        assert_close(found[name], v / (1 - b**steps), name, rtol=1e-9)


def test_a_step_of_plain_descent_in_stretched_coordinates_is_adams(situation: tuple) -> None:
    """Without momentum Adam's step is `g / (sqrt(v) + eps)`: the product of that with a gradient is the identity's score."""
    model, train, queries = situation
    moved = [p.detach().clone() for p in model.parameters()]
    left, right = gradients(model, queries, TASK.measurement), gradients(model, train[:1], TASK.loss)
    copies = [nn.Parameter(p.clone()) for p in moved]
    optimizer = torch.optim.Adam(copies, lr=1e-3, betas=(0.0, 0.9), eps=EPS)
    for copy, gradient in zip(copies, right.values(), strict=True):
        copy.grad = gradient.view_as(copy).clone()
    optimizer.step()
    change = {name: (copy.detach() - before).flatten() / -1e-3 for name, copy, before in zip(right, copies, moved, strict=True)}
    expected = sum(left[name] @ change[name] for name in left)
    moments = {name: gradient.square().view_as(p) for (name, p), gradient in zip(model.named_parameters(), right.values(), strict=True)}
    found = engine(model, moments).scores(queries, train, strategy="identity", train_rows=[0]).values
    assert isinstance(expected, Tensor)
    assert_close(found[:, 0], expected, "one step", rtol=1e-6, atol_of_largest=1e-7)


def test_optimizers_without_moments() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"SGD holds no second moments \(exp_avg_sq\) of parameter 'weight'.*Adam or AdamW"):
        whence.second_moments(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"Adam holds no second moments.*after at least one step"):
        whence.second_moments(model, torch.optim.Adam(model.parameters()))
    partly = torch.optim.Adam([model.weight])
    model(torch.ones(1, 2)).sum().backward()
    partly.step()
    with pytest.raises(ConfigError, match=r"of parameter 'bias'"):
        whence.second_moments(model, partly)
    model.bias.requires_grad_(False)
    assert set(whence.second_moments(model, partly)) == {"weight"}


# ---------------------------------------------------------------------------------------------- scores


def test_identity_scores_are_products_under_adam(situation: tuple) -> None:
    model, train, queries = situation
    moments = drawn_moments(model)
    left, right = gradients(model, queries, TASK.measurement), gradients(model, train, TASK.loss)
    parts = {name: left[name] @ (right[name] / (moments[name].sqrt() + EPS).flatten()).T for name in left}
    attributor = engine(model, moments)
    found = attributor.scores(queries, train, strategy="identity", per_layer=True, batch_size=4, query_batch_size=2)
    assert attributor.coverage.share == 1.0
    assert_close(found.values, torch.stack(list(parts.values())).sum(0), "scores", rtol=1e-8)
    for layer, values in found.per_layer.items():
        own = [name for name in parts if name == layer or name.rpartition(".")[0] == layer]
        if own:
            assert_close(values, torch.stack([parts[name] for name in own]).sum(0), layer, rtol=1e-8)
    squares = torch.stack([(g.square() / (moments[name].sqrt() + EPS).flatten()).sum(1) for name, g in right.items()]).sum(0)
    assert_close(attributor.self_influence(train, strategy="identity"), squares, "self-influence", rtol=1e-8)


@pytest.mark.parametrize("empirical", [True])
def test_diagonal_scores_under_adam(situation: tuple, empirical: bool) -> None:
    """Curvature and gradients are both in stretched coordinates: `E[(D^-1/2 g)^2]`."""
    model, train, queries = situation
    moments = drawn_moments(model)
    scale = {name: (moments[name].sqrt() + EPS).rsqrt().flatten() for name in moments}
    left, right = gradients(model, queries, TASK.measurement), gradients(model, train, TASK.loss)
    expected = sum((left[n] * scale[n]) @ ((right[n] * scale[n]) / ((right[n] * scale[n]).square().mean(0) + 0.2)).T for n in left)
    found = engine(model, moments).fit(train, strategy="diagonal", empirical=empirical).scores(queries, train, damping=0.2).values
    assert isinstance(expected, Tensor)
    assert_close(found, expected, "diagonal", rtol=1e-8)


def test_equal_moments_change_the_unit_alone(situation: tuple) -> None:
    model, train, queries = situation
    moments = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    plain = engine(model, None).fit(train, strategy="ekfac", empirical=True)
    scaled = engine(model, moments).fit(train, strategy="ekfac", empirical=True)
    expected = plain.scores(queries, train, strategy="identity").values / (0.5 + EPS)
    assert_close(scaled.scores(queries, train, strategy="identity").values, expected, "identity", rtol=1e-9)
    # Gradients and relative damping scale alike.
    assert_close(scaled.scores(queries, train).values, plain.scores(queries, train).values, "ekfac", rtol=1e-7)


# ---------------------------------------------------------------------------------------------- errors


def test_moments_that_are_missing_or_of_another_shape() -> None:
    model = build(SITUATIONS["text"][0])
    moments = drawn_moments(model)
    for name in ("words.weight", "places", "attention.in_proj_weight", "norm.bias", "head.weight"):
        lacking = {key: value for key, value in moments.items() if key != name}
        with pytest.raises(ConfigError, match=rf"second_moments of '{name}': found none, expected \("):
            engine(model, lacking)
        wrong = {**moments, name: moments[name].flatten()[:-1]}
        with pytest.raises(ConfigError, match=rf"second_moments of '{name}': found shape \(\d+,\), expected"):
            engine(model, wrong)


def test_only_tracked_parameters_need_moments() -> None:
    factory, inputs = SITUATIONS["text"]
    model = build(factory)
    rows = list(zip(inputs(1, 6), torch.arange(6) % 3, strict=True))
    every = drawn_moments(model)
    own = {name: value for name, value in every.items() if name.startswith("head")}
    few = engine(model, own, layers=["head"], fallback=False).scores(rows, rows, strategy="identity").values
    many = engine(model, every, layers=["head"], fallback=False).scores(rows, rows, strategy="identity").values
    assert torch.equal(few, many)


def test_other_moments_are_another_result(tmp_path: Any) -> None:
    factory, inputs = SITUATIONS["linear"]
    model = build(factory)
    rows = list(zip(inputs(1, 6), torch.arange(6) % 3, strict=True))
    moments = drawn_moments(model)
    engine(model, moments, run_dir=tmp_path).fit(rows, strategy="kfac").scores(rows, rows)
    engine(model, {name: value.clone() for name, value in moments.items()}, run_dir=tmp_path).fit(rows, strategy="kfac")
    other = {name: 2 * value for name, value in moments.items()}
    for attributor in (engine(model, other, run_dir=tmp_path), engine(model, None, run_dir=tmp_path)):
        with pytest.raises(MismatchError, match="second moments"):
            attributor.fit(rows, strategy="kfac")
        with pytest.raises(MismatchError, match="second moments"):
            attributor.scores(rows, rows, strategy="kfac")
