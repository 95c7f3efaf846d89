"""The cost model on its own: the cheapest order, and chunks that keep to the budget."""

from itertools import product

import pytest

from whence.capture import contract
from whence.capture.contract import Sides, Sizes

BOTH, NONE = Sides(inputs=True, outputs=True), Sides(inputs=False, outputs=False)


def sizes(positions: int, inputs: int = 768, outputs: int = 3072, examples: int = 32, groups: int = 1) -> Sizes:
    return Sizes(examples=examples, positions=positions, groups=groups, inputs=inputs, outputs=outputs)


def test_rotating_first_wins_up_to_the_published_number_of_positions() -> None:
    """`in out (in + out) / (in^2 + out^2)` is 903.5 for 768 x 3072."""
    assert contract.gradients(sizes(903), BOTH, 2**30).order == "rotate"
    assert contract.gradients(sizes(904), BOTH, 2**30).order == "form"


def test_flops_are_those_of_the_formulas() -> None:
    one = sizes(128, examples=1)
    forming, rotating = 2 * 128 * 768 * 3072, 2 * 128 * (768**2 + 3072**2)
    assert contract.gradients(one, BOTH, 2**30).flops == forming + rotating
    assert contract.gradients(one, NONE, 2**30).flops == forming
    assert contract.gradients(one, Sides(inputs=True, outputs=False), 2**30).flops == forming + 2 * 128 * 768**2


def test_one_position_forms_no_gradient() -> None:
    assert contract.squares(sizes(1), BOTH, 2**20).order == "outer"


def test_gram_only_for_uniform_weights_and_few_positions() -> None:
    assert contract.squares(sizes(64), NONE, 2**20, uniform=True).order == "gram"
    assert contract.squares(sizes(64), NONE, 2**20).order != "gram"
    assert contract.squares(sizes(1000), NONE, 2**20, uniform=True).order != "gram"


def test_queries_are_multiplied_with_inputs_first_for_one_position_alone() -> None:
    assert contract.pairwise(sizes(1), 16, 2**30).order == "factor"
    assert contract.pairwise(sizes(2), 16, 2**30).order == "form"


def test_queries_stay_in_the_eigenbasis_when_training_rows_are_few() -> None:
    assert contract.stay_rotated(sizes(64, examples=10), BOTH, queries=1000)
    assert not contract.stay_rotated(sizes(64, examples=100_000), BOTH, queries=1000)
    assert not contract.stay_rotated(sizes(64, examples=10), NONE, queries=1000)


def test_queries_are_kept_as_pairs_without_a_basis_and_with_few_positions() -> None:
    assert contract.keep_pairs(sizes(4), NONE)
    assert not contract.keep_pairs(sizes(512), NONE)
    assert not contract.keep_pairs(sizes(4), BOTH)


@pytest.mark.parametrize(("positions", "groups", "budget"), list(product([1, 7, 500], [1, 3], [1, 2**16, 2**23, 2**33])))
def test_chunks_keep_to_the_budget(positions: int, groups: int, budget: int) -> None:
    given = sizes(positions, inputs=40, outputs=30, examples=20, groups=groups)
    for choice in (contract.gradients(given, BOTH, budget), contract.squares(given, NONE, budget, uniform=True)):
        assert 1 <= choice.chunk <= 20
        held = {
            "rotate": given.weights + given.pair,
            "form": 3 * given.weights,
            "gram": 2 * groups * positions**2,
            "outer": given.pair,
        }[choice.order]
        assert choice.chunk == 1 or choice.chunk * held * 4 <= budget
    rows = contract.pairwise(given, 9, budget)
    assert 1 <= rows.chunk <= (9 if rows.order == "factor" else groups * 30)
