"""`compile=True` through the whole library: the same numbers as without, one compilation for all calls, the model as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from cases import build
from compare import assert_close
from whence.errors import ConfigError
from whence.tasks import Classification, SequenceClassification, Task

# Dynamo makes the objects that it warns of making.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BATCH = 4  # divides the rows: a batch of another size is another graph


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    assert shutil.which("g++"), "inductor needs a C++ compiler"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Reuse(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.enter(x))
        for _ in range(2):
            hidden = torch.relu(self.again(hidden)) + hidden
        return self.head(hidden)


class Encoder(nn.Module):
    """Attention and norms, with tokens of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.up, self.down, self.second = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = self.first(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return self.head(x.mean(1))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            vocab_size=24,
            max_position_embeddings=12,
            num_labels=3,
            pad_token_id=0,
        )
    )


def vectors(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(count, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3, strict=True))


def tokens(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return list(zip(torch.randint(11, (count, 7), generator=generator), torch.arange(count) % 3, strict=True))


def texts(seed: int, count: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 24, (count, 9), generator=generator)
    mask = (torch.arange(9) < 9 - (torch.arange(count) % 4)[:, None]).long()
    return [{"input_ids": i, "attention_mask": m, "labels": n % 3} for n, (i, m) in enumerate(zip(ids * mask, mask, strict=True))]


@dataclass(frozen=True)
class Situation:
    factory: Callable[[], nn.Module]
    rows: Callable[[int, int], list]
    task: Callable[[], Task] = lambda: Classification(measurement="margin")


SITUATIONS = {
    "reuse": Situation(Reuse, vectors),
    "encoder": Situation(Encoder, tokens),
    "bert": Situation(bert, texts, lambda: SequenceClassification(measurement="margin")),
}


def engine(situation: Situation, model: nn.Module, **options: Any) -> whence.Attributor:
    return whence.Attributor(model, situation.task(), device="cpu", progress=False, layers="all", **options)


def work(attributor: whence.Attributor, train: list, queries: list) -> dict[str, Tensor]:
    attributor.fit(train, strategy="ekfac", batch_size=BATCH)
    sizes: dict[str, Any] = {"batch_size": BATCH, "query_batch_size": BATCH}
    scores = attributor.scores(queries, train, per_layer=True, per_token=True, **sizes)
    assert scores.per_token is not None
    own = attributor.self_influence(train, batch_size=BATCH)
    return {"scores": scores.values, "tokens": scores.per_token, "self-influence": own, **scores.per_layer}


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_compiled_is_eager(name: str) -> None:
    situation = SITUATIONS[name]
    model, train, queries = build(situation.factory), situation.rows(1, 12), situation.rows(2, BATCH)
    eager = engine(situation, model)
    expected = work(eager, train, queries)
    compiled = engine(situation, model, compile=True)
    found = work(compiled, train, queries)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert_close(found[key], values, key, rtol=1e-9, atol_of_largest=1e-11)
    assert compiled.coverage.tracked == eager.coverage.tracked
    assert "_is_torch_compile" not in vars(model)
    assert "_compiled_call_impl" not in vars(model)


@pytest.mark.slow
def test_several_calls_compile_once() -> None:
    """Fit, scores, other scores and self-influence: what was compiled for the first call is used by all."""
    situation = SITUATIONS["reuse"]
    model, train, queries = build(situation.factory), vectors(1, 12), vectors(2, BATCH)
    attributor = engine(situation, model, compile=True)
    stats = torch._dynamo.utils.counters["stats"]
    attributor.fit(train, strategy="ekfac", batch_size=BATCH)
    after_fit = stats["unique_graphs"]
    assert after_fit > 0
    sizes: dict[str, Any] = {"batch_size": BATCH, "query_batch_size": BATCH}
    for number, strategy in enumerate(("ekfac", "identity")):
        attributor.scores(queries, train, strategy=strategy, name=f"own-{number}", **sizes)  # type: ignore[arg-type]
    attributor.self_influence(train, batch_size=BATCH)
    attributor.fit(train, strategy="kfac", batch_size=BATCH)
    assert stats["unique_graphs"] == after_fit
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_solvers_sums_and_moments() -> None:
    situation = SITUATIONS["reuse"]
    model, train, queries = build(situation.factory), vectors(1, 12), vectors(2, BATCH)
    moments = {name: torch.rand_like(p) + 0.1 for name, p in model.named_parameters()}
    sizes: dict[str, Any] = {"batch_size": BATCH, "query_batch_size": BATCH, "strategy": "identity"}
    both = [engine(situation, model, second_moments=moments, compile=flag) for flag in (False, True)]
    for options in ({"solver": "exact"}, {"solver": "cg"}, {"aggregate": "both"}, {"normalize": "cosine"}):
        plain, compiled = (a.scores(queries, train, overwrite=True, **options, **sizes).values for a in both)  # type: ignore[arg-type]
        assert_close(compiled, plain, str(options), rtol=1e-8, atol_of_largest=1e-10)


@pytest.mark.slow
def test_compiled_checkpoints_see_their_own_parameters() -> None:
    """Parameters are inputs of the graphs, not constants in them."""
    situation = SITUATIONS["reuse"]
    model, train, queries = build(situation.factory), vectors(1, 12), vectors(2, BATCH)
    states = [{name: factor * value for name, value in model.state_dict().items()} for factor in (0.5, 2.0)]
    sizes: dict[str, Any] = {"batch_size": BATCH, "query_batch_size": BATCH}
    plain, compiled = (
        whence.Checkpoints(model, situation.task(), states, device="cpu", progress=False, compile=flag).fit(train, batch_size=BATCH)
        for flag in (False, True)
    )
    assert_close(compiled.scores(queries, train, **sizes).values, plain.scores(queries, train, **sizes).values, "mean", rtol=1e-9)
    found, wanted = (made.unrolled_scores(queries, train, [1.0, 2.0], **sizes).values for made in (compiled, plain))
    assert_close(found, wanted, "segments", rtol=1e-9, atol_of_largest=1e-11)


@pytest.mark.slow
def test_a_ragged_last_batch_and_layers_by_name() -> None:
    situation = SITUATIONS["reuse"]
    model, train, queries = build(situation.factory), vectors(1, 11), vectors(2, 3)
    for layers in (["again"], ["enter", "head"]):
        plain, compiled = (
            whence.Attributor(model, situation.task(), device="cpu", progress=False, layers=layers, compile=flag)
            .scores(queries, train, strategy="identity", batch_size=BATCH)
            .values
            for flag in (False, True)
        )
        assert_close(compiled, plain, str(layers), rtol=1e-9, atol_of_largest=1e-11)


@pytest.mark.slow
def test_a_model_that_fails_is_left_as_it_was() -> None:
    """The fixture of conftest.py compares hooks, flags and numbers."""
    situation = SITUATIONS["reuse"]
    model = build(situation.factory)
    train = vectors(1, 12)
    train[9] = (torch.full((4,), float("inf"), dtype=torch.float64), train[9][1])
    attributor = engine(situation, model, compile=True)
    with pytest.raises(whence.errors.NumericalError, match=r"example ids 9\b"):
        attributor.self_influence(train, strategy="identity", batch_size=BATCH)
    good = vectors(1, 12)
    expected = engine(situation, model).self_influence(good, strategy="identity", batch_size=BATCH)
    assert_close(attributor.self_influence(good, strategy="identity", batch_size=BATCH), expected, "afterwards", rtol=1e-9)


def test_compiling_and_offloading_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"compile=True cannot be combined with offload=True.*Leave one out"):
        whence.Attributor(Reuse(), Classification(), compile=True, offload=True)
