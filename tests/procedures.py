"""A procedure of training again whose answer is known, and a result as people see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

TRAIN = 12


@dataclass
class Additive:
    """Every row takes its value off a query's measurement; the seed alone adds noise; remembers what it was asked."""

    values: Tensor
    start: Tensor
    noise: float = 0.0
    stop_at: int | None = None
    calls: list[tuple[tuple[int, ...], int]] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"additive {self.values.tolist()} {self.start.tolist()} {self.noise}"

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((tuple(rows), seed))
        noise = torch.randn(len(self.start), generator=torch.Generator().manual_seed(seed)).double()
        return self.start - self.values[:, list(rows)].sum(1) + self.noise * noise

    def removed(self) -> list[tuple[int, ...]]:
        """The rows that each training lacked."""
        return [tuple(sorted(set(range(self.values.shape[1])) - set(rows))) for rows, _ in self.calls]


def additive(queries: int = 4, rows: int = TRAIN, **options: Any) -> Additive:
    values = torch.randn(queries, rows, generator=torch.Generator().manual_seed(3)).double()
    # Trained on all rows every query measures -1: right, by a little.
    return Additive(values, values.sum(1) - 1, **options)


def printed(result: Any) -> str:
    """Return the lines of a result's table."""
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as capture:
        console.print(result.table())
    return capture.get()
