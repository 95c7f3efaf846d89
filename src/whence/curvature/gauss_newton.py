"""The Gauss-Newton matrix of the tracked layers: a mean over rows of `sum over columns u u^T`, never held as a matrix.

A column `u` is the gradient of a scalar function of the outputs (`Task.columns`), so that a row's columns make up its exact
Fisher block; or of the loss with a label drawn from the model, which does so in expectation. Unlike the fitted curvature
this matrix knows how layers hang together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture.contract import working_set
from whence.capture.pair import IDENTITY, LayerGradient, Pair
from whence.capture.passes import Rows, sampled_loss_of
from whence.capture.recorder import ObjectiveOf, Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.basis import Damping, damping_amounts
from whence.errors import NumericalError
from whence.runtime.batches import Batch

FIRST_STREAM = 16
"""Streams of the noise below it belong to the fit."""

Vectors = dict[str, Tensor]
"""By layer: `[vector, group, out, in]`."""


@dataclass(frozen=True, kw_only=True)
class GaussNewton:
    """Products with the matrix over `rows`; `draws` labels per row, or every column if it is None."""

    recorder: Recorder
    rows: Rows
    draws: int | None
    seed: int

    def batches(self) -> Iterator[tuple[Batch, list[ObjectiveOf]]]:
        """Yield every batch with its columns' objectives."""
        for block in self.rows.blocks():
            for batch in self.rows.batches(block):
                yield batch, self._objectives(batch)

    def _objectives(self, batch: Batch) -> list[ObjectiveOf]:
        task = self.recorder.task
        if self.draws is not None:
            streams = range(FIRST_STREAM, FIRST_STREAM + self.draws)
            return [sampled_loss_of(task, seed=self.seed, stream=stream, device=self.rows.device) for stream in streams]
        with torch.no_grad():
            count = len(task.columns(self.recorder.model, batch.data))

        def column(number: int, batch: Batch) -> Callable[[nn.Module, Any], Tensor]:
            return lambda model, data: task.columns(model, data)[number]

        return [partial(column, number) for number in range(count)]

    @property
    def share(self) -> float:
        """What each column's outer product counts."""
        return 1.0 / (len(self.rows) * (self.draws or 1))

    def held(self, batch: Batch, objective: ObjectiveOf) -> dict[str, LayerGradient]:
        """Return the column's gradient of every layer that it reaches."""
        held: dict[str, LayerGradient] = {}

        def hold(layer: TrackedLayer, gradient: LayerGradient) -> None:
            held[layer.name] = gradient.take(slice(None)) if isinstance(gradient, Pair) else gradient

        self.recorder.run(batch, objective, hold)
        return held

    def product(self, vectors: Mapping[str, Tensor], advance: Callable[[int], None]) -> Vectors:
        """Return `H v` for every vector."""
        flat = {name: values.flatten(1) for name, values in vectors.items()}
        results = {name: torch.zeros_like(values, memory_format=torch.contiguous_format) for name, values in flat.items()}
        budget = working_set(self.rows.device.type)
        for batch, objectives in self.batches():
            for objective in objectives:
                found = {name: gradient for name, gradient in self.held(batch, objective).items() if name in vectors}
                along = torch.zeros(len(batch.ids), len(next(iter(flat.values()))), dtype=self.recorder.sums, device=self.rows.device)
                for name, gradient in found.items():
                    along += torch.cat([part.flatten(1) @ flat[name].mT for _, part in gradient.gradients(IDENTITY, budget)])
                for name, gradient in found.items():
                    for rows, part in gradient.gradients(IDENTITY, budget):
                        results[name].addmm_(along[rows].mT, part.flatten(1), alpha=self.share)
            advance(len(batch.ids))
        return {name: result.view(vectors[name].shape) for name, result in results.items()}

    def columns(self, advance: Callable[[int], None]) -> Vectors:
        """Return all columns, scaled so that `H = U^T U`: by layer `[column, group * out * in]`."""
        budget = working_set(self.rows.device.type)
        parts: dict[str, list[Tensor]] = {layer.name: [] for layer in self.recorder.taken}
        shapes = {layer.name: layer.shape for layer in self.recorder.taken}
        for batch, objectives in self.batches():
            for objective in objectives:
                found = self.held(batch, objective)
                for name, shape in shapes.items():
                    if name in found:
                        formed = torch.cat([part for _, part in found[name].gradients(IDENTITY, budget)])
                    else:
                        formed = torch.zeros(len(batch.ids), *shape, dtype=self.recorder.sums, device=self.rows.device)
                    parts[name].append(formed.flatten(1) * self.share**0.5)
            advance(len(batch.ids))
        return {name: torch.cat(parts.pop(name)) for name in shapes}

    def traces(self, advance: Callable[[int], None]) -> dict[str, float]:
        """Return the trace of each layer's own block."""
        budget = working_set(self.rows.device.type)
        sums = {layer.name: torch.zeros((), dtype=torch.float64) for layer in self.recorder.taken}
        for batch, objectives in self.batches():
            for objective in objectives:
                for name, gradient in self.held(batch, objective).items():
                    sums[name] += gradient.norms(budget).sum().double().cpu() * self.share
            advance(len(batch.ids))
        return {name: float(total) for name, total in sums.items()}


def absolute_damping(damping: float | Damping, traces: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return each layer's damping, relative to the mean eigenvalue `trace / size` of its block or of the whole matrix.

    Raises:
        NumericalError: it is zero, and the matrix has no inverse without damping.
    """
    amounts = damping_amounts(damping, traces, sizes)
    silent = [name for name, amount in amounts.items() if amount <= 0 and (traces.get(name) or isinstance(damping, float))]
    if silent:
        raise NumericalError(
            f"layer {silent[0]!r}: its damping is zero, and a Gauss-Newton matrix has no inverse without. Give a positive number."
        )
    # A layer that no column reaches weighs nothing, whatever it is damped with.
    return {name: amount if amount > 0 else float("inf") for name, amount in amounts.items()}
