"""Rows that are one vector: all numbers, leading eigenvectors or random directions on both sides, or a sketch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whence.capture.contract import working_set
from whence.capture.pair import Basis, LayerGradient
from whence.errors import ConfigError
from whence.index.balance import Balance
from whence.index.encoding import decode, encode, numbers_in, vector_bytes
from whence.index.projection import Kind, RowSettings, Tensors

VALUES, SCALES = "values", "scales"
_SCALE_BYTES = 4
_CHUNK_NUMBERS = 2**25
"""Numbers that are decoded at a time when rows meet queries: 128 MiB."""


class Part(Protocol):
    """One layer's part of a row."""

    @property
    def size(self) -> int:
        """Numbers of a row."""
        ...

    def of_rows(self, gradient: LayerGradient) -> Tensor:
        """Return the part of training rows, `[example, size]`."""
        ...

    def of_queries(self, values: Tensor) -> Tensor:
        """Return the part of queries, given P `[query, group, out, in]`: `[query, size]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TwoSided:
    """`R_out^T Z R_in`, with directions in columns: `outputs` `[group, out, k]`, `inputs` `[group, in, k]`; None: all."""

    rows: Basis
    outputs: Tensor | None
    inputs: Tensor | None
    shape: tuple[int, int, int]
    working_set: int

    @classmethod
    def make(cls, balance: Balance, shape: tuple[int, int, int], outputs: Tensor | None, inputs: Tensor | None) -> TwoSided:
        """Take directions into the basis of the rows, so that what is not kept is never computed."""

        def joined(q: Tensor | None, r: Tensor | None) -> Tensor | None:
            return q if r is None else r if q is None else q @ r

        rows = Basis(outputs=joined(balance.rows.outputs, outputs), inputs=joined(balance.rows.inputs, inputs))
        k_out, k_in = (size if r is None else r.shape[-1] for size, r in zip(shape[1:], (outputs, inputs), strict=True))
        budget = working_set(balance.like.device.type)
        return cls(rows=rows, outputs=outputs, inputs=inputs, shape=(shape[0], k_out, k_in), working_set=budget)

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return math.prod(self.shape)

    def of_rows(self, gradient: LayerGradient) -> Tensor:
        """Return the part of training rows."""
        return torch.cat([part.flatten(1) for _, part in gradient.gradients(self.rows, self.working_set)])

    def of_queries(self, values: Tensor) -> Tensor:
        """Return the part of queries."""
        return Basis(outputs=self.outputs, inputs=self.inputs).rotate(values).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """Each coordinate of Z is added to, or taken from, one number drawn for it (Charikar et al., 2002)."""

    rows: Basis
    places: Tensor
    signs: Tensor
    size: int
    working_set: int

    @classmethod
    def make(cls, balance: Balance, shape: tuple[int, int, int], size: int, generator: torch.Generator) -> Sketch:
        """Draw places and signs: nine bytes for every coordinate, on the gradients' device."""
        numbers, device = math.prod(shape), balance.like.device
        places = torch.randint(size, (numbers,), generator=generator)
        signs = torch.randint(2, (numbers,), generator=generator).to(torch.int8) * 2 - 1
        budget = working_set(device.type)
        return cls(rows=balance.rows, places=places.to(device), signs=signs.to(device), size=size, working_set=budget)

    def of_rows(self, gradient: LayerGradient) -> Tensor:
        """Return the part of training rows."""
        return torch.cat([self.of_queries(part) for _, part in gradient.gradients(self.rows, self.working_set)])

    def of_queries(self, values: Tensor) -> Tensor:
        """Return the part of queries."""
        flat = values.flatten(1)
        return flat.new_zeros(len(flat), self.size).index_add_(1, self.places, flat * self.signs)


@dataclass(frozen=True, kw_only=True)
class DenseRows:
    """A projection whose rows are `values` `[row, number]` with `scales` `[row, layer]`."""

    parts: Mapping[str, Part]
    settings: RowSettings

    def batch(self, examples: int) -> DenseBatch:
        """Begin a batch."""
        return DenseBatch(projection=self, examples=examples, found={})

    def join(self, parts: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Return parts as one."""
        return {key: torch.cat([part[key] for part in parts]) for key in (VALUES, SCALES)}

    def at(self, rows: Tensors, places: Tensor) -> dict[str, Tensor]:
        """Return the rows at some places."""
        return {key: rows[key][places] for key in (VALUES, SCALES)}

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(vector_bytes(part.size, self.settings.number_type) + _SCALE_BYTES for part in self.parts.values())

    def hold(self, queries: int) -> Tensor:
        """Return the queries' numbers `[query, number]`, all zero."""
        return torch.zeros(queries, sum(part.size for part in self.parts.values()))

    def fill(self, held: Tensor, layer: str, first: int, values: Tensor) -> None:
        """Take a layer's part of some queries."""
        start = sum(part.size for part in itertools.takewhile(lambda part: part is not self.parts[layer], self.parts.values()))
        held[first : first + len(values), start : start + self.parts[layer].size] = self.parts[layer].of_queries(values)

    def scores(self, rows: Tensors, held: Tensor, examples: int) -> Tensor:
        """Return products of rows with queries."""
        result = torch.zeros(examples, len(held))
        chunk = max(1, _CHUNK_NUMBERS // max(1, held.shape[1]))
        for start in range(0, examples, chunk):
            some = slice(start, start + chunk)
            torch.mm(self.numbers(rows, some), held.mT, out=result[some])
        return result

    def numbers(self, rows: Tensors, some: slice = slice(None)) -> Tensor:
        """Return stored rows as float32 `[row, number]`."""
        dtype, sizes = self.settings.number_type, [part.size for part in self.parts.values()]
        values, scales = rows[VALUES][some], rows[SCALES][some]
        if not dtype.startswith("int"):
            return values.float()
        parts = values.split([vector_bytes(size, dtype) for size in sizes], dim=1)
        return torch.cat(
            [decode(part, dtype, size).mul_(scale) for part, size, scale in zip(parts, sizes, scales.split(1, dim=1), strict=True)],
            dim=1,
        )


@dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """A batch of such rows."""

    projection: DenseRows
    examples: int
    found: dict[str, Tensor]

    def add(self, layer: str, gradient: LayerGradient) -> None:
        """Take in a layer's gradients."""
        self.found[layer] = self.projection.parts[layer].of_rows(gradient).float().cpu()

    def close(self) -> dict[str, Tensor]:
        """Return the batch's rows."""
        dtype = self.projection.settings.number_type
        encoded = [
            encode(self.found.get(name, torch.zeros(self.examples, part.size)), dtype) for name, part in self.projection.parts.items()
        ]
        return {VALUES: torch.cat([values for values, _ in encoded], dim=1), SCALES: torch.stack([scale for _, scale in encoded], dim=1)}


def least_bytes(shapes: Mapping[str, tuple[int, int, int]], settings: RowSettings) -> int:
    """Return the bytes of a row that has one number of each layer."""
    return len(shapes) * (vector_bytes(1, settings.number_type) + _SCALE_BYTES)


def dense_rows(
    balances: Mapping[str, Balance],
    energies: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[int, int, int]],
    settings: RowSettings,
    one_hot: Collection[str],
) -> DenseRows:
    """Share a row's bytes among the layers by their sizes, and make each layer's part."""
    total = sum(map(math.prod, shapes.values()))
    scales = _SCALE_BYTES * len(shapes)
    share = numbers_in(max(0, int(4 * total * settings.keep) - scales), settings.number_type) / total
    parts: dict[str, Part] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        kind = settings.projection
        # Groups of a normalisation are too small to project one by one, and one-hot inputs are held sparsely: only their outputs rotate.
        if kind != "none" and (shape[0] > 1 or name in one_hot):
            kind = "sjlt"
        parts[name] = _part(kind, balances[name], energies.get(name), shape, share, generator, name)
    return DenseRows(parts=parts, settings=settings)


def _part(
    kind: Kind,
    balance: Balance,
    energy: Tensor | None,
    shape: tuple[int, int, int],
    share: float,
    generator: torch.Generator,
    name: str,
) -> Part:
    if kind == "none" or share >= 1:
        return TwoSided.make(balance, shape, None, None)
    groups, outputs, inputs = shape
    if kind == "sjlt":
        return Sketch.make(balance, shape, max(1, int(math.prod(shape) * share)), generator)
    k_in = min(inputs, max(1, round(inputs * math.sqrt(share))))
    k_out = min(outputs, max(1, int(outputs * inputs * share / k_in)))
    if kind == "kronecker":
        r_out = torch.randn(groups, outputs, k_out, generator=generator) / math.sqrt(k_out)
        r_in = torch.randn(groups, inputs, k_in, generator=generator) / math.sqrt(k_in)
        return TwoSided.make(balance, shape, r_out.to(balance.like), r_in.to(balance.like))
    if energy is None:
        raise ConfigError(
            f"projection='pca' takes eigenvectors, and layer {name!r} has none with this strategy. Use 'ekfac' or 'kfac', or 'factors'."
        )
    return TwoSided.make(balance, shape, _leading(energy.sum(2), k_out), _leading(energy.sum(1), k_in))


def _leading(energy: Tensor, k: int) -> Tensor:
    """Return unit vectors `[group, n, k]` of the coordinates with most energy `[group, n]`, in their order."""
    places = torch.sort(energy, dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return torch.nn.functional.one_hot(places, energy.shape[1]).mT.to(energy)
