"""Each way of going wrong has one clear error that names what came and what to do."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whence
from case_models import mlp
from cases import build, case_named, watch
from whence.errors import ConfigError, DataError, LayerError, NotFittedError, NumericalError
from whence.tasks import Classification, Regression, Task

CASE = case_named("mlp")
ROWS, QUERIES = CASE.data()


def attributor(model: nn.Module | None = None, **options: Any) -> whence.Attributor:
    """Return the engine on the small MLP, or on the given model."""
    return CASE.attributor(CASE.model() if model is None else model, **options)


def fitted(**options: Any) -> whence.Attributor:
    return attributor(**options).fit(ROWS, empirical=True, batch_size=5)


def replaced(rows: list, index: int, row: Any) -> list:
    return [*rows[:index], row, *rows[index + 1 :]]


def nan_row(index: int = 7) -> list:
    x = ROWS[index][0].clone()
    x[2] = float("nan")
    return replaced(ROWS, index, (x, ROWS[index][1]))


# ---------------------------------------------------------------------------------------------- data


def test_empty_training_data() -> None:
    with pytest.raises(DataError, match=r"(?i)train.*(empty|no rows|0 rows)|(empty|no rows|0 rows).*train"):
        attributor().fit([])
    ready = fitted()
    for work in (partial(ready.scores, QUERIES, []), partial(ready.self_influence, [])):
        with pytest.raises(DataError, match=r"(?i)train.*(empty|no rows|0 rows)|(empty|no rows|0 rows).*train"):
            work()


def test_empty_queries() -> None:
    with pytest.raises(DataError, match=r"(?i)quer.*(empty|no rows|0 rows)|(empty|no rows|0 rows).*quer"):
        fitted().scores([], ROWS)


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_range(label: int) -> None:
    wrong = replaced(ROWS, 9, (ROWS[9][0], label))
    message = rf"row 9: label {label} is out of range: the model has 3 classes, so labels run from 0 to 2"
    with pytest.raises(DataError, match=message):
        attributor().fit(wrong)
    with pytest.raises(DataError, match=message):
        fitted().self_influence(wrong)
    with pytest.raises(DataError, match=r"row 0: label"):
        fitted().scores([(QUERIES[0][0], label)], ROWS)


class Counting(Classification):
    """Counts how often the model is run for it."""

    calls = 0

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return super().output(model, batch)


def test_bad_rows_are_found_before_the_model_is_trained_on_any() -> None:
    task = Counting()
    with pytest.raises(DataError, match="row 12"):
        attributor(task=task).fit(replaced(ROWS, 12, (ROWS[12][0], 99)), batch_size=1)
    assert task.calls <= 1, "one look at the model's output is enough to know the number of classes"


def test_missing_part_of_a_row() -> None:
    with pytest.raises(DataError, match=r"no part 'x'"):
        attributor(task=Classification(inputs="x", labels="y")).fit([{"a": ROWS[0][0], "y": 1}] * 5)


def test_targets_of_another_size() -> None:
    rows = [(x, torch.zeros(5, dtype=torch.float64)) for x, _ in ROWS]
    with pytest.raises(DataError, match=r"the model gives .* for targets of shape"):
        attributor(task=Regression()).fit(rows)


# ---------------------------------------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("empirical", [True, False])
def test_nan_in_a_row_names_layer_and_example(empirical: bool) -> None:
    with pytest.raises(NumericalError, match=r"layer '0'.*\b7\b"):
        attributor().fit(nan_row(), empirical=empirical, batch_size=5)


def test_nan_in_a_row_while_scoring() -> None:
    ready = fitted()
    with pytest.raises(NumericalError, match=r"layer '0'.*\b7\b"):
        ready.scores(QUERIES, nan_row(), batch_size=5)
    with pytest.raises(NumericalError, match=r"layer '0'.*\b7\b"):
        ready.self_influence(nan_row(), batch_size=5)
    queries = replaced(QUERIES, 2, (torch.full((4,), float("inf"), dtype=torch.float64), 0))
    with pytest.raises(NumericalError, match=r"layer '0'.*\b2\b"):
        ready.scores(queries, ROWS, query_batch_size=3)


def test_nan_of_one_row_does_not_accuse_the_others() -> None:
    with pytest.raises(NumericalError) as caught:
        attributor().fit(nan_row(), empirical=True, batch_size=13)
    text = str(caught.value)
    assert "7" in text
    assert not any(f"{index}," in text or f" {index} " in text for index in (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12))


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_nan_in_a_weight_names_its_layer(layer: str) -> None:
    model = build(mlp)
    with torch.no_grad():
        model.get_submodule(layer).weight[1, 2] = float("nan")
    watch(model)
    with pytest.raises(NumericalError, match=rf"layer '{layer}'"):
        attributor(model).fit(ROWS, empirical=True, batch_size=5)


class Exploding(Classification):
    """A loss that is infinite for one row, although the model's output is finite."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        values = super().loss(model, batch)
        return values * torch.where(batch[1] == 2, float("nan"), 1.0)


def test_nan_of_the_loss_alone() -> None:
    rows = [(x, 2 if index == 6 else index % 2) for index, (x, _) in enumerate(ROWS)]
    with pytest.raises(NumericalError, match=r"\b6\b"):
        attributor(task=Exploding()).fit(rows, empirical=True, batch_size=5)


# ---------------------------------------------------------------------------------------------- arguments


def test_unknown_strategy() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'ekfak'.*identity.*diagonal.*kfac.*ekfac"):
        attributor().fit(ROWS, strategy="ekfak")
    with pytest.raises(ConfigError, match=r"(?s)'ekfak'.*identity.*diagonal.*kfac.*ekfac"):
        fitted().scores(QUERIES, ROWS, strategy="ekfak")


def test_scores_before_fit() -> None:
    for work in (lambda a: a.scores(QUERIES, ROWS), lambda a: a.self_influence(ROWS), lambda a: a.scores(QUERIES, ROWS, strategy="kfac")):
        with pytest.raises(NotFittedError, match=r"fit"):
            work(attributor())
    with pytest.raises(NotFittedError, match=r"diagonal"):
        fitted().scores(QUERIES, ROWS, strategy="diagonal")


@pytest.mark.parametrize("layers", [["nothing"], ["0", "blocks.*"], ["1"], []])
def test_layers_that_match_nothing(layers: list[str]) -> None:
    """A name that is no layer, a pattern without a match, a module without parameters, an empty list."""
    with pytest.raises((ConfigError, LayerError)) as caught:
        attributor(layers=layers).fit(ROWS)
    text = str(caught.value)
    assert not layers or repr(layers[-1]) in text
    assert "'0'" in text or "0, 2, 4" in text or "layers=" in text, f"no word on what could be asked for: {text}"


def test_a_layer_that_cannot_be_tracked_is_named_with_its_type() -> None:
    case = case_named("fallback_upsampled")
    with pytest.raises(LayerError, match=r"(?s)'up'.*ConvTranspose2d"):
        case.attributor(case.model(), layers=["up", "head"], fallback=False).fit(case.data()[0])


class Stack(nn.Module):
    """Rows the model flattens away: `[batch, 3, 4] -> [batch * 3, 4]`, which no example ids explain."""

    def __init__(self) -> None:
        super().__init__()
        self.flattened, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.flattened(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1))


def test_a_leading_size_that_does_not_fit_the_batch() -> None:
    rows = [(torch.randn(3, 4, dtype=torch.float64), 1) for _ in range(13)]
    with pytest.raises(LayerError, match=r"(?s)'flattened'.*(15 rows.*5|6 rows.*2).*example_ids"):
        attributor(build(Stack)).fit(rows, batch_size=5)


class WrongLoss(Classification):
    """Forgets that a loss is one number per example."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return super().loss(model, batch).mean()


def test_a_loss_that_is_not_one_number_per_example() -> None:
    with pytest.raises((DataError, ConfigError), match=r"(?s)loss.*(\[batch\]|per example|one number)"):
        attributor(task=WrongLoss()).fit(ROWS, empirical=True)


class NoSampling(Task):
    """Defines a loss alone."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum(-1)


def test_a_task_without_sampled_loss() -> None:
    with pytest.raises(ConfigError, match=r"NoSampling does not define sampled_loss.*empirical=True"):
        attributor(task=NoSampling()).fit(ROWS)
    assert attributor(task=NoSampling()).fit(ROWS, empirical=True).self_influence(ROWS).shape == (13,)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_that_is_no_damping(damping: float) -> None:
    ready = fitted()
    with pytest.raises(ConfigError, match=r"damping"):
        ready.scores(QUERIES, ROWS, damping=damping)
    with pytest.raises(ConfigError, match=r"damping"):
        ready.self_influence(ROWS, damping=damping)
    with pytest.raises(ConfigError, match=r"relative"):
        ready.scores(QUERIES, ROWS, damping=whence.Damping(relative=damping))


def test_damping_scope_and_word() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'network'.*layer.*model"):
        fitted().scores(QUERIES, ROWS, damping=whence.Damping(relative=0.1, scope="network"))
    with pytest.raises(ConfigError, match=r"(?s)'some'.*auto"):
        fitted().scores(QUERIES, ROWS, damping="some")


@pytest.mark.parametrize("size", [0, -3, 2.5, True])
def test_batch_size_that_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"batch_size"):
        attributor().fit(ROWS, batch_size=size)
    ready = fitted()
    with pytest.raises(ConfigError, match=r"batch_size"):
        ready.scores(QUERIES, ROWS, batch_size=size)
    with pytest.raises(ConfigError, match=r"query_batch_size"):
        ready.scores(QUERIES, ROWS, query_batch_size=size)


@pytest.mark.parametrize("count", [0, -1])
def test_max_examples_that_is_no_number_of_rows(count: int) -> None:
    with pytest.raises(ConfigError, match=r"max_examples"):
        attributor().fit(ROWS, max_examples=count)


def test_max_examples() -> None:
    whole = fitted().scores(QUERIES, ROWS).values
    enough = attributor().fit(ROWS, empirical=True, batch_size=5, max_examples=50).scores(QUERIES, ROWS).values
    assert torch.allclose(enough, whole, rtol=1e-6)
    some, again = (attributor().fit(ROWS, empirical=True, batch_size=5, max_examples=9).scores(QUERIES, ROWS).values for _ in range(2))
    assert torch.equal(some, again)
    assert not torch.allclose(some, whole, rtol=1e-3)


def test_top_of_more_rows_than_there_are() -> None:
    scores = fitted().scores(QUERIES, ROWS)
    best, worst = scores.top(query=1, k=1000), scores.bottom(query=1, k=1000)
    assert [index for index, _ in best] == scores.values[1].argsort(descending=True).tolist()
    assert worst == best[::-1]
    assert scores.top(query=3, k=2) == scores.top(query=3)[:2]
