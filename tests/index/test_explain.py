"""Scores by token on both sides, against the oracle."""

from __future__ import annotations

import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch

import case_tasks as t
import oracle
import oracle_options
import whence
from case import Case, simple
from case_run import HOSTILE, Elements
from cases import case_named
from cases_embedding import MaskedBag, collate_ragged, ragged
from compare import assert_close
from expected import BATCH, SEED, gradients
from whence import tokenwise
from whence.errors import ConfigError, MismatchError
from whence.index.stored import StoredIndex
from whence.scores.tokens import TokenScores

LEFT = simple(
    "padded on the left",
    partial(MaskedBag, padding_idx=3),
    "words mix head",
    rows=ragged,
    task=partial(t.PaddedTask, inputs="inputs", labels="label", measurement="margin"),
    collate=partial(collate_ragged, left=True),
    layers="all",
)
# A language model's head per position, classifiers with padding on either side, embeddings, norms, tied weights, attention, and
# parameters that are tracked without positions.
NAMES = [
    LEFT.name,
    "padded_labels",
    "norm_padded",
    "embedding_padded_with_a_padding_word",
    "tied_head_padded",
    "attention_encoder_padded",
    "fallback_shared_scale",
]


def named(name: str) -> Case:
    return LEFT if name == LEFT.name else case_named(name)


@cache
def fitted(name: str, strategy: str = "ekfac") -> whence.Attributor:
    case = named(name)
    return case.attributor(case.model(), seed=SEED).fit(case.data()[0], strategy=strategy, empirical=True, batch_size=BATCH)


@cache
def right(name: str, strategy: str) -> tuple[oracle_options.Answer, oracle_options.Answer]:
    """Return the oracle's tokens of training rows `[query, row, token]`, and of queries `[row, query, token]`."""
    seen = gradients(named(name))
    curvatures = oracle.fit(named(name).tracked, strategy, seen.train)
    dampings = oracle.damping_of(curvatures, strategy, "auto")
    one = oracle_options.answer(seen.queries, seen.train, curvatures, dampings)
    return one, oracle_options.answer(seen.train, seen.queries, curvatures, dampings)


def assert_side(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Compare tokens; beyond the longest row there is nothing."""
    longest = wanted.shape[2]
    assert_close(found[..., :longest], wanted, what)
    assert not found[..., longest:].any(), what


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.parametrize("name", NAMES)
def test_both_sides_equal_the_oracle(name: str, strategy: str) -> None:
    train, queries = named(name).data()
    found = fitted(name, strategy).token_scores(queries, train, strategy=strategy, batch_size=BATCH, query_batch_size=3)
    rows, asked = right(name, strategy)
    assert_close(found.values, rows.values, f"{name} values")
    assert_side(found.rows, rows.per_token, f"{name} training tokens")
    assert_side(found.queries, asked.per_token.transpose(0, 1), f"{name} tokens of queries")
    largest = rows.values.abs().max()
    assert (found.rows_rest - rows.rest).abs().max() <= 1e-8 * largest
    assert (found.queries_rest - asked.rest.T).abs().max() <= 1e-8 * largest
    assert found.queries.abs().max() > 0.01 * largest, "there is something to compare"


def test_where_all_layers_are_on_the_token_axis_each_side_sums_to_the_score() -> None:
    train, queries = named("padded_labels").data()
    found = fitted("padded_labels").token_scores(queries, train)
    for side in (found.rows, found.queries):
        assert_close(side.sum(-1), found.values, "sums", rtol=1e-6)


def test_the_training_side_is_that_of_the_scores() -> None:
    train, queries = named(LEFT.name).data()
    found = fitted(LEFT.name).token_scores(queries, train, query_rows=[2, 0], train_rows=[7, 1, 12])
    scores = fitted(LEFT.name).scores(queries, train, query_rows=[2, 0], train_rows=[7, 1, 12], per_token=True)
    assert scores.per_token is not None
    assert_close(found.values, scores.values, "values", rtol=1e-10)
    assert_close(found.rows, scores.per_token, "tokens", rtol=1e-10)


@pytest.mark.parametrize("several", [1, 3])
def test_rows_that_do_not_fit_into_memory_together_are_taken_in_turns(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = named(LEFT.name).data()
    attributor = fitted(LEFT.name)
    whole = attributor.token_scores(queries, train)
    monkeypatch.setattr(tokenwise, "HELD_BYTES", several * 8 * sum(layer.parameters for layer in attributor._layers))
    turns = attributor.token_scores(queries, train)
    for name in ("values", "rows", "queries"):
        assert_close(getattr(turns, name), getattr(whole, name), name, rtol=1e-10)


def test_models_without_tokens_are_refused() -> None:
    train, queries = case_named("mlp").data()
    with pytest.raises(ConfigError, match="no layer's positions are the tokens"):
        fitted("mlp").token_scores(queries, train)


def test_ids_are_looked_up_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = named(LEFT.name).data()
    index = fitted(LEFT.name).index(train, keep=0.5, name="looked-up")
    real, read = vars(StoredIndex)["ids"].func, list[int]()
    monkeypatch.setattr(StoredIndex, "ids", property(lambda own: read.append(1) or real(own)))
    index.explain(queries, range(len(train)), query_rows=[0])
    assert len(read) <= 2


def test_an_index_explains_its_rows() -> None:
    train, queries = named(LEFT.name).data()
    attributor = fitted(LEFT.name)
    ids = [100 + row for row in range(len(train))]
    index = attributor.index(train, keep=0.1, ids=ids)
    found = index.explain(queries, [107, 101], query_rows=[3, 1])
    wanted = attributor.token_scores(queries, train, query_rows=[3, 1], train_rows=[7, 1])
    for name in ("values", "rows", "queries"):
        assert_close(getattr(found, name), getattr(wanted, name), name, rtol=1e-10)


def test_what_an_index_cannot_explain_is_refused_by_name() -> None:
    train, queries = named(LEFT.name).data()
    attributor = fitted(LEFT.name)
    index = attributor.index(train, keep=0.1)
    with pytest.raises(ConfigError, match="99 is not in the index"):
        index.explain(queries, [2, 99])
    with pytest.raises(ConfigError, match="there is none"):
        index.explain(queries, [])
    with pytest.raises(ConfigError, match="open the index with train"):
        whence.Index(attributor, index.folder).explain(queries, [2])
    with pytest.raises(MismatchError, match="not those that were indexed"):
        whence.Index(attributor, index.folder, train=train[:5]).explain(queries, [2])


def test_an_index_of_another_curvature_explains_nothing(tmp_path: Path) -> None:
    train, queries = named(LEFT.name).data()
    attributor = LEFT.attributor(LEFT.model(), run_dir=tmp_path).fit(train, strategy="kfac")
    index = attributor.index(train, keep=0.1)
    attributor.fit(train, strategy="kfac", max_examples=9, overwrite=True)
    with pytest.raises(MismatchError, match="another model or curvature: factors"):
        index.explain(queries, [2])


SMALL = TokenScores(
    values=torch.tensor([[1.0, -2.0]]),
    rows=torch.tensor([[[0.5, -0.7, 0.0, 1.2], [-1.0, -1.0, 0.0, 0.0]]]),
    queries=torch.tensor([[[1.5, -0.5], [0.0, -2.0]]]),
)


def test_the_strongest_tokens_come_first_whatever_their_sign() -> None:
    assert [token for token, _ in SMALL.strongest(0, 0)] == [3, 1, 0]
    assert SMALL.strongest(0, 1, side="queries", k=1) == [(1, -2.0)]
    with pytest.raises(ConfigError, match="side='both'"):
        SMALL.strongest(0, 0, side="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 queries and 2 rows"):
        SMALL.strongest(0, 2)


def test_tokens_show_themselves_in_notebooks() -> None:
    table = SMALL._repr_html_()
    Elements(table)
    assert "3 (+1.2), 1 (-0.7), 0 (+0.5)" in table
    text = SMALL.html([HOSTILE, "a", "b", "c"], ["x", HOSTILE])
    Elements(text)
    assert "<img" not in text
    assert "&lt;img" in text
    text.encode("utf-8")
    marks = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)' title='([^']+)'", text)
    assert [mark for mark in marks[:4] if mark[1] == "0.75"] == [("214", "0.75", "+1.2")], "the strongest has the full colour"
    assert [(red, part) for red, _, part in marks[4:]] == [("214", "+1.5"), ("31", "-0.5")]
