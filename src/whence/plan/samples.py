"""Batches that stand for all: what is run in a rehearsal, and how many rows of the data are like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from whence.capture.passes import Rows
from whence.runtime.batches import iterate_batches, row_blocks
from whence.runtime.memory import BatchSize

SAMPLED = 32
"""Batches that are collated to learn how wide rows are."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One batch: the rows' indices, and its width: numbers per row in its largest tensor, padding included."""

    indices: Sequence[int]
    width: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some of the batches of a pass, narrowest first, and how many there are in all."""

    rows: Rows
    loads: tuple[Load, ...]
    batches: int

    def typical(self) -> list[Load]:
        """Return the narrowest, the median and the widest batch, without those that are as wide as the next."""
        kept: list[Load] = []
        for place in (len(self.loads) - 1, len(self.loads) // 2, 0):
            if not kept or self.loads[place].width < 0.9 * kept[0].width:
                kept.insert(0, self.loads[place])
        return kept

    def shares(self, widths: Sequence[float]) -> list[float]:
        """Return the share of the rows that each of some increasing widths stands for, by linear interpolation."""
        totals, rows = [0.0] * len(widths), 0
        for load in self.loads:
            above = next((i for i, width in enumerate(widths) if width >= load.width), len(widths) - 1)
            below = max(0, above - 1) if widths[above] > load.width else above
            span = widths[above] - widths[below]
            part = min(1.0, max(0.0, (load.width - widths[below]) / span)) if span else 1.0
            totals[above] += part * len(load.indices)
            totals[below] += (1 - part) * len(load.indices)
            rows += len(load.indices)
        return [total / rows for total in totals]

    def part(self, load: Load, count: int) -> Rows:
        """Return that many rows of a batch, in one batch that is as wide: the widest rows first."""
        indices = sorted(load.indices, key=lambda index: -_width(self.rows, [index])) if count < len(load.indices) else load.indices
        chosen = [indices[i % len(indices)] for i in range(count)]
        return replace(self.rows, indices=chosen, batch_size=BatchSize(count, device=self.rows.device))


def sample(rows: Rows) -> Sample:
    """Collate evenly spaced batches of a pass.

    Raises:
        DataError: a row cannot be read, or rows cannot be collated.
    """
    batches = [
        [rows.indices[block[place]] for place in part] for block in rows.blocks() for part in row_blocks(len(block), rows.batch_size.rows)
    ]
    step = max(1, len(batches) / SAMPLED)
    chosen = [batches[int(i * step)] for i in range(min(SAMPLED, len(batches)))]
    loads = [Load(indices=indices, width=_width(rows, indices)) for indices in chosen]
    loads.sort(key=lambda load: (load.width, len(load.indices)))
    return Sample(rows=rows, loads=tuple(loads), batches=len(batches))


def _width(rows: Rows, indices: Sequence[int]) -> float:
    cpu = torch.device("cpu")
    batch = next(iterate_batches(rows.dataset, indices, batch_size=len(indices), collate=rows.collate, device=cpu))
    return _largest(batch.data) / len(indices)


def _largest(data: Any) -> int:
    if isinstance(data, Tensor):
        return data.numel()
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, list | tuple) else ()
    return max(map(_largest, parts), default=1)
