"""Selections beside brute force, on groups of which some are good, some noise and some harmful."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.refit.limits import Constraints, Limits, alike
from whence.refit.linear import Linearised
from whence.refit.predict import OptionRows, Target
from whence.refit.problem import Problem
from whence.refit.select import Method, Selection, SelectOptions, Until, select
from whence.refit.solve import RefitOptions, refit
from whence.refit.subsets import Groups, groups_of

SIZE, GROUPS, K = 6, 10, 5
GOOD = {0, 1, 2, 3, 4}


def rows(gradients: Tensor, outputs: Tensor) -> Linearised:
    count = len(gradients)
    return Linearised(outputs=outputs, gradients=gradients, example=torch.arange(count), weights=torch.ones(count), examples=count)


def problem(metric: str = "loss", options: RefitOptions | None = None) -> Problem:
    """Groups 0 to 4 pull towards a direction that validation likes, 5 to 9 away from it; every odd one half as much."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=generator)

    likes = torch.ones(K) / K**0.5
    pull = torch.tensor([(1.0 if group in GOOD else -1.0) / (1 + group % 2) for group in range(GROUPS)])
    train = rows(pull.repeat_interleave(SIZE)[:, None] * likes + noise(SIZE * GROUPS, K), noise(SIZE * GROUPS))
    valid = rows(likes + noise(30, K), noise(30))
    gold = torch.zeros(40, dtype=torch.bool)
    gold[::2] = True
    options_rows = OptionRows(
        linear=rows(gold.float()[:, None] * likes + noise(40, K), noise(40)), query=torch.arange(20).repeat_interleave(2), gold=gold
    )
    return Problem(
        train=train,
        groups=groups_of([f"g{number // SIZE}" for number in range(SIZE * GROUPS)]),
        target=Target(linear=valid, options=options_rows),
        metric=metric,  # type: ignore[arg-type]
        options=options or RefitOptions(ridge=2.0, tolerance=1e-8),
    )


def slow_value(given: Problem, chosen: Sequence[int]) -> float:
    """Refit one subset by itself and look at the loss."""
    weights = torch.zeros(given.train.examples)
    weights[list(given.groups.examples(list(chosen)))] = 1
    assert given.target.linear is not None
    return float(given.target.linear.loss(refit(given.train, weights, given.options).w[0]).mean())


def slow_greedy(given: Problem, steps: int, *, backward: bool) -> list[int]:
    """Try every candidate, one by one."""
    chosen = set(range(GROUPS)) if backward else set()
    order = []
    for _ in range(steps):
        candidates = sorted(chosen if backward else set(range(GROUPS)) - chosen)
        order.append(min(candidates, key=lambda one: slow_value(given, sorted(chosen ^ {one}))))
        chosen ^= {order[-1]}
    return order


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("steps", [None, 1])
def test_greedy_selection_is_that_of_brute_force(backward: bool, steps: int | None) -> None:
    given = problem(options=RefitOptions(ridge=2.0, tolerance=1e-8, steps=steps))
    found = select(given, SelectOptions(method="backward" if backward else "forward", until="best"))
    length = GROUPS - 1 if backward else GROUPS
    assert list(found.order) == slow_greedy(given, length, backward=backward)
    chosen = set(range(GROUPS)) if backward else set()
    for group, value in zip(found.order, found.path, strict=True):
        chosen ^= {group}
        assert value == pytest.approx(slow_value(given, sorted(chosen)), abs=1e-6)
    assert found.estimate == min(found.path)
    assert len(found.order) == length
    assert found.everything == pytest.approx(slow_value(given, range(GROUPS)), abs=1e-6)
    assert found.as_is == pytest.approx(slow_value(given, []), abs=1e-6)
    assert found.start == (found.everything if backward else found.as_is)


@pytest.mark.parametrize("method", ["forward", "backward", "ensemble", "ridge", "lasso", "influence"])
def test_every_method_finds_the_groups_that_help(method: Method) -> None:
    given = problem()
    found = select(given, SelectOptions(method=method, subsets=200))
    assert set(found.numbers) <= GOOD
    assert len(found.numbers) >= 3
    assert found.estimate < min(found.as_is, found.everything)
    assert found.groups == tuple(f"g{number}" for number in found.numbers)
    assert found.examples == tuple(sorted(SIZE * number + place for number in found.numbers for place in range(SIZE)))
    assert found.estimate == pytest.approx(slow_value(given, found.numbers), abs=1e-6)
    if found.contributions is not None and method != "influence":
        assert (found.contributions.low <= found.contributions.values).all()
        assert (found.contributions.high >= found.contributions.values).all()


@pytest.mark.parametrize("metric", ["accuracy", "probability"])
def test_options_can_be_selected_by(metric: str) -> None:
    found = select(problem(metric), SelectOptions(method="forward"))
    assert set(found.numbers) <= GOOD
    assert found.estimate > found.as_is


def test_a_selection_records_where_it_comes_from(tmp_path: Path) -> None:
    given = problem()
    found = select(given, SelectOptions(method="ensemble", subsets=50), Limits(given.groups, Constraints(examples=13)))
    found.save(tmp_path / "selection.json")
    read = json.loads((tmp_path / "selection.json").read_text())
    assert read["settings"]["split"] == "validation"
    assert read["settings"]["metric"] == "loss"
    assert read["settings"]["refit"]["ridge"] == 2.0
    assert read["settings"]["limits"]["examples"] == 13
    assert read["examples"] == list(found.examples)
    assert len(read["contributions"]["values"]) == GROUPS
    assert read["threshold"]["share"] in read["settings"]["shares"]
    assert "2 of 10 groups chosen, 12 of 60 examples (ensemble)" in found.lines()[0]
    assert "too good" in found.lines()[-1]
    assert "<table>" in found._repr_html_()
    assert isinstance(found, Selection)


@pytest.mark.parametrize("split", ["test", "Test", "test-matched", "held_out_test"])
def test_a_test_split_is_refused(split: str) -> None:
    given = problem()
    with pytest.raises(ConfigError, match="on test rows makes their result worthless"):
        replace(given, target=replace(given.target, split=split))
    replace(given, target=replace(given.target, split="latest"))


@pytest.mark.parametrize("method", ["forward", "backward", "ridge", "influence"])
def test_limits_are_kept(method: Method) -> None:
    given = problem()
    tokens = torch.arange(60)
    classes = ["rare" if number // SIZE in {7, 8} else "other" for number in range(60)]
    constraints = Constraints(examples=24, tokens=900, minimum={"rare": 7})
    limits = Limits(given.groups, constraints, tokens=tokens, classes=classes)
    found = select(given, SelectOptions(method=method, subsets=60, until="budget"), limits)
    assert len(found.examples) <= 24
    assert int(tokens[list(found.examples)].sum()) <= 900
    assert {7, 8} <= set(found.numbers)
    assert len(set(found.numbers) & GOOD) >= 1


@pytest.mark.parametrize("method", ["forward", "backward", "ridge"])
def test_groups_that_are_too_alike_are_not_chosen_together(method: Method) -> None:
    given = problem()
    limits = Limits(given.groups, Constraints(most_alike=0.9), linear=given.train)
    found = select(given, SelectOptions(method=method, subsets=60), limits)
    cosines = alike(given.groups, given.train)[list(found.numbers)][:, list(found.numbers)]
    assert float((cosines - torch.eye(len(found.numbers))).max()) <= 0.9
    assert len(found.numbers) < len(select(given, SelectOptions(method=method, subsets=60)).numbers)


@pytest.mark.parametrize("until", ["gain", "best", "budget"])
def test_forward_takes_a_group_though_the_model_as_it_is_is_better(until: Until) -> None:
    """No fine-tune ends at `w = 0`, where the model trained on all rows is, so that to choose nothing is no choice."""
    given = problem()
    harmful = [number for number in range(GROUPS) if number not in GOOD]
    places = list(given.groups.examples(harmful))
    train = rows(given.train.gradients[places], given.train.outputs[places])
    bad = replace(given, train=train, groups=groups_of([f"g{number}" for number in harmful for _ in range(SIZE)]))
    found = select(bad, SelectOptions(until=until))
    alone = select(bad, SelectOptions(until="best", method="backward"))
    assert found.path[0] > found.as_is, "every group harms"
    assert found.path[0] == pytest.approx(alone.path[-1]), "the best single group"
    assert len(found.numbers) == (5 if until == "budget" else 1)


def test_refits_that_do_not_converge_are_counted() -> None:
    assert select(problem(), SelectOptions()).unconverged == 0
    found = select(problem(options=RefitOptions(ridge=1e-3, tolerance=1e-12, most_steps=1)), SelectOptions())
    assert found.unconverged > 0
    assert found.lines()[-1] == f"{found.unconverged:,} refits did not converge: give a greater ridge."
    assert found.to_json()["unconverged"] == found.unconverged
    assert select(problem(options=RefitOptions(ridge=1.0, steps=1)), SelectOptions()).unconverged == 0, "one step was asked for"


def test_backward_to_a_budget_needs_one() -> None:
    with pytest.raises(ConfigError, match="give a budget of examples or tokens or most_alike, or until='gain' or 'best'"):
        select(problem(), SelectOptions(method="backward", until="budget"))


def test_how_alike_groups_are() -> None:
    gradients = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, -1.0], [0.0, -3.0]])
    groups = Groups(numbers=torch.tensor([0, 0, 1, 2, 3]), names=("x", "y", "z", "v"))
    found = alike(groups, rows(gradients, torch.zeros(5)))
    assert torch.allclose(found, torch.tensor([[1.0, 0, 0, 0], [0, 1, -1, -1], [0, -1, 1, 1], [0, -1, 1, 1]]))


def test_a_budget_is_filled_where_that_is_asked() -> None:
    given = problem()
    limits = Limits(given.groups, Constraints(examples=8 * SIZE))
    assert len(select(given, SelectOptions(until="budget"), limits).numbers) == 8
    assert len(select(given, SelectOptions(method="backward", until="budget"), limits).numbers) == 8
    assert len(select(given, SelectOptions(until="best"), limits).order) == 8


def test_limits_that_cannot_be_met() -> None:
    given = problem()
    classes = ["rare"] * SIZE + ["other"] * 54
    with pytest.raises(ConfigError, match="holds no group: the smallest has 6"):
        Limits(given.groups, Constraints(examples=5))
    with pytest.raises(ConfigError, match="there are 6"):
        Limits(given.groups, Constraints(minimum={"rare": 7}), classes=classes)
    with pytest.raises(ConfigError, match="needs classes"):
        Limits(given.groups, Constraints(minimum={"rare": 7}))
    with pytest.raises(ConfigError, match="needs tokens"):
        Limits(given.groups, Constraints(tokens=7))
    with pytest.raises(DataError, match="tokens has 3 entries for 60"):
        Limits(given.groups, Constraints(tokens=7), tokens=torch.ones(3))
    tight = Limits(given.groups, Constraints(examples=7, minimum={"rare": 1, "other": 1}), classes=classes)
    with pytest.raises(ConfigError, match=r"minimum of '(rare|other)' cannot be met"):
        select(given, SelectOptions(), tight)
    with pytest.raises(ConfigError, match="cannot be met by leaving groups out"):
        select(given, SelectOptions(method="backward"), tight)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"examples": 0}, "examples=0"), ({"most_alike": 1.0}, r"most_alike=1\.0"), ({"minimum": {"a": 0}}, "leave the class out")],
)
def test_constraints_are_checked(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Constraints(**settings)  # type: ignore[arg-type]


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="method='topk'"):
        SelectOptions(method="topk")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="until='never'"):
        SelectOptions(until="never")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="accuracy has no derivative"):
        select(problem("accuracy"), SelectOptions(method="influence"))
