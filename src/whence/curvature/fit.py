"""Fit the curvature: covariances, eigendecompositions, eigenvalues; resumed where an earlier run was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import IDENTITY, Basis, LayerGradient
from whence.capture.passes import Rows, all_finite, finished, loss_of, raise_not_finite, run_block, sampled_loss_of
from whence.capture.recorder import ObjectiveOf, Recorder
from whence.capture.tracking import TrackedLayer
from whence.curvature.basis import LayerCurvature, eigenbasis, share_equal
from whence.curvature.strategies import get_strategy
from whence.runtime.progress import Stages
from whence.storage.shards import ShardStore

CHECKPOINT_SECONDS = 30.0
"""Least time between two saves of unfinished sums. It changes no result: sums are the same wherever they resume."""

Sums = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Fitter:
    """One fit: what to run, on which rows, where to keep it."""

    recorder: Recorder
    rows: Rows
    strategy: str
    empirical: bool
    seed: int
    store: ShardStore
    stages: Stages

    def fit(self) -> None:
        """Run the passes that the strategy needs and leave the result in the store."""
        strategy = get_strategy(self.strategy)
        if strategy.eigenbasis:
            self._fit_bases(scaled=strategy.eigenvalues == "product")
        if strategy.eigenvalues == "moment" and "eigenvalues" not in self.store.names:
            self._fit_eigenvalues(load_curvature(self.store, self.recorder.layers))

    def _fit_bases(self, *, scaled: bool) -> None:
        wanted = [f"basis-{number:04d}" for number in range(len(self.recorder.layers))]
        if set(wanted) <= set(self.store.names):
            return
        consume = partial(add_covariances, scaled=scaled, budget=working_set(self.rows.device.type))
        with self.stages.stage("Fit covariances"):
            sums = self._accumulate("covariances", consume, stream=0)
        with self.stages.stage("Eigendecompositions"), self.stages.track(len(wanted), "Eigendecompositions") as advance:
            for shard, layer in zip(wanted, self.recorder.layers, strict=True):
                if shard not in self.store.names:
                    self.store.write(shard, self._decomposed(layer, sums, scaled=scaled))
                advance(1)
        self._forget("covariances")

    def _decomposed(self, layer: TrackedLayer, sums: Sums, *, scaled: bool) -> Sums:
        """Return the layer's eigenvectors and, for `scaled`, its eigenvalues; nothing if no gradient reached it."""
        kept = self.recorder.sums
        if f"{layer.name}/moments" in sums:  # no sides: the diagonal is all there is
            return {"eigenvalues": (sums.pop(f"{layer.name}/moments") / len(self.rows)).to(kept)}
        if f"{layer.name}/count" not in sums:
            return {"eigenvalues": torch.zeros(layer.shape)} if scaled else {}
        count = sums[f"{layer.name}/count"]
        # Taken out of the sums, so that a layer's covariances go as its eigenvectors come.
        values_in, inputs = self._side(sums.pop(f"{layer.name}/inputs").div_(count))
        values_out, outputs = self._side(sums.pop(f"{layer.name}/outputs").div_(count))
        tensors = {side: q.to("cpu", kept) for side, q in (("inputs", inputs), ("outputs", outputs)) if q is not None}
        if scaled:
            product = values_out[:, :, None] * values_in[:, None, :]
            norms = (sums[f"{layer.name}/norms"] / len(self.rows)).to(product.device)
            scale = norms / product.sum((1, 2)).clamp(min=torch.finfo(product.dtype).tiny)
            tensors["eigenvalues"] = (product * scale[:, None, None]).to("cpu", kept)
        return tensors

    def _side(self, covariance: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return eigenvalues and eigenvectors; of a side that has only a diagonal `[group, n]`, that and none."""
        if covariance.dim() == 2:
            return covariance.to(self.rows.device), None
        return eigenbasis(covariance.to(self.rows.device))

    def _fit_eigenvalues(self, fitted: dict[str, LayerCurvature]) -> None:
        kept = self.recorder.sums
        bases = share_equal({name: layer.basis.to(self.rows.device, kept) for name, layer in fitted.items()})
        consume = partial(add_moments, bases=bases, budget=working_set(self.rows.device.type))
        with self.stages.stage("Fit eigenvalues"):
            sums = self._accumulate("moments", consume, stream=1)
        values = {layer.name: sums.get(layer.name, torch.zeros(layer.shape)).div(len(self.rows)).to(kept) for layer in self.recorder.layers}
        self.store.write("eigenvalues", values)
        self._forget("moments")

    def _forget(self, name: str) -> None:
        """Drop unfinished sums that have become a result."""
        if name in self.store.names:
            self.store.remove(name)

    def _accumulate(self, name: str, consume: Callable[[Sums, TrackedLayer, LayerGradient], None], *, stream: int) -> Sums:
        """Sum over all rows: within a block in the compute type, over blocks in float64 on the CPU."""
        totals = dict(self.store.read(name)) if name in self.store.names else {}
        done = int(totals.pop("blocks done", torch.zeros(())))
        blocks, objective, saved = self.rows.blocks(), self._objective(stream), time.monotonic()
        with self.stages.track(len(self.rows), f"Fit {name}") as advance:
            advance(sum(len(block) for block in blocks[:done]))
            for number, block in enumerate(blocks[done:], start=done + 1):
                for key, value in self._block_sums(name, consume, block, objective, advance).items():
                    totals[key] = totals[key].add_(value.cpu()) if key in totals else value.double().cpu()
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self.store.write(name, {**totals, "blocks done": torch.tensor(number)})
                    saved = time.monotonic()
        return totals

    def _block_sums(
        self,
        name: str,
        consume: Callable[[Sums, TrackedLayer, LayerGradient], None],
        block: range,
        objective: ObjectiveOf,
        advance: Callable[[int], None],
    ) -> Sums:
        """Sum over one block in the compute type."""

        def compute() -> Sums:
            sums: Sums = {}
            run_block(self.recorder, self.rows, block, objective, lambda _: partial(consume, sums), advance)
            return sums

        return finished(
            self.recorder,
            self.rows,
            compute,
            all_finite,
            lambda: raise_not_finite(self.recorder, self.rows, block, objective, f"Fit {name}"),
        )

    def _objective(self, stream: int) -> ObjectiveOf:
        if self.empirical:
            return loss_of(self.recorder.task)
        return sampled_loss_of(self.recorder.task, seed=self.seed, stream=stream, device=self.rows.device)


def load_curvature(store: ShardStore, layers: list[TrackedLayer]) -> dict[str, LayerCurvature]:
    """Read what a fit left in a store."""
    moments = store.read("eigenvalues") if "eigenvalues" in store.names else {}
    curvature: dict[str, LayerCurvature] = {}
    for number, layer in enumerate(layers):
        shard = f"basis-{number:04d}"
        tensors = store.read(shard) if shard in store.names else {}
        basis = Basis(inputs=tensors.get("inputs"), outputs=tensors.get("outputs"))
        eigenvalues = moments.get(layer.name, tensors.get("eigenvalues"))
        curvature[layer.name] = LayerCurvature(basis=basis, eigenvalues=eigenvalues)
    return curvature


def unfitted(store: ShardStore, layers: list[TrackedLayer]) -> list[str]:
    """Name the layers whose fitted eigenvalues are all zero: no gradient came to them from any row."""
    if "eigenvalues" in store.names:
        moments = store.read("eigenvalues")
        return [layer.name for layer in layers if not moments[layer.name].any()]
    shards = {layer.name: f"basis-{number:04d}" for number, layer in enumerate(layers)}
    return [name for name, shard in shards.items() if not store.read(shard)["eigenvalues"].any()]


def _add(sums: Sums, key: str, value: Tensor) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


def add_covariances(sums: Sums, layer: TrackedLayer, gradient: LayerGradient, *, scaled: bool, budget: int) -> None:
    """Add a batch's covariances of a layer and, for `scaled`, its squared norms; of a layer without sides its moments."""
    if layer.alone is not None:
        if scaled:
            _add(sums, f"{layer.name}/moments", gradient.sum_of_squares(IDENTITY, budget))
        return
    inputs, outputs, count = gradient.covariances(layer.sides)
    _add(sums, f"{layer.name}/inputs", inputs)
    _add(sums, f"{layer.name}/outputs", outputs)
    _add(sums, f"{layer.name}/count", count.double())
    if scaled:
        _add(sums, f"{layer.name}/norms", gradient.norms(budget).sum(0))


def add_moments(sums: Sums, layer: TrackedLayer, gradient: LayerGradient, *, bases: dict[str, Basis], budget: int) -> None:
    """Add a batch's squared gradients of a layer, in its basis."""
    _add(sums, layer.name, gradient.sum_of_squares(bases[layer.name], budget))
