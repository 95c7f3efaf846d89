"""A look at the model before long work: its output, and which layers are called on the batch's axis."""

from __future__ import annotations

from typing import Any

from whence.capture.passes import Rows
from whence.capture.recorder import Recorder
from whence.runtime.batches import iterate_batches


def sample(rows: Rows) -> Any:
    """Return the first two rows as a batch: with one row, an axis of size one could be the batch's or not."""
    batches = iterate_batches(rows.dataset, rows.indices[:2], batch_size=2, collate=rows.collate, device=rows.device)
    return next(batches).data


def leave_out_unbatched(recorder: Recorder, rows: Rows) -> list[str]:
    """Leave out layers that are called without the batch's axis, such as those on position embeddings; name them."""
    count, leading = recorder.survey(sample(rows))
    names = [name for name, sizes in leading.items() if count > 1 and sizes == {1}]
    for name in names:
        recorder.leave_out(name)
    return names
