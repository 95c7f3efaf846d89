"""Which scores a recipe gets when it is not told, and which when it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
from whence.evidence.scoring import Scored, score_recipe, usual_name
from whence.recipes.base import Recipe
from whence.scores.matrix import Scores
from whence.tasks import Classification

OPTIONS = {"device": "cpu", "progress": False}


def made(*, over_run: bool) -> Recipe:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(4, generator=generator), number % 2) for number in range(11)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
    return Recipe(name="mine", model=model, task=Classification(), train=rows[:8], queries=rows[8:], over_run=over_run)


def bound(recipe: Recipe, folder: Path) -> Attributor:
    return Attributor(recipe.model, recipe.task, run_dir=folder, **OPTIONS)


def states(recipe: Recipe) -> list[dict[str, torch.Tensor]]:
    return [{name: factor * value.clone() for name, value in recipe.model.state_dict().items()} for factor in (0.5, 2.0)]


def scored(recipe: Recipe, folder: Path, **asked: object) -> Scored:
    def snapshots() -> Checkpoints:
        return Checkpoints(recipe.model, recipe.task, states(recipe), run_dir=folder / "over-run", **OPTIONS)

    return score_recipe(bound(recipe, folder), recipe, snapshots=snapshots, **asked)  # type: ignore[arg-type]


def never() -> Checkpoints:
    pytest.fail("no snapshot is needed")


def test_a_recipe_that_wants_it_is_scored_over_its_run_by_cosines(tmp_path: Path) -> None:
    recipe = made(over_run=True)
    found = scored(recipe, tmp_path, query_rows=[2, 0])
    assert (found.name, found.strategy, found.over_run, found.normalize) == ("over-run", "identity", True, "cosine")
    assert usual_name(recipe) == found.name
    parts = []
    for state in states(recipe):
        recipe.model.load_state_dict(state)
        asked = {"strategy": "identity", "normalize": "cosine", "query_rows": [2, 0]}
        parts.append(bound(recipe, tmp_path / "apart").scores(recipe.queries, recipe.train, **asked, overwrite=True).values)  # type: ignore[arg-type]
    torch.testing.assert_close(found.scores.values, torch.stack(parts).mean(0))
    assert torch.equal(Scores.load(tmp_path / "scores" / "over-run").values, found.scores.values)


@pytest.mark.parametrize("asked", [{"strategy": "identity"}, {"damping": 0.1, "strategy": "identity"}, {"solver": "exact"}])
def test_what_is_asked_for_goes_before_the_default(tmp_path: Path, asked: dict[str, object]) -> None:
    recipe = made(over_run=True)
    attributor = bound(recipe, tmp_path)
    found = score_recipe(attributor, recipe, snapshots=never, **asked)  # type: ignore[arg-type]
    assert (found.over_run, found.normalize) == (False, None)
    assert found.name == asked.get("solver", "identity")
    torch.testing.assert_close(found.scores.values, attributor.scores(recipe.queries, recipe.train, **asked).values)  # type: ignore[arg-type]


def test_other_recipes_are_scored_by_ekfac_and_over_the_run_if_asked(tmp_path: Path) -> None:
    recipe = made(over_run=False)
    found = score_recipe(bound(recipe, tmp_path).fit(recipe.train), recipe, snapshots=never)
    assert (found.name, found.strategy, found.over_run, found.normalize) == (usual_name(recipe), "ekfac", False, None)
    over_run = scored(recipe, tmp_path, over_run=True, strategy="kfac")
    assert (over_run.name, over_run.normalize) == ("over-run-kfac", None)
    assert scored(recipe, tmp_path, over_run=True, name="own").name == "own"
