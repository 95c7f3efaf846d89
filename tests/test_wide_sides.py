"""A side wider than the limit keeps the identity as its basis: against the oracle, with the limit lowered to what tiny models exceed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import oracle
from cases import STRATEGIES, case_named
from expected import KINDS, compare, expected, run

# Sides are those of `[group, out, in]`, the column of ones included. In the cases below some are wider than four, some are not.
LIMIT = 4
NAMES = ["mlp", "mlp_without_biases", "conv_plain", "conv_groups", "cube_plain", "tied_head_with_bias", "attention_cross", "everything"]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Lower the limit of dense bases."""
    monkeypatch.setattr("whence.capture.tracking.WIDEST_BASIS", LIMIT)
    return LIMIT


def test_the_limit_is_that_of_the_contract() -> None:
    from whence.capture import tracking

    assert tracking.WIDEST_BASIS == oracle.WIDEST


@pytest.mark.parametrize("empirical", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("name", NAMES)
def test_wide_sides_equal_the_oracle(limit: int, name: str, strategy: str, empirical: bool) -> None:
    case = case_named(name)
    wanted = expected(case, strategy, empirical=empirical, widest=limit)
    dense = expected(case, strategy, empirical=empirical)
    if strategy == "ekfac":
        assert not wanted.scores.allclose(dense.scores, rtol=1e-3), "the limit changes nothing in this case"
    actual = run(case, strategy, empirical=empirical)
    for kind in KINDS:
        compare(actual, wanted, kind, f"{name} {strategy} with sides wider than {limit}")


def test_both_sides_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity on both sides EKFAC is the diagonal strategy, by definition."""
    monkeypatch.setattr("whence.capture.tracking.WIDEST_BASIS", 0)
    case = case_named("mlp")
    found, diagonal = (run(case, strategy) for strategy in ("ekfac", "diagonal"))
    for kind in KINDS:
        compare(found, diagonal, kind, "ekfac without bases against diagonal")
