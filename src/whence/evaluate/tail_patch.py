"""A check of scores without retraining: one more step on the rows they call most helpful, and how far each query falls.

After the tail-patch of T. A. Chang et al., "Scalable Influence and Fact Tracing for Large Language Model Pretraining" (2024).
It sees what rows do to a model that is trained already, to first order, not what they did to its training; orders by plain
gradient products are at home here. One step takes a query's rows together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whence.curvature.moments import EPS
from whence.errors import ConfigError, DataError, NumericalError
from whence.evaluate.estimates import Estimate, check_resamples, mean_estimate
from whence.runtime.batches import Batch, check_dataset, iterate_batches
from whence.tasks.base import Task, check_model_and_task


@dataclass(frozen=True, kw_only=True)
class TailPatch:
    """How far a step on each order's first rows brings the queries down.

    Attributes:
        before: the queries' measurements by the trained model, float64 `[query]`.
        falls: by order, the measurement before the step minus that after it, float64 `[query]`; positive: the rows help.
        k: rows per query.
        resamples, seed: of the bootstrap over queries.
    """

    before: Tensor
    falls: dict[str, Tensor]
    k: int
    resamples: int = 1000
    seed: int = 0

    def fall(self, order: str) -> Estimate:
        """Return the mean fall over queries.

        Raises:
            ConfigError: there is no such order.
        """
        return mean_estimate(self._falls(order), resamples=self.resamples, seed=self.seed)

    def difference(self, order: str, other: str) -> Estimate:
        """Return how much further the queries fall with one order than with another, query by query.

        Raises:
            ConfigError: there is no such order.
        """
        return mean_estimate(self._falls(order) - self._falls(other), resamples=self.resamples, seed=self.seed)

    def to_json(self) -> dict[str, Any]:
        """Return the mean falls as JSON values."""
        falls = {order: self.fall(order).to_json() for order in self.falls}
        return {"queries": len(self.before), "k": self.k, "mean_before": float(self.before.mean()), "falls": falls}

    def _falls(self, order: str) -> Tensor:
        if order not in self.falls:
            raise ConfigError(f"there is no order {order!r}; there are {', '.join(map(repr, self.falls))}.")
        return self.falls[order]


def tail_patch(
    model: nn.Module,
    task: Task,
    queries: Any,
    train: Any,
    orders: Mapping[str, Tensor],
    *,
    learning_rate: float,
    k: int = 10,
    steps: int = 1,
    second_moments: Mapping[str, Tensor] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    resamples: int = 1000,
    seed: int = 0,
) -> TailPatch:
    """Step on each query's `k` rows of the highest score and measure the query; then put the weights back.

    A step is `learning_rate` times the gradient of the mean over the `k` rows of `task.loss`, which sums over tokens: where
    training took the mean over tokens, divide its rate by the tokens of a row. Dropout is off and statistics of batches
    stay as they are. The model has its weights, gradients and modes back afterwards, bit for bit, also after an error.

    Args:
        model, task: trained, on `device`; every parameter that requires a gradient is stepped.
        queries, train: rows.
        orders: by name, scores `[query, train]`. The first `k` rows are taken whatever the sign of their scores, so that all
            orders step on as many; rows of equal score come in a random order.
        learning_rate: of the step; the results of different rates are not comparable.
        k: rows per query.
        steps: how many steps on the same rows.
        second_moments: Adam's (`whence.second_moments`): steps are divided by `sqrt(v) + eps`. None: plain gradient descent.
        collate, device, batch_size: what makes a batch of rows (None: torch's `default_collate`), where the model is, rows per pass.
        resamples, seed: of the bootstrap over queries; the seed is also that of the order among equal scores.

    Raises:
        ConfigError: an option cannot be used. DataError: scores are not finite or do not fit. NumericalError: a measurement is
            not finite.
    """
    check_model_and_task(model, task)
    sizes = check_dataset(queries, "query"), check_dataset(train, "training")
    _check(orders, sizes, k, steps, learning_rate)
    check_resamples(resamples)
    scales = _scales(model, second_moments)
    batches = partial(iterate_batches, batch_size=batch_size, collate=collate, device=device)
    falls = {name: torch.empty(sizes[0], dtype=torch.float64) for name in orders}
    drawn = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    with _restored(model) as restore:
        before = [_measure(model, task, query, batches(queries, [query])) for query in range(sizes[0])]
        for name, scores in orders.items():
            for query, row in enumerate(scores.detach().cpu()):
                chosen = drawn[torch.sort(row[drawn], descending=True, stable=True).indices][:k].tolist()
                for _ in range(steps):
                    _step(model, task, batches(train, chosen), learning_rate / k, scales)
                falls[name][query] = before[query] - _measure(model, task, query, batches(queries, [query]))
                restore()
    return TailPatch(before=torch.tensor(before, dtype=torch.float64), falls=falls, k=k, resamples=resamples, seed=seed)


def _measure(model: nn.Module, task: Task, query: int, batches: Iterator[Batch]) -> float:
    """Return the measurement of a query, alone in its batch."""
    with torch.no_grad():
        measured = sum(float(task.measurement(model, batch.data).sum()) for batch in batches)
    if not math.isfinite(measured):
        raise NumericalError(f"the measurement of query {query} is {measured}. If a step made it so, give a lower learning_rate.")
    return measured


def _step(model: nn.Module, task: Task, batches: Iterator[Batch], rate: float, scales: Sequence[Tensor] | None) -> None:
    """Subtract `rate` times the gradient of the sum of the losses, times the scales."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in trained]
    for batch in batches:
        with torch.enable_grad():
            loss = task.loss(model, batch.data).sum()
            # Not backward: the user's gradients stay as they are.
            found = torch.autograd.grad(loss, trained, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
    with torch.no_grad():
        for place, (parameter, total) in enumerate(zip(trained, sums, strict=True)):
            parameter.sub_(rate * (total if scales is None else total * scales[place]))


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the model into eval mode; give a function that puts its weights back; leave it as it was found."""
    modes = {module: module.training for module in model.modules()}
    kept = [(tensor, tensor.detach().clone()) for tensor in [*model.parameters(), *model.buffers()]]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in kept:
            tensor.copy_(value)

    model.eval()
    try:
        yield restore
    finally:
        restore()
        for module, mode in modes.items():
            module.training = mode


def _scales(model: nn.Module, moments: Mapping[str, Tensor] | None) -> list[Tensor] | None:
    """Return what Adam multiplies a step by, for every parameter that requires a gradient."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("no parameter of the model requires a gradient, so no step can be taken. Call requires_grad_() on those to step.")
    if moments is None:
        return None
    for name, parameter in trained:
        if name not in moments or moments[name].shape != parameter.shape:
            have = f"shape {tuple(moments[name].shape)}" if name in moments else "none"
            raise ConfigError(f"second_moments of {name!r}: found {have}, expected {tuple(parameter.shape)}; give Adam's, of this model.")
    return [(moments[name].detach().to(parameter.device).sqrt() + EPS).reciprocal() for name, parameter in trained]


def _check(orders: Mapping[str, Tensor], sizes: tuple[int, int], k: int, steps: int, learning_rate: float) -> None:
    queries, rows = sizes
    if not 0 < k <= rows or steps < 1 or not 0 < learning_rate < math.inf:
        raise ConfigError(
            f"k={k}, steps={steps}, learning_rate={learning_rate}: give 1 to {rows} rows, 1 step or more, and a rate above 0."
        )
    if not orders:
        raise ConfigError("there is no order to test; give scores [query, train] by name.")
    for name, scores in orders.items():
        if tuple(scores.shape) != sizes or not torch.isfinite(scores).all():
            raise DataError(
                f"order {name!r} has shape {tuple(scores.shape)}; give finite scores [query, train] of {queries} queries and {rows} rows."
            )
