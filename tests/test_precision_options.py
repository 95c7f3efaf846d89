"""Half precision ranks rows as single precision does, tiny losses do not vanish in it, and offloading changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import whence
from architectures import BERT, HuggingFace, collate_words, hugging_face, words
from case import watch
from cases import STRATEGIES, case_named
from whence.errors import ConfigError, NumericalError

pytest.importorskip("transformers")
WIDER = BERT | {"hidden_size": 16, "intermediate_size": 24}
TRAIN, QUERIES = tuple(3 + index % 5 for index in range(40)), tuple(4 + index % 3 for index in range(10))


class Scaled(HuggingFace):
    """Losses and measurements multiplied by a constant."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.factor * super().loss(model, batch)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return self.factor * super().measurement(model, batch)


def bert() -> nn.Module:
    """A small BERT in float32, of moderate weights."""
    torch.manual_seed(1)
    return watch(hugging_face("BertForSequenceClassification", "BertConfig", **WIDER).eval())


def scored(strategy: str, *, factor: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    train, queries = words(generator, TRAIN), words(generator, QUERIES)
    attributor = whence.Attributor(bert(), Scaled(factor), collate=collate_words, device="cpu", progress=False, **options)
    attributor.fit(train, strategy=strategy, empirical=True, batch_size=16)
    return attributor.scores(queries, train, batch_size=16).values, attributor.self_influence(train, batch_size=16)


def spearman(found: Tensor, wanted: Tensor) -> float:
    """Return the mean over queries of the rank correlation."""
    return sum(scipy.stats.spearmanr(a, b).statistic for a, b in zip(found.tolist(), wanted.tolist(), strict=True)) / len(found)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_ranks_as_single_precision(strategy: str, precision: str) -> None:
    (plain, own), (half, half_own) = scored(strategy), scored(strategy, precision=precision)
    assert half.dtype == torch.float32
    assert not torch.equal(half, plain), "nothing was computed in half precision"
    assert spearman(half, plain) >= 0.99
    assert spearman(half_own[None], own[None]) >= 0.99


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tiny_losses_do_not_vanish_in_float16(strategy: str) -> None:
    """Gradients of a millionth lie below the smallest float16 (6e-8 at best); curvature and scores must come out scaled alone."""
    factor = 1e-6
    (plain, own), (tiny, tiny_own) = scored(strategy), scored(strategy, factor=factor, precision="float16")
    scale = factor**2 if strategy == "identity" else 1.0
    assert spearman(tiny, plain) >= 0.99
    assert spearman(tiny_own[None], own[None]) >= 0.99
    slope = ((tiny / scale * plain).sum() / plain.square().sum()).item()
    assert slope == pytest.approx(1.0, abs=0.03), "the loss's scale was not taken out again"


@pytest.mark.parametrize("factor", [1e4, 1e6])
@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_large_losses_in_float16_are_right_or_refused(strategy: str, factor: float) -> None:
    """Ten thousand times a loss still fits; where gradients are larger than any float16 the error names layer and rows."""
    try:
        large, _ = scored(strategy, factor=factor, precision="float16")
    except NumericalError as error:
        assert factor > 1e5
        assert "layer 'classifier'" in str(error)  # noqa: PT017
        return
    assert spearman(large, scored(strategy)[0]) >= 0.99


def test_precision_leaves_weights_and_curvature_in_the_models_type() -> None:
    """The fixture that watches models compares types and values of all parameters."""
    attributor = whence.Attributor(bert(), HuggingFace(), collate=collate_words, device="cpu", progress=False, precision="bfloat16")
    rows = words(torch.Generator().manual_seed(0), TRAIN[:6])
    assert attributor.fit(rows, strategy="ekfac", empirical=True).scores(rows, rows).values.dtype == torch.float32


@pytest.mark.parametrize("precision", ["float8", "half", 16, None])
def test_precisions_that_do_not_exist(precision: Any) -> None:
    with pytest.raises(ConfigError, match=r"precision.*bfloat16"):
        whence.Attributor(bert(), HuggingFace(), device="cpu", progress=False, precision=precision)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["everything", "checkpointed", "fallback_places_checkpointed", "attention_encoder_padded", "conv_groups"])
def test_offloading_changes_nothing(name: str, strategy: str) -> None:
    case = case_named(name)
    train, queries = case.data()
    found = []
    for offload in (False, True):
        attributor = case.attributor(case.model(), offload=offload).fit(train, strategy=strategy, empirical=True, batch_size=5)
        scores = attributor.scores(queries, train, per_layer=True, batch_size=5)
        found.append([scores.values, *scores.per_layer.values(), attributor.self_influence(train, batch_size=5)])
    assert all(map(torch.equal, *found))


def test_offloading_with_half_precision() -> None:
    plain, offloaded = (scored("ekfac", precision="bfloat16", **options) for options in ({}, {"offload": True}))
    assert all(map(torch.equal, plain, offloaded))
