"""What estimates are made of and compared with: real fine-tunes of language models, measured as by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import finetuned
from whence.attributor import Attributor
from whence.errors import DataError
from whence.evaluate.retrain import repeat_seed
from whence.evidence.calibrating import EstimateSettings
from whence.evidence.estimating import SubsetSettings, estimate
from whence.evidence.first_order import FineTunes, GradientSettings, Linear, fine_tune, linearise_recipe, trained_tokens
from whence.recipes.base import Recipe
from whence.recipes.families import FAMILIES
from whence.recipes.splits import collate_of
from whence.recipes.start import load_start
from whence.recipes.training import train_model
from whence.refit.predict import predict
from whence.refit.subsets import Subsets, groups_of
from whence.tasks import CausalLM, Classification, SequenceClassification
from whence.tasks.likelihoods import IGNORE

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

PARTS = ["first"] * 3 + ["rest"] * (finetuned.VALIDATION - 3)


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        finetuned.offline_and_quick(patch)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Questions with options, in three groups of training rows and two of queries."""
    folder = tmp_path_factory.mktemp("model")
    data = finetuned.write_data(folder / "data")
    made = finetuned.trained("strategy", data, folder / "strategy", snapshots=0)
    found = finetuned.opened("strategy", folder / "strategy")
    assert len(found.train) == len(made.train)
    return replace(found, groups=[f"source {place % 3}" for place in range(len(found.train))], query_groups=PARTS)


def bound(recipe: Recipe, folder: Path) -> Attributor:
    return Attributor(recipe.model, recipe.task, run_dir=folder, progress=False, device="cpu", collate=recipe.collate)


@pytest.fixture(scope="module")
def linear(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Linear:
    attributor = bound(recipe, tmp_path_factory.mktemp("run"))
    return linearise_recipe(attributor, recipe, GradientSettings(projection="random", dimension=16, per_token=True))


@pytest.fixture(scope="module")
def real(recipe: Recipe, linear: Linear) -> FineTunes:
    members = torch.tensor([[True, False, True], [False, True, False]])
    return fine_tune(recipe, linear, Subsets(members=members, groups=linear.groups), repeats=1, seed=4)


def mean_losses(model: nn.Module, rows: Any, collate: Any) -> Tensor:
    """The mean cross-entropy of every row's trained tokens, each row alone."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=collate([row])["input_ids"]).logits[0, :-1].double()
        labels = torch.tensor(row["labels"])[1:]
        found.append(F.cross_entropy(logits[labels != IGNORE], labels[labels != IGNORE]))
    return torch.stack(found)


def right(losses: Tensor, recipe: Recipe) -> tuple[float, float]:
    """The share of queries whose gold option has the least loss, and the mean chance of the gold option."""
    assert recipe.options is not None
    first, chances = [], []
    for query in range(len(recipe.queries)):
        own = (recipe.options.query == query).nonzero()[:, 0].tolist()
        (gold,) = [place for place in own if recipe.options.gold[place]]
        first.append(float(all(losses[gold] < losses[place] for place in own if place != gold)))
        chances.append(float(torch.exp(-losses[gold]) / torch.exp(-losses[own]).sum()))
    return sum(first) / len(first), sum(chances) / len(chances)


def test_real_fine_tunes_are_measured_as_by_hand(recipe: Recipe, linear: Linear, real: FineTunes) -> None:
    assert recipe.options is not None
    procedure = finetuned.procedure_of(recipe)
    family = FAMILIES["cot"]
    for place, member in enumerate(real.subsets.example_masks()):
        model = load_start(family, Path(procedure.folder) / "start", procedure.training)
        tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(Path(procedure.folder) / "start")
        collate = collate_of(family, model, tokenizer)
        rows = [recipe.train[row] for row in member.nonzero()[:, 0].tolist()]
        train_model(model, rows, collate, procedure.training, seed=repeat_seed(4, 0, 0))
        losses = mean_losses(model, recipe.queries, collate)
        for name, wanted in (("loss", losses.mean()), ("loss/first", losses[:3].mean()), ("loss/rest", losses[3:].mean())):
            assert float(real.metric(name)[place, 0]) == pytest.approx(float(wanted), rel=1e-4), name
        accuracy, probability = right(mean_losses(model, recipe.options.rows, collate), recipe)
        assert float(real.metric("accuracy")[place, 0]) == accuracy
        assert float(real.metric("probability")[place, 0]) == pytest.approx(probability, rel=1e-4)
    assert real.metric("loss").shape == (2, 1)
    assert torch.equal(real.take([1]).metric("probability/rest"), real.metric("probability/rest")[1:])


def test_the_start_is_the_model_as_it_is(recipe: Recipe, linear: Linear, tmp_path: Path) -> None:
    """Per token estimates at `w = 0` are it; averaged log-odds are less than the loss, and do not pass for it."""
    losses = mean_losses(recipe.model, recipe.queries, recipe.collate)
    wanted = {"loss": losses.mean(), "loss/first": losses[:3].mean(), "loss/rest": losses[3:].mean()}
    for name, value in wanted.items():
        assert float(linear.start.of(name)[0]) == pytest.approx(float(value), rel=1e-5)
    zero = torch.zeros(1, 16, dtype=torch.float64)
    torch.testing.assert_close(predict(linear.target, zero).values, linear.start.values, rtol=1e-5, atol=1e-6)
    averaged = linearise_recipe(bound(recipe, tmp_path), recipe, GradientSettings(projection="random", dimension=16))
    torch.testing.assert_close(averaged.start.values, linear.start.values)
    assert float(predict(averaged.target, zero).of("loss")[0]) < float(averaged.start.of("loss")[0]) - 1e-5


def test_trained_tokens_are_counted(recipe: Recipe, linear: Linear) -> None:
    wanted = [sum(label != IGNORE for label in row["labels"]) for row in recipe.train]
    assert linear.tokens.tolist() == wanted
    assert linear.tokens.tolist() == linear.train.example.bincount().tolist(), "a row of the measurement for each"
    whole = {"input_ids": [3, 4, 5, 6], "attention_mask": [1, 1, 1, 0]}
    bare = replace(recipe, task=CausalLM(), collate=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
    assert trained_tokens(bare, [whole]).tolist() == [2], "without labels all but the first, and no padding"
    places = replace(recipe, task=Classification(), collate=None)
    assert trained_tokens(places, [(torch.zeros(3), torch.tensor([1, IGNORE, 2]))]).tolist() == [2]
    assert trained_tokens(places, [(torch.zeros(3), 1)] * 2).tolist() == [1, 1]
    several = [{"labels": torch.tensor([1.0, 0.0, 1.0])}]
    labels = replace(recipe, task=SequenceClassification(), collate=None)
    assert trained_tokens(labels, several).tolist() == [3], "each of several labels has a part in the sum"


def test_lora_and_full_models_say_how_long_their_weights_are(recipe: Recipe, linear: Linear) -> None:
    parameters = [parameter.detach().flatten() for parameter in recipe.model.parameters() if parameter.requires_grad]
    assert linear.weight_norm == pytest.approx(float(torch.cat(parameters).double().norm()))
    assert 0 < linear.parameters < sum(map(len, parameters)), "embeddings are not tracked"


def test_an_estimate_from_end_to_end(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, groups=[f"source {place % 6}" for place in range(len(recipe.train))])
    attributor = bound(recipe, tmp_path)
    options: dict[str, Any] = {
        "gradients": GradientSettings(dimension=12),
        "subsets": SubsetSettings(count=50),
        "settings": EstimateSettings(metric="probability", calibration=4, held_out=3),
        "folder": tmp_path / "retrain",
    }
    found = estimate(attributor, recipe, **options)
    names = {"loss", "accuracy", "probability"}
    assert set(found.predictions.metrics) == {*names, *(f"{name}/{part}" for name in names for part in ("first", "rest"))}
    assert found.predictions.values.shape == (50, 9)
    assert torch.isfinite(found.predictions.values).all()
    assert {"loss", "probability"} <= set(found.trust)
    assert set(found.calibration) == set(found.predictions.metrics)
    assert found.calibration["loss"].options == found.calibration["probability"].options, "one refit for all metrics"
    again = estimate(attributor, recipe, **options)
    assert torch.equal(again.predictions.values, found.predictions.values)
    assert len(list((tmp_path / "retrain").rglob("*.safetensors"))) == 7, "four and three fine-tunes, each once"


def test_a_procedure_that_measures_something_else_is_refused(recipe: Recipe, linear: Linear) -> None:
    class Short:
        key, with_options = "short", True

        def __call__(self, rows: Any, seed: int) -> Tensor:
            return torch.zeros(3)

    other = replace(recipe, retraining=Short(), options=None)
    subsets = Subsets(members=torch.tensor([[True, False, False]]), groups=groups_of(recipe.groups or ()))
    with pytest.raises(DataError, match="retraining returned 3 measurements for 8 queries and 0 options"):
        fine_tune(other, linear, subsets, repeats=1)
