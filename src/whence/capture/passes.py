"""Passes over a data set: fixed blocks of rows, checked for NaN once per block, so that nothing waits per batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from whence.capture.formed import Formed
from whence.capture.pair import LayerGradient
from whence.capture.recorder import Objective, ObjectiveOf, Recorder
from whence.capture.state import Consumer
from whence.capture.tracking import TrackedLayer
from whence.errors import ConfigError, NumericalError
from whence.runtime.batches import Batch, iterate_batches, row_blocks
from whence.runtime.memory import BatchSize, is_out_of_memory
from whence.runtime.noise import KeyedNoise
from whence.tasks import Task

BLOCK = 256
"""Rows per block. Sums are closed, checked, saved and resumed at block ends, whatever the batch size."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a data set, by index, and how they are put into batches."""

    dataset: Any
    indices: Sequence[int]
    batch_size: BatchSize
    collate: Callable[[list[Any]], Any] | None
    device: torch.device

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.indices)

    def blocks(self) -> list[range]:
        """Return the blocks, as ranges of places in `indices`."""
        return list(row_blocks(len(self.indices), BLOCK))

    def batches(self, block: range) -> Iterator[Batch]:
        """Yield the batches of a block."""
        indices = [self.indices[i] for i in block]
        yield from iterate_batches(self.dataset, indices, batch_size=self.batch_size.rows, collate=self.collate, device=self.device)


def draw_rows(rows: int, max_examples: int | None, *, seed: int) -> list[int]:
    """Return the indices of all rows, or of `max_examples` drawn with the seed; not the first, since data are often sorted.

    Raises:
        ConfigError: `max_examples` is less than one.
    """
    if max_examples is not None and max_examples < 1:
        raise ConfigError(f"max_examples={max_examples} cannot be used; give 1 or more, or None for all rows.")
    if max_examples is None or max_examples >= rows:
        return list(range(rows))
    return sorted(random.Random(seed).sample(range(rows), max_examples))


def loss_of(task: Task) -> ObjectiveOf:
    """Return the training loss with the data's labels."""
    return lambda batch: task.loss


def measurement_of(task: Task) -> ObjectiveOf:
    """Return the task's measurement."""
    return lambda batch: task.measurement


def sampled_loss_of(task: Task, *, seed: int, stream: int, device: torch.device) -> ObjectiveOf:
    """Return the loss with labels drawn from the model, by noise keyed with (seed, stream, example id)."""

    def objective(batch: Batch) -> Objective:
        def sampled(model: nn.Module, data: Any) -> Tensor:
            # Made anew at each call: a batch that must be run again draws the same labels again.
            return task.sampled_loss(model, data, KeyedNoise(seed=seed, stream=stream, ids=batch.ids, device=device))

        return sampled

    return objective


def run_block(
    recorder: Recorder,
    rows: Rows,
    block: range,
    objective: ObjectiveOf,
    consumer_for: Callable[[int], Consumer],
    advance: Callable[[int], None],
    *,
    first: int = 0,
    before: Callable[[Batch], None] | None = None,
) -> None:
    """Run the batches of a block; `consumer_for(place)` gets the place of a batch's first row, counted from `first`.

    `before(batch)` is called ahead of each batch's run.
    """
    place = first
    try:
        for batch in rows.batches(block):
            if before is not None:
                before(batch)
            recorder.run(batch, objective, consumer_for(place))
            place += len(batch.ids)
            advance(len(batch.ids))
    except BaseException:
        advance(first - place)  # the block will be run again, if at all
        raise


Result = TypeVar("Result")


def finished(
    recorder: Recorder, rows: Rows, compute: Callable[[], Result], finite: Callable[[Result], bool], explain: Callable[[], None]
) -> Result:
    """Return what `compute()` returns, computed once more after what a smaller batch or loss scale can mend.

    `compute` starts from nothing each time, so that no half-done sum is kept. Out of memory, an automatic batch size is
    halved; with float16, overflow lowers the loss scale. Where neither helps, `explain()` raises the error.

    Raises:
        ConfigError: out of memory, at a batch size that was given or at one row. What `explain` raises.
    """
    while True:
        try:
            result = compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows.batch_size.halve(error)
            continue
        if finite(result):
            return result
        if recorder.loss_scale <= recorder.least_loss_scale:
            explain()
            raise AssertionError("explain() raises")
        recorder.loss_scale /= 16


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(torch.isfinite(values).all()) for values in tensors.values())


def raise_not_finite_anywhere(recorder: Recorder, rows: Rows, objective: ObjectiveOf, stage: str) -> None:
    """As `raise_not_finite`, for all blocks in turn.

    Raises:
        NumericalError: always.
    """
    for block in rows.blocks():
        raise_not_finite(recorder, rows, block, objective, stage, last=block.stop == len(rows))


def raise_not_finite(recorder: Recorder, rows: Rows, block: range, objective: ObjectiveOf, stage: str, *, last: bool = True) -> None:
    """Run a block again, watching every layer, and say where NaN or infinity first appears.

    Raises:
        NumericalError: with the layer, the stage and the example ids; without them if it is nowhere and the block is the `last`.
    """
    for batch in rows.batches(block):
        found: list[str] = []
        bad = torch.zeros(len(batch.ids), dtype=torch.bool)

        def watch(layer: TrackedLayer, x: Tensor, output: Tensor, found: list[str] = found, bad: Tensor = bad) -> None:
            if not found and not torch.isfinite(output).all():
                source = "its output is" if torch.isfinite(x).all() else "its input is already"
                found.append(f"layer {layer.name!r}: {source} NaN or infinite")
                _mark(bad, output)

        def gradients(layer: TrackedLayer, pair: LayerGradient, found: list[str] = found, bad: Tensor = bad) -> None:
            g = pair.gradient if isinstance(pair, Formed) else pair.g  # type: ignore[attr-defined]
            if not found and not torch.isfinite(g).all():
                found.append(f"layer {layer.name!r}: the gradient of its output is NaN or infinite")
                _mark(bad, g)

        recorder.taps.observers.append(watch)
        try:
            losses = recorder.run(batch, objective, gradients)
        finally:
            recorder.taps.observers.clear()
        if not found and not torch.isfinite(losses).all():
            found.append("no layer, but the loss: it is NaN or infinite")
            _mark(bad, losses)
        if found:
            ids = [i for i, wrong in zip(batch.ids, bad.tolist(), strict=True) if wrong]
            shown = ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")
            raise NumericalError(
                f"{stage}: {found[0]} for example ids {shown}. Look at these rows and at the layer's weights; "
                "drop or mend the rows, or load a checkpoint without NaN."
            )
    if not last:
        return
    raise NumericalError(
        f"{stage}: sums over rows {block.start} to {block.stop - 1} overflowed although every gradient is finite. "
        "Scale the loss down or compute in float64."
    )


def _mark(bad: Tensor, values: Tensor) -> None:
    """Mark the examples whose values are not finite; all of them if rows are not examples."""
    if len(values) == len(bad):
        bad |= ~torch.isfinite(values).flatten(1).all(1).cpu() if values.dim() > 1 else ~torch.isfinite(values).cpu()
    else:
        bad |= True
