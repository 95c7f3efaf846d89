"""What cannot be tracked is left out with its reason, and what looks like a known layer but is none is refused."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from case import Case, simple
from case_data import gated, labelled
from cases import STRATEGIES, build, case_named
from cases_attention import SelfAttention, five
from cases_embedding import WIDTH, WORDS, Bag, Speaker, continued, sentences
from cases_fallback import Places
from cases_norm import Normed, many
from coverage_check import assert_coverage_is_true
from expected import KINDS, compare, expected, run
from whence.errors import LayerError
from whence.tasks import Classification


def reasons(case: Case, **options: Any) -> dict[str, str]:
    model = case.model()
    coverage = case.attributor(model, **options).coverage
    assert_coverage_is_true(model, coverage, coverage.tracked)
    return dict(coverage.left_out)


# ---------------------------------------------------------------------------------------------- what has no handler


@pytest.mark.parametrize(("option", "value"), [("max_norm", 1.0), ("scale_grad_by_freq", True)])
def test_embeddings_that_are_no_plain_lookup_are_left_out(option: str, value: Any) -> None:
    found = reasons(simple("odd", partial(Bag, **{option: value}), "mix head", rows=sentences), layers="all")
    assert option in found["words"]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_attention_with_extra_keys_has_no_handler(option: str) -> None:
    found = reasons(simple("odd", partial(SelfAttention, **{option: True}), "head", rows=five))
    assert any(name == "attn" or name.startswith("attn.") for name in found)


@pytest.mark.parametrize("layers", ["attn", "attn.*", "attn.k_proj"])
def test_attention_with_extra_keys_asked_for_by_name_is_an_error(layers: str) -> None:
    with pytest.raises(LayerError, match="attn"):
        case_named("attention_self").attributor(build(partial(SelfAttention, add_bias_kv=True)), layers=[layers])


def test_embeddings_and_heads_are_not_tracked_unless_asked_for() -> None:
    for bias in (False, True):
        case = simple("speaker", partial(Speaker, bias=bias), "", rows=continued)
        model = case.model()
        coverage = case.attributor(model).coverage
        assert_coverage_is_true(model, coverage, coverage.tracked)
        assert "words" not in coverage.tracked
        assert "words" in dict(coverage.left_out)


def test_a_norm_without_parameters_is_nothing_to_report() -> None:
    case = simple("bare norm", partial(Normed, lambda: nn.LayerNorm(5, elementwise_affine=False)), "inner head", rows=many)
    model = case.model()
    assert_coverage_is_true(model, case.attributor(model).coverage, ["inner", "head"])


class NormedBatch(nn.Module):
    """BatchNorm without running statistics mixes the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.inner(x))))


def test_batch_norm_without_running_statistics_is_not_scored_silently() -> None:
    """Examples then depend on each other, so no score of the norm is that of the batch of one."""
    case = simple("mixing", NormedBatch, "inner norm head")
    with contextlib.suppress(LayerError):
        assert "norm" in reasons(case)
        return
    with pytest.raises(LayerError, match="norm"):
        reasons(case)


# ---------------------------------------------------------------------------------------------- layers that are not what they seem


class Doubled(nn.LayerNorm):
    """A norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Shifted(nn.Embedding):
    """A lookup with a forward of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 2.0 * super().forward(ids)


class ShiftedBag(Bag):
    """A bag of words through such a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Shifted(WORDS, WIDTH)


class TwoSided(nn.MultiheadAttention):
    """An attention with a forward of its own."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = super().forward(query, key, value, **options)
        return output + 2.0 * nn.functional.linear(query, self.in_proj_weight[:4]), weights


class SidedAttention(SelfAttention):
    """A model with such an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = TwoSided(4, 2, batch_first=True)


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.parametrize(
    ("factory", "rows", "layer"),
    [
        (partial(Normed, partial(Doubled, 5)), many, "norm"),
        (ShiftedBag, sentences, "words"),
        (SidedAttention, five, "attn"),
    ],
    ids=["norm", "embedding", "attention"],
)
def test_a_subclass_that_computes_something_else_is_never_scored_wrong(factory: Any, rows: Any, layer: str, strategy: str) -> None:
    """Refused by name, left out with a reason, or right; a layer's scores must not silently be those of the plain layer."""
    case = simple(f"subclass of {layer}", factory, "", rows=rows, layers="all")
    model, (train, queries) = case.model(), case.data()
    with contextlib.suppress(LayerError):
        attributor = case.attributor(model).fit(train, strategy=strategy, empirical=True, batch_size=5)
        scores = attributor.scores(queries, train, per_layer=True, batch_size=5).per_layer
        if strategy == "identity":
            for name, values in scores.items():
                left, right = flat_gradients(case, model, name)
                oracle.assert_close(values, left @ right.T, name)
        else:
            assert not any(name.startswith(layer) for name in scores), "scored by a curvature that cannot know what the layer computes"
        return
    with pytest.raises(LayerError, match=layer):
        case.attributor(model).fit(train, strategy=strategy, empirical=True, batch_size=5).scores(queries, train)


def flat_gradients(case: Case, model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return the layer's gradients of queries and training rows, one row at a time through autograd alone."""
    layer, task, (train, queries) = oracle.layer_of(model, name), case.task(), case.data()

    def flat(objective: Any, row: Any) -> Tensor:
        found = torch.autograd.grad(objective(model, case.collate([row])).sum(), oracle.trained(layer), allow_unused=True)
        return oracle.as_trained_matrix(layer, found).flatten()

    return torch.stack([flat(task.measurement, row) for row in queries]), torch.stack([flat(task.loss, row) for row in train])


# ---------------------------------------------------------------------------------------------- sharing in part


class NormsHalfTied(nn.Module):
    """Two norms with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class AttentionTied(nn.Module):
    """Two attentions that share the weight of their output, and one that shares it with a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.out_proj.weight = self.one.out_proj.weight
        self.layer.weight = self.one.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x, x, x)[0]
        return self.head(torch.tanh(self.layer(self.two(x, x, x)[0])).mean(1))


class ScaleOfNorm(nn.Module):
    """A norm whose weight is used once more, without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.scale = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x) * self.scale))


class FunctionalHead(nn.Module):
    """A head tied by hand: the embedding's weight is used without the embedding, and no second name shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.mix(self.words(ids).cumsum(1))), self.words.weight)


class FunctionalLayer(nn.Module):
    """A layer whose weight is used once more, transposed, as of an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.head = nn.Linear(4, 5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.tanh(self.code(x)) @ self.code.weight))


@pytest.mark.parametrize("strategy", ["identity", "diagonal"])
@pytest.mark.parametrize("factory", [NormsHalfTied, AttentionTied, ScaleOfNorm, FunctionalHead, FunctionalLayer])
@pytest.mark.parametrize("fallback", [False, True])
def test_layers_that_share_a_part_are_right_or_left_out(factory: Any, strategy: str, fallback: bool) -> None:
    """Whatever is tracked, its scores are autograd's; and what is not is named."""
    rows = {AttentionTied: five, FunctionalHead: continued}.get(factory, partial(labelled, shape=(4,)))
    case = simple(f"shared in part: {factory.__name__}", factory, "", rows=rows, layers="all", task=Classification)
    model, (train, queries) = case.model(), case.data()
    attributor = None
    with contextlib.suppress(LayerError):
        attributor = case.attributor(model, fallback=fallback).fit(train, strategy=strategy, empirical=True, batch_size=5)
    if attributor is None:
        with pytest.raises(LayerError, match=r"norm|first|one|two|scale|words|code"):
            case.attributor(model, fallback=fallback).fit(train, strategy=strategy, empirical=True, batch_size=5)
        return
    scores = attributor.scores(queries, train, per_layer=True, batch_size=5, damping=0.1)
    for name, values in scores.per_layer.items():
        left, right = flat_gradients(case, model, name)
        weights = 1.0 if strategy == "identity" else 1.0 / (right.square().mean(0) + 0.1)
        oracle.assert_close(values, left * weights @ right.T, f"{factory.__name__} {name}")
    counted = sum(attributor.coverage.tracked.values())
    assert counted <= sum(p.numel() for p in model.parameters()), "a shared parameter was counted twice"


# ---------------------------------------------------------------------------------------------- fallback


class Branching(nn.Module):
    """A scale that only some batches meet: the model looks at its numbers to decide."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale, self.head = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        return self.head(y * self.scale if bool((x[:, 0] > 0).any()) else y.sin())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_branch_on_numbers_is_right_or_refused_by_the_fallback(strategy: str) -> None:
    """The rows are such that those of a batch agree on the branch."""
    case = simple("branching", Branching, "scale inner head", rows=gated, fallback=True)
    right_or_refused(case, strategy)


class Negated(torch.autograd.Function):
    """A function of its own, that knows nothing of vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class OwnFunction(nn.Module):
    """A bare parameter behind such a function, and a number read off the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale, self.head = nn.Linear(4, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Negated.apply(torch.tanh(self.inner(x)) * self.scale))


class Named(Classification):
    """A batch with parts that are no tensors."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(batch["names"], list)
        assert len(batch["names"]) == len(batch["x"])
        return super().loss(model, batch)


def collate_named(rows: list) -> dict:
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    return {"x": x, "labels": labels, "names": [f"row of {len(rows)}" for _ in rows], "kind": "named"}


def rows_of_parts(generator: torch.Generator, count: int) -> list:
    return [{"x": x, "labels": label} for x, label in labelled(generator, count, shape=(4,))]


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_a_function_without_vmap_is_right_or_refused_by_the_fallback(strategy: str) -> None:
    right_or_refused(simple("own function", OwnFunction, "scale inner head", fallback=True), strategy)


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_batches_with_parts_that_are_no_tensors_are_right_or_refused_by_the_fallback(strategy: str) -> None:
    task = partial(Named, inputs="x", labels="labels")
    options = {"rows": rows_of_parts, "task": task, "collate": collate_named}
    right_or_refused(simple("named", OwnFunction, "scale inner head", fallback=True, **options), strategy)


def right_or_refused(case: Case, strategy: str) -> None:
    with contextlib.suppress(LayerError):
        actual, wanted = run(case, strategy), expected(case, strategy)
        for kind in KINDS:
            compare(actual, wanted, kind, f"{case.name} {strategy}")
        return
    with pytest.raises(LayerError, match=r"scale|fallback"):
        run(case, strategy)


def test_without_fallback_bare_parameters_are_named() -> None:
    found = reasons(case_named("fallback_places"), fallback=False)
    assert {"token", "places"} <= set(found) or any("places" in reason for reason in found.values())


def test_fallback_covers_everything_that_is_trained() -> None:
    for name in ("fallback_places", "fallback_memory", "everything"):
        coverage = case_named(name).attributor(case_named(name).model()).coverage
        assert coverage.share == pytest.approx(1.0)
        assert coverage.left_out == []


def test_fallback_leaves_gradients_off_the_parameters() -> None:
    """The fixture that watches models looks at `.grad`; the task's own use of the parameter counts too."""

    class Decayed(Classification):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return super().loss(model, batch) + 0.1 * model.token.square().sum()

    case = simple("decayed", Places, "token places mix head", rows=five, fallback=True, task=Decayed)
    for kind in KINDS:
        compare(run(case, "diagonal"), expected(case, "diagonal"), kind, "a loss that uses the parameter itself")
