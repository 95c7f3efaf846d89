"""A look at model, task and data before long work: what results depend on, bad rows, layers off the batch's axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from whence.capture.passes import Rows
from whence.capture.recorder import Recorder
from whence.runtime.batches import Batch, iterate_batches
from whence.storage.run import fingerprint_model, fingerprint_rows, fingerprint_source
from whence.tasks import Task

FORMAT = 1
"""Raised when what a run folder holds changes its meaning; older folders are then refused by name."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was seen.

    Attributes:
        identity: format, model, task and layers: what every result depends on.
        data: fingerprint of each data set.
        unbatched: layers that are called without the batch's axis, such as those on position embeddings.
    """

    identity: dict[str, Any]
    data: dict[str, str]
    unbatched: list[str]


def survey(recorder: Recorder, rows: Rows, datasets: Mapping[str, Any]) -> Survey:
    """Run two rows forward, read every row of the data sets once, and leave out layers off the batch's axis.

    Raises:
        DataError: a row cannot be used. LayerError: the task differentiates the model itself.
    """
    task, model = recorder.task, recorder.model
    found = _options(task)
    with torch.no_grad():
        task.prepare(model, _batch(rows, rows.indices[:2]).data)
    data = {
        name: fingerprint_rows(dataset, inspect=lambda index, row: task.inspect_row(model, index, row))
        for name, dataset in datasets.items()
    }
    unbatched = _unbatched(recorder, rows)
    for name in unbatched:
        recorder.leave_out(name)
    identity = {
        "format": FORMAT,
        "model": fingerprint_model(model),
        "task": fingerprint_source(task),
        # What changes while the task is used is its state and no option.
        "task options": {name: value for name, value in _options(task).items() if found.get(name) == value},
        "layers": {layer.name: list(layer.shape) for layer in recorder.layers},
    }
    return Survey(identity=identity, data=data, unbatched=unbatched)


def _batch(rows: Rows, indices: Any) -> Batch:
    return next(iterate_batches(rows.dataset, indices, batch_size=2, collate=rows.collate, device=rows.device))


def _unbatched(recorder: Recorder, rows: Rows) -> list[str]:
    """Name the layers whose leading size is not the number of rows, and stays the same when one row becomes two."""
    first = rows.indices[0]
    (one, before), (two, after) = (recorder.survey(_batch(rows, indices)) for indices in ([first], [first, first]))
    return [name for name, sizes in after.items() if before.get(name) == sizes and (before[name], sizes) != ({one}, {two})]


def _options(task: Task) -> dict[str, str]:
    """Describe the task's public attributes; functions by their source, other objects by their type alone."""
    return {name: _described(value) for name, value in sorted(vars(task).items()) if not name.startswith("_")}


def _described(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_described(k)}: {_described(v)}' for k, v in value.items())}}}"
    if isinstance(value, nn.Module):
        return fingerprint_model(value)
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return fingerprint_source(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"
