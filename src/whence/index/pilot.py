"""How the bytes of factor rows are best spent, found out on a few of the rows: on how many coordinates, and in how many bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from whence.capture.pair import LayerGradient
from whence.capture.passes import Rows, finished, loss_of, run_block
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer
from whence.index.factors import FactorBatch, FactorRows

ROWS = 8


def best_spent(recorder: Recorder, rows: Rows, candidates: Sequence[FactorRows]) -> FactorRows:
    """Return the candidate that keeps most of the energy of a few rows, each row counting the same."""
    if len(candidates) == 1:
        return candidates[0]
    step = max(1, len(rows) // ROWS)
    few = replace(rows, indices=rows.indices[::step][:ROWS])
    worth = finished(recorder, few, partial(_worth, recorder, few, candidates), lambda found: True, lambda: None)
    shares = worth / worth.amax(0).clamp(min=torch.finfo(worth.dtype).tiny)
    return candidates[int(shares.mean(1).argmax())]


def _worth(recorder: Recorder, rows: Rows, candidates: Sequence[FactorRows]) -> Tensor:
    """Return the energy that each candidate keeps of each row, `[candidate, row]`."""
    open_: list[FactorBatch] = []
    found: list[Tensor] = []

    def close() -> None:
        if open_:
            found.append(torch.stack([batch.worth() for batch in open_]))

    def begin(examples: int) -> None:
        close()
        open_[:] = [candidate.batch(examples) for candidate in candidates]

    def consume(first: int, layer: TrackedLayer, gradient: LayerGradient) -> None:
        for batch in open_:
            batch.add(layer.name, gradient)

    place: Callable[[int], partial[None]] = lambda first: partial(consume, first)  # noqa: E731
    for block in rows.blocks():
        run_block(recorder, rows, block, loss_of(recorder.task), place, lambda n: None, before=lambda batch: begin(len(batch.ids)))
    close()
    return torch.cat(found, dim=1)
