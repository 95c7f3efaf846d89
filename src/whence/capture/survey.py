"""A look at model, task and data before long work: what results depend on, bad rows, layers off the batch's axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture.passes import Rows
from whence.capture.recorder import Recorder
from whence.capture.verify import strange_layers
from whence.errors import ConfigError
from whence.runtime.batches import Batch, iterate_batches
from whence.runtime.memory import is_out_of_memory
from whence.storage.run import fingerprint_model, fingerprint_rows, fingerprint_source, fingerprint_tensors
from whence.tasks import Task

FORMAT = 2
"""Raised when what a run folder holds changes its meaning; older folders are then refused by name."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was seen.

    Attributes:
        identity: format, model, task and layers: what every result depends on.
        data: fingerprint of each data set.
        left_out: layers that are left out, and why: called without the batch's axis, such as those on position embeddings, or
            of a class whose forward is not what its kind computes.
    """

    identity: dict[str, Any]
    data: dict[str, str]
    left_out: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a look at a model found: layers that are left out, and what the taps learned of the others."""

    left_out: dict[str, str]
    learned: Any


Known = dict[str, Looked]
"""What was found, by all that it depends on."""


def survey(recorder: Recorder, rows: Rows, datasets: Mapping[str, Any], *, lenient: bool = True, known: Known | None = None) -> Survey:
    """Run two rows forward, read every row of the data sets once, and leave out layers that cannot be taken.

    Args:
        recorder: the taps, installed.
        rows: rows to run forward.
        datasets: what is read.
        lenient: leave out a layer whose forward is not that of its kind; else it is an error.
        known: what was found before; is added to. Where the same model, weights included, is run on batches
            of the same form again, they are not looked for again: for a question to an index that is most of the time.

    Raises:
        DataError: a row cannot be used. ConfigError: two rows do not fit into memory.
        LayerError: the task differentiates the model itself, or a layer is not of its kind.
    """
    try:
        return _survey(recorder, rows, datasets, lenient, {} if known is None else known)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"out of memory with two rows: {str(error).splitlines()[0]} Free memory, shorten the rows, or use a larger machine."
        ) from error


def _survey(recorder: Recorder, rows: Rows, datasets: Mapping[str, Any], lenient: bool, known: Known) -> Survey:
    task, model = recorder.task, recorder.model
    found, batch = _options(task), _batch(rows, rows.indices[:2])
    with torch.no_grad():
        task.prepare(model, batch.data)
    data = {
        name: fingerprint_rows(dataset, inspect=lambda index, row: task.inspect_row(model, index, row))
        for name, dataset in datasets.items()
    }
    weights, source = fingerprint_model(model), fingerprint_source(task)
    depends = (
        weights,
        source,
        found,
        _form(batch.data),
        [(layer.name, layer.alone is None) for layer in recorder.layers],
        recorder.options,
        lenient,
    )
    if (key := repr(depends)) not in known:
        known[key] = Looked(left_out=_left_out(recorder, rows, batch, lenient), learned=recorder.taps.learned())
    left_out = known[key].left_out
    recorder.taps.recall(known[key].learned)
    for name in left_out:
        recorder.leave_out(name)
    identity = {
        "format": FORMAT,
        "model": weights,
        "task": source,
        # What changes while the task is used is its state and no option.
        "task options": {name: value for name, value in _options(task).items() if found.get(name) == value},
        "layers": {layer.name: list(layer.shape) for layer in recorder.layers},
        **({} if recorder.options.half is None else {"precision": recorder.options.precision}),
        **({"second moments": fingerprint_tensors(recorder.scales)} if recorder.scales else {}),
    }
    return Survey(identity=identity, data=data, left_out=dict(left_out))


def _left_out(recorder: Recorder, rows: Rows, batch: Batch, lenient: bool) -> dict[str, str]:
    """Return the layers that cannot be taken, with the reason; the recorder has left them out already."""
    left_out = recorder.taps.strangers if lenient else {}
    left_out |= dict.fromkeys(_unbatched(recorder, rows, lenient), "called without the batch's axis")
    for name in left_out:
        recorder.leave_out(name)
    return left_out | strange_layers(recorder, batch, lenient=lenient)


def _form(data: Any) -> str:
    """Describe the keys, types and axes of a batch, but no sizes."""
    if isinstance(data, Tensor):
        return f"{data.dtype}[{data.dim()}]"
    if isinstance(data, Mapping):
        return f"{{{', '.join(f'{key}: {_form(value)}' for key, value in data.items())}}}"
    if isinstance(data, list | tuple):
        return f"[{', '.join(map(_form, data))}]"
    return type(data).__qualname__


def _batch(rows: Rows, indices: Any) -> Batch:
    return next(iterate_batches(rows.dataset, indices, batch_size=2, collate=rows.collate, device=rows.device))


def _unbatched(recorder: Recorder, rows: Rows, lenient: bool) -> list[str]:
    """Name the layers whose leading size is not the number of rows, and stays the same when one row becomes two."""
    first = rows.indices[0]
    (one, before), (two, after) = (recorder.survey(_batch(rows, indices), lenient=lenient) for indices in ([first], [first, first]))
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
