"""For the newer kinds of layer: batches, padding and a run folder change nothing, and results of other settings are not mixed up."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from architectures import ARCHITECTURES, HuggingFace, hugging_face
from case import watch
from cases import STRATEGIES, Case, build, case_named
from cases_attention import ATTENTION
from cases_combined import COMBINED
from cases_embedding import EMBEDDINGS, collate_ragged
from cases_fallback import FALLBACK, MIXED, Places, five
from cases_norm import NORMS
from expected import BATCH, KINDS, SEED, Result, cached_run, compare, gradients
from test_precision_options import spearman
from whence.errors import ConfigError, LayerError, MismatchError

LAYERS = [case for case in [*NORMS, *EMBEDDINGS, *ATTENTION, *FALLBACK, *MIXED, *COMBINED] if case.name != "parts_not_always_taken"]


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("size", [1, 13])
@pytest.mark.parametrize("case", LAYERS, ids=ids)
def test_batch_sizes_change_nothing(case: Case, size: int) -> None:
    """Batches of another size than those of the oracle's tests; the case left out has rows that need their batch."""
    train, queries = case.data()
    attributor = case.attributor(case.model(), seed=SEED).fit(train, strategy="ekfac", empirical=True, batch_size=size)
    values = attributor.scores(queries, train, batch_size=size, query_batch_size=size).values
    wanted = cached_run(case, "ekfac")
    oracle.assert_close(values, wanted.scores, f"{case.name} in batches of {size}", rtol=0.0, atol_of_largest=1e-11)
    own = attributor.self_influence(train, batch_size=size)
    oracle.assert_close(own, wanted.self_influence, f"{case.name} in batches of {size}", rtol=0.0, atol_of_largest=1e-11)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["embedding_padded", "embedding_padded_with_a_padding_word"])
def test_words_padded_on_the_left(name: str, strategy: str) -> None:
    case = case_named(name)
    train, queries = case.data()
    left = case.attributor(case.model(), seed=SEED, collate=partial(collate_ragged, left=True))
    left.fit(train, strategy=strategy, empirical=True, batch_size=BATCH)
    values = left.scores(queries, train, batch_size=BATCH).values
    oracle.assert_close(values, cached_run(case, strategy).scores, f"{name} {strategy} padded on the left", rtol=1e-9)


# ---------------------------------------------------------------------------------------------- what is in the folder


def ask(run_dir: Path, case: Case, *, options: dict[str, Any] | None = None, **scores: Any) -> Tensor:
    train, queries = case.data()
    attributor = case.attributor(case.model(), run_dir=run_dir, **(options or {}))
    return attributor.fit(train, strategy="kfac", empirical=True).scores(queries, train, **scores).values


@pytest.mark.parametrize("name", ["everything", "attention_encoder_padded", "norm_padded"])
def test_what_was_computed_before_is_read_back(name: str, tmp_path: Path) -> None:
    case = case_named(name)
    found = [ask(tmp_path, case, query_rank=1), ask(tmp_path, case, query_rank=1)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "scores",
    [
        {"query_rank": 1},
        {"normalize": "relatif"},
        {"normalize": "cosine"},
        {"aggregate": "queries"},
        {"aggregate": "rows"},
        {"train_rows": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 11]},
        {"query_rows": [1, 0, 2, 3]},
        {"per_token": True},
        {"per_layer": True},
        {"damping": 0.5},
    ],
    ids=str,
)
def test_scores_with_other_options_are_not_mixed_up(scores: dict[str, Any], tmp_path: Path) -> None:
    """Refused, or computed anew; never what was asked for before."""
    case = case_named("norm_padded")
    ask(tmp_path, case)
    fresh = ask(tmp_path / "fresh", case, **scores)
    with contextlib.suppress(MismatchError):
        assert torch.equal(ask(tmp_path, case, **scores), fresh)
        return
    with pytest.raises(MismatchError, match=next(iter(scores)).replace("_", "[_ ]")):
        ask(tmp_path, case, **scores)


@pytest.mark.parametrize(
    "options", [{"fallback": False}, {"layers": ["norm", "head"]}, {"precision": "bfloat16"}, {"second_moments": True}], ids=str
)
def test_factors_of_other_settings_are_not_mixed_up(options: dict[str, Any], tmp_path: Path) -> None:
    case = case_named("norms_called_twice")
    if "second_moments" in options:
        options = {"second_moments": {name: torch.full_like(p, 0.3) for name, p in case.model().named_parameters()}}
    ask(tmp_path, case)
    fresh = ask(tmp_path / "fresh", case, options=options)
    with contextlib.suppress(MismatchError):
        assert torch.equal(ask(tmp_path, case, options=options), fresh)
        return
    with pytest.raises(MismatchError):
        ask(tmp_path, case, options=options)


# ---------------------------------------------------------------------------------------------- scaled gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "conv_groups", "everything", "attention_encoder", "attention_cross_other_widths", "grid_of_words"])
def test_second_moments_scale_gradients_as_adam_does(name: str, strategy: str) -> None:
    """Gradients times `(sqrt(v) + 1e-8)^-1/2`; covariances of inputs and output gradients are those of the plain model."""
    case = case_named(name)
    model, (train, queries) = case.model(), case.data()
    moments = {key: torch.rand_like(p).square() + 0.01 for key, p in model.named_parameters()}
    scales = {p: (moments[key].sqrt() + 1e-8).rsqrt() for key, p in model.named_parameters()}
    seen = gradients(case)
    layers = {key: oracle.layer_of(model, key) for key in case.tracked}
    by_layer = {key: oracle.as_trained_matrix(layer, [scales[p] for p in oracle.trained(layer)]) for key, layer in layers.items()}
    for example in (scaled := [scaled_example(e, by_layer) for e in [*seen.train, *seen.queries]]):
        assert set(example.gradient) == set(case.tracked)
    left, right = scaled[len(seen.train) :], scaled[: len(seen.train)]
    curvatures = oracle.fit(case.tracked, strategy, right)
    dampings = oracle.damping_of(curvatures, strategy, "auto")
    per_layer = oracle.pairwise(left, right, curvatures, dampings)
    own = sum(oracle.pairwise(right, right, curvatures, dampings).values()).diagonal()
    attributor = case.attributor(model, second_moments=moments).fit(train, strategy=strategy, empirical=True, batch_size=BATCH)
    found = attributor.scores(queries, train, per_layer=True, batch_size=BATCH)
    actual = Result(found.values, found.per_layer, attributor.self_influence(train, batch_size=BATCH))
    for kind in KINDS:
        compare(actual, Result(sum(per_layer.values()), per_layer, own), kind, f"{name} {strategy} scaled")


def scaled_example(example: oracle.Example, scales: dict[str, Tensor]) -> oracle.Example:
    matrices = {name: matrix * scales[name] for name, matrix in example.gradient.items()}
    return oracle.Example(matrices, example.uses, example.tokens, example.layers)


# ---------------------------------------------------------------------------------------------- narrow types


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "torch_encoder"])
def test_half_precision_of_other_architectures(name: str, precision: str, strategy: str) -> None:
    """With a fallback (the class token of a ViT), a tied head, torch's attention; tiny sizes, so rounding is felt more: 0.97."""
    pytest.importorskip("transformers")
    import whence

    architecture = next(a for a in ARCHITECTURES if a.name == name)
    train, queries = architecture.data()
    train, queries = ([narrow(row) for row in rows] for rows in (train * 3, queries))
    found = []
    for options in ({}, {"precision": precision}):
        model = watch(build(architecture.factory, seed=3).float())
        settings = {"collate": architecture.collate, "device": "cpu", "progress": False, "fallback": architecture.fallback}
        attributor = whence.Attributor(model, HuggingFace(), layers="all", **settings, **options)
        attributor.fit(train, strategy=strategy, empirical=True, batch_size=8)
        found.append(attributor.scores(queries, train, batch_size=8).values)
    assert not torch.equal(*found)
    assert spearman(found[1], found[0]) >= 0.97


def narrow(row: Any) -> Any:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in row) if isinstance(row, tuple) else row


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "ekfac"])
def test_a_model_of_half_precision(strategy: str) -> None:
    """A BERT whose weights are bfloat16 ranks rows as the same weights in float32 do."""
    pytest.importorskip("transformers")
    import whence
    from test_precision_options import QUERIES, TRAIN, WIDER, collate_words, words

    found = []
    train, queries = (words(torch.Generator().manual_seed(seed), lengths) for seed, lengths in ((0, TRAIN), (1, QUERIES)))
    for kind in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        model = hugging_face("BertForSequenceClassification", "BertConfig", **WIDER).eval().bfloat16().to(kind)
        attributor = whence.Attributor(watch(model), HuggingFace(), layers="all", collate=collate_words, device="cpu", progress=False)
        attributor.fit(train, strategy=strategy, empirical=True, batch_size=16)
        found.append(attributor.scores(queries, train, batch_size=16).values)
    assert found[1].dtype == torch.float32
    assert spearman(found[1], found[0]) >= 0.98


# ---------------------------------------------------------------------------------------------- fallback where rows are no examples


@pytest.mark.parametrize("name", ["packed", "choices", "uneven_groups"])
def test_fallback_with_examples_of_several_rows_is_right_or_refused(name: str) -> None:
    """A bare parameter beside tasks that say which row belongs to which example."""
    from cases import case_named as named
    from expected import expected, run

    plain = named(name)

    def factory() -> Any:
        model = plain.factory()
        model.scale = torch.nn.Parameter(torch.tensor([0.7, 1.3, 0.9, 1.1, 0.8])[: 5 if name == "choices" else 4])
        model.register_forward_pre_hook(lambda module, args: (args[0] * module.scale,))
        return model

    options = {"rows": plain.rows, "task": plain.task, "collate": plain.collate}
    case = Case(name=f"scaled {name}", factory=factory, tracked=("scale", *plain.tracked), fallback=True, **options)
    with contextlib.suppress(LayerError, ConfigError):
        actual, wanted = run(case, "diagonal"), expected(case, "diagonal")
        for kind in KINDS:
            compare(actual, wanted, kind, case.name)
        return
    with pytest.raises((LayerError, ConfigError), match=r"scale|fallback"):
        run(case, "diagonal")


def test_a_frozen_embedding_is_left_out_of_everything() -> None:
    case = case_named("embedding")
    model = case.model()
    model.words.weight.requires_grad_(False)
    watch(model)
    coverage = case.attributor(model).coverage
    assert list(coverage.tracked) == ["mix", "head"]
    assert "frozen" in dict(coverage.left_out)["words"]
    assert coverage.share == pytest.approx(1.0)


@pytest.mark.parametrize(("layers", "tracked"), [(["places", "head"], ["places", "head"]), (["tok*"], ["token"])])
def test_fallback_parameters_can_be_named(layers: list[str], tracked: list[str]) -> None:
    case = Case(name="named", factory=Places, rows=five, tracked=tuple(tracked), fallback=True, layers=layers)
    coverage = case.attributor(case.model()).coverage
    assert set(coverage.tracked) == set(tracked)
