"""Bytes of everything that lasts longer than a batch, from the layers' shapes.

`device` is where the model is; `host` is the CPU's memory beside it, zero where the device is the CPU itself and all of it
counts as `device`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn

from whence.capture.passes import BLOCK
from whence.capture.tracking import TrackedLayer
from whence.curvature.fit import CHECKPOINT_SECONDS
from whence.plan.asked import Asked
from whence.plan.work import Seen, form_of

DOUBLE = 8
CHECKED = 1.5
"""Bytes that looking for NaN takes, per byte that is looked at."""
BESIDE_TENSORS = 12 * 2**20
"""What a first run takes of the CPU's memory beside tensors: libraries, tables, files."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes on the device, and beside it on the CPU."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(device=self.device + other.device, host=self.host + other.host)

    @classmethod
    def most(cls, states: Iterable[Bytes]) -> Self:
        """Return the largest on either side."""
        both = list(states)
        return cls(device=max(one.device for one in both), host=max(one.host for one in both))


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(storages.values())


def covariance_numbers(layer: TrackedLayer, asked: Asked) -> int:
    """Count the sums that the first pass keeps of a layer."""
    if layer.alone is not None:
        return layer.parameters if asked.scaled else 0
    groups, outputs, inputs = layer.shape
    sides = layer.sides
    numbers = groups * (inputs ** (1 + sides.inputs) + outputs ** (1 + sides.outputs))
    return numbers + (groups if asked.scaled else 0)


def basis_numbers(layer: TrackedLayer, asked: Asked) -> int:
    """Count the numbers of a layer's eigenvectors."""
    (groups, outputs, inputs), sides = layer.shape, asked.sides(layer)
    return groups * (sides.inputs * inputs**2 + sides.outputs * outputs**2)


@dataclass(frozen=True, kw_only=True)
class State:
    """What lasts, for one set of layers.

    Attributes:
        layers: the tracked layers.
        asked: what is planned.
        itemsize: bytes of a number in sums, eigenvectors and scores.
        model: bytes of the model.
        on_cpu: whether the device is the CPU.
        offload: whether factors stay on the CPU.
        shared: bytes that layers with one input save by holding one tensor of eigenvectors.
        held: how each layer's queries were seen, by layer.
    """

    layers: Sequence[TrackedLayer]
    asked: Asked
    itemsize: int
    model: int
    on_cpu: bool
    offload: bool = False
    shared: float = 0.0
    held: Mapping[str, Seen]

    def _split(self, device: float, host: float = 0.0) -> Bytes:
        return Bytes(device=device + host) if self.on_cpu else Bytes(device=device, host=host)

    @property
    def covariances(self) -> int:
        """Numbers of the first pass's sums."""
        return sum(covariance_numbers(layer, self.asked) for layer in self.layers)

    @property
    def bases(self) -> int:
        """Bytes of all eigenvectors, each layer with its own."""
        return self.itemsize * sum(basis_numbers(layer, self.asked) for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers of one gradient over all layers, and of one curvature's eigenvalues."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def factors(self) -> int:
        """Bytes of the fitted factors on disk."""
        return self.bases + (self.itemsize * self.parameters if self.asked.weighed else 0)

    @property
    def residents(self) -> int:
        """Bytes of the preconditioned queries."""
        return round(sum(self.itemsize * self._resident(seen) for seen in self.held.values()))

    def _resident(self, seen: Seen) -> float:
        form, sizes, kept = form_of(seen, self.asked), seen.sizes, self.asked.kept
        if form == "sparse":
            ids = 2 * DOUBLE / self.itemsize
            return (seen.entries or 0.0) * self.asked.queries * (sizes.outputs + ids)
        if form == "pairs":
            return kept * sizes.pair
        if form == "low_rank":
            return kept * sizes.groups * (sizes.outputs + sizes.inputs) * (self.asked.request.query_rank or 0)
        return kept * sizes.weights

    @property
    def score_columns(self) -> int:
        """Score matrices that are kept: one, and one per layer if asked for."""
        return 1 + (len(self.layers) if self.asked.request.per_layer else 0)

    def score_bytes(self, rows: int, tokens: int = 0) -> int:
        """Bytes of the scores of so many training rows; `tokens` is the length of the token axis."""
        per_row = self.score_columns * self.asked.kept + (tokens * self.asked.kept if self.asked.request.per_token else 0)
        return self.itemsize * per_row * rows

    def fit_covariances(self, transient: float, seconds: float) -> Bytes:
        """Peak of the pass for covariances: sums of a block, totals in float64, and a batch."""
        numbers = self.covariances
        largest = max((max(layer.shape[0] * layer.shape[1] ** 2, layer.shape[0] * layer.shape[2] ** 2) for layer in self.layers), default=0)
        return self._accumulated(numbers, max(transient, CHECKED * self.itemsize * largest), seconds, base=self._resting)

    @property
    def _resting(self) -> Bytes:
        """The model, and what a run takes beside tensors."""
        return self._split(self.model, BESIDE_TENSORS)

    def _accumulated(self, numbers: int, transient: float, seconds: float, *, base: Bytes) -> Bytes:
        sums, totals = self.itemsize * numbers, DOUBLE * numbers
        before = totals if self.asked.fitted > BLOCK else 0
        peaks = [self._split(sums + transient, before), self._split(sums, totals)]
        if seconds > CHECKPOINT_SECONDS and self.asked.fitted > BLOCK:
            peaks.append(self._split(0, 3 * totals))  # unfinished sums, and the bytes of their file twice
        return base + Bytes.most(peaks)

    def decompositions(self) -> Bytes:
        """Peak of the eigendecompositions: sums that are left, and one layer's work in float64."""
        left = DOUBLE * self.covariances
        peaks = []
        for layer in self.layers:
            groups, outputs, inputs = layer.shape
            sides = self.asked.sides(layer)
            first, second = groups * inputs**2 * sides.inputs, groups * outputs**2 * sides.outputs
            # A matrix made symmetric, its eigenvectors, and the routine's own workspace of twice one matrix.
            solving = max(2 * first + 2 * first / groups, first + 2 * second + 2 * second / groups)
            product = 2 * layer.parameters if self.asked.scaled else 0
            written = first + second + product + self.itemsize * 3 * (first + second + product / 2) / DOUBLE
            left_here = left
            left -= DOUBLE * covariance_numbers(layer, self.asked)
            peaks += [self._split(DOUBLE * solving, left_here), self._split(DOUBLE * (first + second), left + DOUBLE * written)]
        return self._resting + Bytes.most([*peaks, Bytes()])

    def fit_eigenvalues(self, transient: float, seconds: float) -> Bytes:
        """Peak of the pass for eigenvalues: eigenvectors, sums and totals, and a batch."""
        bases = self._split(0 if self.on_cpu else self.bases - self.shared, self.bases)
        base = self._resting + bases
        running = self._accumulated(self.parameters, transient, seconds, base=base)
        values = self.itemsize * self.parameters
        return Bytes.most([running, base + self._split(0, DOUBLE * self.parameters + 3 * values)])

    def preconditioner(self) -> Bytes:
        """Eigenvectors and weights, as they rest."""
        home = self.bases - self.shared + (self.itemsize * self.parameters if self.asked.weighed else 0)
        return self._split(0, home) if self.offload else self._split(home)

    def preparing(self) -> Bytes:
        """Peak while weights are made of eigenvalues in float64, before the first batch."""
        if not self.asked.weighed:
            return self._resting
        values = self.itemsize * self.parameters
        doubled = DOUBLE * self.parameters
        narrowed = values if self.itemsize < DOUBLE else 0
        return self._resting + self._split(0, self.bases + values + doubled + narrowed)

    def query_gradients(self, transient: float) -> Bytes:
        """Peak while queries are preconditioned."""
        largest = self.itemsize * max((self._resident(seen) for seen in self.held.values()), default=0)
        running = self._resting + self.preconditioner() + self._split(self.residents + max(transient, CHECKED * largest))
        return Bytes.most([self.preparing(), running])

    def pairwise(self, transient: float, tokens: int = 0) -> Bytes:
        """Peak while training rows meet the queries, and while all scores are read at the end."""
        rows = 1 if self.asked.request.sums_rows else min(BLOCK, self.asked.train)
        block, whole = self.score_bytes(rows, tokens), self.score_bytes(1 if rows == 1 else self.asked.train, tokens)
        running = self._resting + self.preconditioner() + self._split(self.residents + block)
        peaks = [running + self._split(transient), running + self._split(0, 3 * block)]
        return Bytes.most([*peaks, self._resting + self._split(0, 2 * whole)])

    def self_influence(self, transient: float) -> Bytes:
        """Peak while rows meet themselves."""
        return Bytes.most([self.preparing(), self._resting + self.preconditioner() + self._split(transient)])
