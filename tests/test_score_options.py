"""Options of the scores against the oracle: tokens, ranks, norms, sums and choices of rows, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import case_tasks as t
import oracle
import oracle_options
import whence
from case import Case, simple
from cases import STRATEGIES, case_named
from cases_embedding import Bag, MaskedBag, collate_ragged, ragged, sentences
from compare import assert_close
from expected import BATCH, QUERY_BATCH, SEED, gradients
from whence.errors import ConfigError
from whence.tasks import Classification

masked = partial(t.PaddedTask, inputs="inputs", labels="label", measurement="margin")
LEFT = simple(
    "padded on the left",
    partial(MaskedBag, padding_idx=3),
    "words mix head",
    rows=ragged,
    task=masked,
    collate=partial(collate_ragged, left=True),
    layers="all",
)


def rows_by_ids(generator: torch.Generator, count: int) -> list:
    return [{"input_ids": ids, "labels": label} for ids, label in sentences(generator, count)]


BY_IDS = simple(
    "a token axis by input_ids",
    Bag,
    "words mix head",
    rows=rows_by_ids,
    task=partial(Classification, inputs="input_ids", labels="labels"),
    layers="all",
)
CASES = {case.name: case for case in (LEFT, BY_IDS)}


def named(name: str) -> Case:
    return CASES.get(name) or case_named(name)


@cache
def fitted(name: str, strategy: str) -> whence.Attributor:
    case = named(name)
    return case.attributor(case.model(), seed=SEED).fit(case.data()[0], strategy=strategy, empirical=True, batch_size=BATCH)


def ask(name: str, strategy: str, **options: Any) -> whence.Scores:
    train, queries = named(name).data()
    return fitted(name, strategy).scores(queries, train, **{"batch_size": BATCH, "query_batch_size": QUERY_BATCH, **options})


def wanted(
    name: str, strategy: str, *, query_rows: Sequence[int] | None = None, train_rows: Sequence[int] | None = None, **options: Any
) -> oracle_options.Answer:
    """Ask the oracle; it always gives layers and tokens."""
    seen = gradients(named(name))
    curvatures = oracle.fit(named(name).tracked, strategy, seen.train)
    dampings = oracle.damping_of(curvatures, strategy, "auto")
    queries = seen.queries if query_rows is None else [seen.queries[i] for i in query_rows]
    train = seen.train if train_rows is None else [seen.train[i] for i in train_rows]
    options = {key: value for key, value in options.items() if key not in {"per_layer", "per_token"}}
    return oracle_options.answer(queries, train, curvatures, dampings, **options)


def compare(found: whence.Scores, right: oracle_options.Answer, options: dict[str, Any], what: str) -> None:
    """Compare all that was asked for."""
    assert_close(found.values, right.values, f"{what} values")
    assert set(found.per_layer) == (set(right.per_layer) if options.get("per_layer") else set())
    for name, values in found.per_layer.items():
        assert_close(values, right.per_layer[name], f"{what} layer {name!r}")
    if options.get("per_token"):
        assert_tokens(found, right, what)


def assert_tokens(found: whence.Scores, right: oracle_options.Answer, what: str) -> None:
    longest = right.per_token.shape[2]
    assert found.per_token.shape[:2] == right.values.shape
    assert found.per_token.shape[2] >= longest
    assert_close(found.per_token[..., :longest], right.per_token, f"{what} tokens")
    assert not found.per_token[..., longest:].any(), f"{what}: beyond the longest row there is nothing"
    # The rest may be nothing at all, so it is measured by the scores it is a part of.
    off = (found.per_token_rest - right.rest).abs()
    assert (off <= 1e-6 * right.rest.abs() + 1e-9 * right.values.abs().max()).all(), f"{what} rest: off by {off.max():.2e}"
    total = found.per_token.sum(-1) + found.per_token_rest
    assert_close(total, found.values, f"{what}: tokens and the rest add up", rtol=1e-10, atol_of_largest=1e-11)


# ---------------------------------------------------------------------------------------------- alone and together

ALONE: list[dict[str, Any]] = [
    {"query_rank": 1},
    {"query_rank": 2},
    {"query_rank": 50},
    {"normalize": "relatif"},
    {"normalize": "cosine"},
    {"aggregate": "queries"},
    {"aggregate": "rows"},
    {"aggregate": "both"},
    {"query_rows": [2, 0]},
    {"train_rows": [5, 12, 0, 3, 1, 7]},
]
TOGETHER: list[dict[str, Any]] = [
    {"per_layer": True, "query_rank": 1},
    {"per_layer": True, "normalize": "relatif"},
    {"per_layer": True, "normalize": "cosine"},
    {"per_layer": True, "aggregate": "queries"},
    {"per_layer": True, "aggregate": "rows"},
    {"per_layer": True, "aggregate": "both"},
    {"per_layer": True, "query_rows": [1], "train_rows": [9, 2]},
    {"query_rows": [3, 1], "train_rows": [12, 4, 6, 0, 8, 1], "normalize": "relatif"},
    {"query_rows": [3, 1], "train_rows": [12, 4, 6], "aggregate": "queries", "per_layer": True},
    {"query_rows": [3, 1], "train_rows": [12, 4, 6], "query_rank": 1},
    {"train_rows": [12, 4, 6], "aggregate": "both"},
]
UNSETTLED: list[dict[str, Any]] = [
    {"normalize": "relatif", "aggregate": "queries"},
    {"normalize": "cosine", "aggregate": "queries"},
    {"normalize": "relatif", "aggregate": "rows"},
    {"normalize": "cosine", "aggregate": "rows"},
    {"normalize": "cosine", "aggregate": "both", "per_layer": True},
    {"normalize": "cosine", "query_rank": 1},
    {"normalize": "relatif", "query_rank": 1},
    {"query_rank": 1, "aggregate": "queries"},
    {"query_rows": [3, 1], "train_rows": [12, 4, 6], "aggregate": "queries", "query_rank": 1},
    {"query_rank": 1, "aggregate": "both"},
    {"query_rank": 1, "aggregate": "rows", "per_layer": True},
]
TOKENS: list[dict[str, Any]] = [
    {"per_token": True},
    {"per_token": True, "per_layer": True},
    {"per_token": True, "query_rows": [1], "train_rows": [9, 2, 4, 11, 0, 1]},
]
TOKENS_UNSETTLED: list[dict[str, Any]] = [
    {"per_token": True, "normalize": "relatif"},
    {"per_token": True, "normalize": "cosine"},
    {"per_token": True, "aggregate": "queries"},
    {"per_token": True, "aggregate": "rows"},
    {"per_token": True, "aggregate": "both"},
    {"per_token": True, "query_rank": 1},
    {"per_token": True, "query_rank": 1, "aggregate": "queries", "normalize": "relatif"},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}".replace(" ", "") for key, value in options.items())


@pytest.mark.parametrize("options", [*ALONE, *TOGETHER], ids=label)
@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.parametrize("name", ["mlp", "norm_padded", "everything"])
def test_options_equal_the_oracle(name: str, strategy: str, options: dict[str, Any]) -> None:
    compare(ask(name, strategy, **options), wanted(name, strategy, **options), options, f"{name} {strategy} {label(options)}")


@pytest.mark.parametrize("options", [*ALONE[:5], TOGETHER[2], TOGETHER[5]], ids=label)
@pytest.mark.parametrize("strategy", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", ["conv_groups", "choices", "tied_head_with_bias"])
def test_options_by_other_strategies(name: str, strategy: str, options: dict[str, Any]) -> None:
    compare(ask(name, strategy, **options), wanted(name, strategy, **options), options, f"{name} {strategy} {label(options)}")


@pytest.mark.parametrize("options", UNSETTLED, ids=label)
@pytest.mark.parametrize("name", ["mlp", "norm_padded"])
def test_options_together_are_right_or_refused(name: str, options: dict[str, Any]) -> None:
    """The sum is over scores as they would be without it, the query's length that of its own gradient."""
    right_or_refused(name, "ekfac", options)


def right_or_refused(name: str, strategy: str, options: dict[str, Any]) -> None:
    try:
        found = ask(name, strategy, **options)
    except ConfigError as error:
        known = [key for key in options if key in str(error)]
        if len(known) < 2:
            raise AssertionError(f"the error does not name the options that cannot be combined: {error}") from error
        return
    compare(found, wanted(name, strategy, **options), options, f"{name} {strategy} {label(options)}")


# ---------------------------------------------------------------------------------------------- tokens

TOKEN_CASES = [
    "norm_padded",
    "embedding_padded_with_a_padding_word",
    "tied_head_padded",
    "attention_padded",
    "attention_encoder_padded",
    "padded_labels",
    "fallback_shared_scale",
    LEFT.name,
    BY_IDS.name,
    "mlp",
    "conv_plain",
    "two_paddings",
    "attention_cross_padded",
]


@pytest.mark.parametrize("options", TOKENS, ids=label)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", TOKEN_CASES)
def test_tokens_equal_the_oracle(name: str, strategy: str, options: dict[str, Any]) -> None:
    compare(ask(name, strategy, **options), wanted(name, strategy, **options), options, f"{name} {strategy} {label(options)}")


@pytest.mark.parametrize("options", TOKENS_UNSETTLED, ids=label)
@pytest.mark.parametrize("name", ["norm_padded", LEFT.name])
def test_tokens_with_other_options_are_right_or_refused(name: str, options: dict[str, Any]) -> None:
    right_or_refused(name, "ekfac", options)


@pytest.mark.parametrize("name", ["packed", "transformed_gradients", "uneven_groups", "model_called_twice", "reused_unevenly"])
def test_tokens_where_they_have_no_plain_meaning_add_up_or_are_refused(name: str) -> None:
    """Packed sequences, changed gradients, interleaved groups: no token may be given what the sum does not hold."""
    try:
        found = ask(name, "ekfac", per_token=True)
    except ConfigError as error:
        assert "per_token" in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert_close(found.values, wanted(name, "ekfac").values, f"{name} values")
    assert_close(found.per_token.sum(-1) + found.per_token_rest, found.values, f"{name}: tokens and the rest", rtol=1e-10)


@pytest.mark.parametrize("sizes", [(1, 1), (4, 2), (13, 4)])
@pytest.mark.parametrize("name", ["embedding_padded", LEFT.name, "attention_encoder_padded"])
def test_tokens_do_not_depend_on_batches(name: str, sizes: tuple[int, int]) -> None:
    found = ask(name, "ekfac", per_token=True, batch_size=sizes[0], query_batch_size=sizes[1])
    right = wanted(name, "ekfac")
    assert_tokens(found, right, f"{name} in batches of {sizes}")


def test_left_and_right_padding_give_the_same_tokens() -> None:
    right_side = simple(
        "padded on the right", LEFT.factory, "words mix head", rows=ragged, task=masked, collate=collate_ragged, layers="all"
    )
    model, (train, queries) = LEFT.model(), LEFT.data()
    found = []
    for case in (LEFT, right_side):
        attributor = case.attributor(model).fit(train, strategy="kfac", empirical=True, batch_size=BATCH)
        found.append(attributor.scores(queries[:1], train, per_token=True, batch_size=BATCH))
    assert_close(found[0].per_token, found[1].per_token, "tokens on the left and on the right", rtol=1e-9)


def test_tokens_were_not_asked_for() -> None:
    scores = ask("norm_padded", "kfac")
    assert scores.per_token is None
    with pytest.raises(ConfigError, match="per_token=True"):
        _ = scores.per_token_rest


# ---------------------------------------------------------------------------------------------- what is done with the rows


def test_top_and_table_name_rows_of_the_data_set(tmp_path: Path) -> None:
    train_rows, query_rows = [11, 2, 7, 5], [3, 1]
    scores = ask("mlp", "ekfac", train_rows=train_rows, query_rows=query_rows)
    for query in range(2):
        order = scores.values[query].argsort(descending=True)
        expected = [(train_rows[i], pytest.approx(scores.values[query, i].item())) for i in order.tolist()]
        assert scores.top(query, k=4) == expected
        assert scores.bottom(query, k=4) == expected[::-1]
    scores.to_parquet(tmp_path / "table.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert set(table["train"]) == set(train_rows)
    scores.save(tmp_path / "scores")
    again = whence.Scores.load(tmp_path / "scores")
    assert again.top(1, k=4) == scores.top(1, k=4)


def test_removal_is_by_the_number_of_rows_trained_on() -> None:
    """N is the length of the training data set, however few of its rows are scored."""
    for options in ({}, {"train_rows": [1, 5]}, {"aggregate": "queries", "train_rows": [0, 3]}):
        scores = ask("mlp", "kfac", **options)
        assert_close(scores.removal_effect(), scores.values / 13, f"{options}", rtol=1e-12)
        assert_close(scores.removal_effect(scale=2.5), 2.5 * scores.values / 13, f"{options}", rtol=1e-12)


def test_saved_scores_keep_tokens_and_layers(tmp_path: Path) -> None:
    scores = ask("norm_padded", "ekfac", per_token=True, per_layer=True)
    scores.save(tmp_path / "scores")
    again = whence.Scores.load(tmp_path / "scores")
    for key in ("values", "per_token", "per_token_rest"):
        assert torch.equal(getattr(again, key), getattr(scores, key)), key
    assert list(again.per_layer) == list(scores.per_layer)
    assert_close(again.removal_effect(), scores.removal_effect(), "removal", rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"aggregate": "rows"}, {"aggregate": "both"}, {"normalize": "relatif"}, {"normalize": "cosine"}], ids=label
)
def test_scores_that_predict_no_removal_say_so(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.*removal"):
        ask("mlp", "kfac", **options).removal_effect()


@pytest.mark.parametrize(
    "options",
    [
        {"query_rank": 0},
        {"query_rank": -1},
        {"query_rank": 1.5},
        {"query_rank": True},
        {"normalize": "l2"},
        {"normalize": True},
        {"aggregate": "sum"},
        {"aggregate": True},
        {"train_rows": []},
        {"train_rows": [13]},
        {"train_rows": [-1]},
        {"train_rows": [1, 1]},
        {"train_rows": [0.5]},
        {"query_rows": []},
        {"query_rows": [4]},
        {"query_rows": [0, 0]},
        {"response": "direct"},
        {"solver": "lu"},
    ],
    ids=label,
)
def test_values_that_cannot_be_used_are_refused_by_name(options: dict[str, Any]) -> None:
    """Rows named twice may be scored twice; everything else is a mistake."""
    (name, value), *_ = options.items()
    if isinstance(value, list) and len(value) > len(set(value)):
        try:
            found = ask("mlp", "kfac", **options)
        except ConfigError as error:
            assert name in str(error)  # noqa: PT017 (either outcome is right)
            return
        assert_close(found.values, wanted("mlp", "kfac", **options).values, "rows named twice")
        return
    spelled = {"train_rows": "train_rows|training rows", "query_rows": "query_rows|query rows"}.get(name, name)
    with pytest.raises(ConfigError, match=spelled):
        ask("mlp", "kfac", **options)


# ---------------------------------------------------------------------------------------------- self-influence


@pytest.mark.parametrize("train_rows", [None, [7, 0, 12, 3, 4, 5]])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["mlp", "norm_padded", "everything", "attention_encoder", "conv_groups", "fallback_memory"])
def test_self_influence_on_the_measurement(name: str, strategy: str, train_rows: list[int] | None) -> None:
    """How a row's own loss gradient moves what would be measured on it."""
    case = named(name)
    model, task, (train, _), seen = case.model(), case.task(), case.data(), gradients(case)
    measured = oracle.collect(
        model, case.tracked, task, train, collate=case.collate, objective=lambda m, batch, _: task.measurement(m, batch)
    )
    curvatures = oracle.fit(case.tracked, strategy, seen.train)
    dampings = oracle.damping_of(curvatures, strategy, "auto")
    right = {
        on: oracle_options.answer(sides, seen.train, curvatures, dampings).values.diagonal()
        for on, sides in (("loss", seen.train), ("measurement", measured))
    }
    chosen = list(range(13)) if train_rows is None else train_rows
    for on in ("loss", "measurement"):
        found = fitted(name, strategy).self_influence(train, on=on, batch_size=BATCH, train_rows=train_rows)
        assert_close(found, right[on][chosen], f"{name} {strategy} self-influence on the {on}")


def test_self_influence_on_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="on="):
        fitted("mlp", "kfac").self_influence(named("mlp").data()[0], on="gradient")
