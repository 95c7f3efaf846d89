"""Real architectures against the oracle of batch one: coverage, and the scores of every layer by every strategy, in float64."""

from __future__ import annotations

import importlib
import zlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import whence
from architectures import ARCHITECTURES, Architecture, HuggingFace
from cases import STRATEGIES, build, watch
from coverage_check import assert_coverage_is_true

pytest.importorskip("transformers")
pytest.importorskip("peft")
BATCH = 4
CLEAR = 1e-5


class InDouble:
    """torch as a modelling file sees it, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def everything_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmax of transformers go through float32 whatever the model's type; rounding there would hide errors."""
    for name in ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "gemma", "t5", "vit", "resnet"):
        monkeypatch.setattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), "torch", InDouble())
    single = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else single(self))


def ids(architecture: Architecture) -> str:
    return architecture.name


def model_of(architecture: Architecture) -> nn.Module:
    return build(architecture.factory, seed=zlib.crc32(architecture.name.encode()))


def attributor_of(architecture: Architecture, model: nn.Module, **options: Any) -> whence.Attributor:
    settings = {"collate": architecture.collate, "device": "cpu", "progress": False, "fallback": architecture.fallback, **options}
    return whence.Attributor(model, HuggingFace(), **settings)


@cache
def examples(architecture: Architecture) -> tuple[list[oracle.Example], list[oracle.Example]]:
    """Run every training row and every query on its own."""
    model, task = model_of(architecture), HuggingFace()
    names = architecture.tracked(model)
    return tuple(
        oracle.collect(model, names, task, rows, collate=architecture.collate, objective=lambda m, batch, _, f=objective: f(m, batch))
        for rows, objective in zip(architecture.data(), (task.loss, task.measurement), strict=True)
    )


@cache
def wanted(architecture: Architecture, strategy: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores `[query, train]` and the self-influence `[train]` of each layer."""
    train, queries = examples(architecture)
    curvatures = oracle.fit(list(train[0].gradient), strategy, train)
    dampings = oracle.damping_of(curvatures, strategy, "auto")
    own = oracle.pairwise(train, train, curvatures, dampings)
    return oracle.pairwise(queries, train, curvatures, dampings), {name: values.diagonal() for name, values in own.items()}


def is_clear(architecture: Architecture, name: str) -> bool:
    """Tell whether a layer's covariances have distinct eigenvalues: else EKFAC depends on an arbitrary basis of their null space."""
    train, _ = examples(architecture)
    if name not in train[0].uses:
        return True
    for side, free in zip(("a", "g"), oracle.free_sides(train[0], name), strict=True):
        values = torch.linalg.eigvalsh(oracle.covariance(train, name, side))
        if not free and not (values.diff(dim=-1) / values[:, -1:] > CLEAR).all():
            return False
    return True


def fitted(architecture: Architecture, model: nn.Module, strategy: str, layers: Any) -> whence.Attributor:
    rows, _ = architecture.data()
    return attributor_of(architecture, model, layers=layers).fit(rows, strategy=strategy, empirical=True, batch_size=BATCH)


# ---------------------------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ids)
def test_oracle_positions_add_up_to_its_gradients(architecture: Architecture) -> None:
    for example in [example for part in examples(architecture) for example in part]:
        for name, uses in example.uses.items():
            kept = uses.real[:, None, None] if example.layers[name].free[0] else 1.0
            total = torch.einsum("pgo,pgi->goi", uses.g * kept, uses.a)
            oracle.assert_close(total, example.gradient[name], f"{architecture.name} {name}", rtol=1e-9, atol_of_largest=1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ids)
def test_most_layers_are_clear(architecture: Architecture) -> None:
    """What EKFAC is compared on is the better part of the model."""
    names = architecture.tracked(model_of(architecture))
    clear = [name for name in names if is_clear(architecture, name)]
    assert len(clear) >= 0.7 * len(names), f"not clear: {sorted(set(names) - set(clear))}"


# ---------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ids)
def test_coverage_of_everything(architecture: Architecture) -> None:
    model = model_of(architecture)
    attributor = fitted(architecture, model, "diagonal", "all")
    assert_coverage_is_true(model, attributor.coverage, architecture.tracked(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ids)
def test_default_layers(architecture: Architecture) -> None:
    """Without embeddings and heads as wide as the vocabulary; the scores are the same layers' scores."""
    model = model_of(architecture)
    attributor = fitted(architecture, model, "kfac", None)
    everything = architecture.tracked(model)
    vocabulary = {
        name for name in everything if isinstance(dict(model.named_modules()).get(name), nn.Embedding | nn.Linear) and is_wide(model, name)
    }
    assert_coverage_is_true(model, attributor.coverage, [name for name in everything if name not in vocabulary])
    train, queries = architecture.data()
    scores = attributor.scores(queries, train, batch_size=BATCH)
    total = sum(values for name, values in wanted(architecture, "kfac")[0].items() if name not in vocabulary)
    oracle.assert_close(scores.values, total, f"{architecture.name} by default")


def is_wide(model: nn.Module, name: str) -> bool:
    """Tell whether a layer is an embedding of the vocabulary, or the model's output head."""
    module = model.get_submodule(name)
    get = getattr(model, "get_output_embeddings", None)
    return isinstance(module, nn.Embedding) or (get is not None and module is get())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=ids)
def test_all_layers_equal_the_oracle(architecture: Architecture, strategy: str) -> None:
    """By layer, so that EKFAC can be compared where it is a function of the data alone."""
    model = model_of(architecture)
    attributor = fitted(architecture, model, strategy, "all")
    train, queries = architecture.data()
    scores = attributor.scores(queries, train, per_layer=True, batch_size=BATCH, query_batch_size=2)
    own = attributor.self_influence(train, batch_size=BATCH)
    layers, selves = wanted(architecture, strategy)
    assert set(scores.per_layer) == set(layers)
    compared = [name for name in layers if strategy != "ekfac" or is_clear(architecture, name)]
    for name in compared:
        oracle.assert_close(scores.per_layer[name], layers[name], f"{architecture.name} {strategy} {name}")
    oracle.assert_close(scores.values, sum(scores.per_layer.values()), "the sum over layers", rtol=1e-9)
    if len(compared) == len(layers):
        oracle.assert_close(own, sum(selves.values()), f"{architecture.name} {strategy} self-influence")


@pytest.mark.parametrize(
    ("name", "size"), [("bert", 1), ("gpt2", 1), ("roberta", 1), ("t5", 5), ("t5", 1), ("bert_dora", 6), ("vit", 5), ("gpt2", 6)]
)
def test_no_size_of_batch_hides_a_layer_off_its_axis(name: str, size: int) -> None:
    """One row looks like the one row of a table of positions, five like five words, six like the identity that DoRA multiplies with."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, (train, queries) = model_of(architecture), architecture.data()
    attributor = attributor_of(architecture, model, layers="all").fit(train, strategy="kfac", empirical=True, batch_size=size)
    assert_coverage_is_true(model, attributor.coverage, architecture.tracked(model))
    scores = attributor.scores(queries, train, per_layer=True, batch_size=size, query_batch_size=size).per_layer
    for layer, values in wanted(architecture, "kfac")[0].items():
        oracle.assert_close(scores[layer], values, f"{name} in batches of {size}, {layer}")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bert", "gpt2", "torch_encoder"])
def test_a_model_of_which_only_biases_are_trained(name: str, kind: torch.dtype) -> None:
    """The bias of attention's keys changes nothing, so its gradient is rounding alone: tracked like the others, and accused of nothing."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = model_of(architecture).to(kind)
    for key, p in model.named_parameters():
        p.requires_grad_("bias" in key)
    watch(model)
    coverage = fitted(architecture, model, "diagonal", "all").coverage
    assert coverage.share == pytest.approx(1.0)
    assert {reason for _, reason in coverage.left_out} <= {"frozen"}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "bert_lora"])
def test_checkpointed_models_of_transformers(name: str) -> None:
    """Gradient checkpointing as transformers switches it on; it works in train mode only, so dropout is off by its rate."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = model_of(architecture)
    plain = fitted(architecture, model, "kfac", "all")
    train, queries = architecture.data()
    scores = plain.scores(queries, train, per_layer=True, batch_size=BATCH).values
    again = model_of(architecture)
    inner = again.base_model.model if name.endswith("lora") else again
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch(again)
    found = fitted(architecture, again, "kfac", "all").scores(queries, train, batch_size=BATCH).values
    oracle.assert_close(found, scores, f"{name} with gradient checkpointing", rtol=1e-9)
