"""Scores by blocks of training rows: each block is a shard, and a block that is there is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from whence.capture.passes import Rows
from whence.capture.tracking import TrackedLayer
from whence.runtime.progress import Stages
from whence.storage.shards import ShardStore

REACHED = "reached"
"""Key of a shard's `[layer]`: whether any row of the block gave the layer a gradient."""


def block_names(rows: Rows) -> dict[str, range]:
    """Return every block under its shard's name, in order."""
    return {f"rows-{block.start:09d}": block for block in rows.blocks()}


def missing_blocks(store: ShardStore, rows: Rows) -> dict[str, range]:
    """Return the blocks that the store does not hold."""
    return {name: block for name, block in block_names(rows).items() if name not in store.names}


def write_blocks(
    store: ShardStore,
    rows: Rows,
    stages: Stages,
    stage: str,
    compute: Callable[[range, Callable[[int], None]], dict[str, Tensor]],
) -> None:
    """Compute and write the missing blocks; `compute(block, advance)` returns a block's tensors."""
    write_missing(store, block_names(rows), stages, stage, compute)


def write_missing(
    store: ShardStore,
    shards: Mapping[str, range],
    stages: Stages,
    stage: str,
    compute: Callable[[range, Callable[[int], None]], dict[str, Tensor]],
) -> None:
    """Compute and write the shards that the store does not hold, given the places of their rows; else as `write_blocks`."""
    left = {name: places for name, places in shards.items() if name not in store.names}
    rows = sum(map(len, shards.values()))
    with stages.stage(stage), stages.track(rows, stage) as advance:
        advance(rows - sum(map(len, left.values())))
        for name, places in left.items():
            store.write(name, compute(places, advance))


def reached(layers: Iterable[TrackedLayer], names: set[str]) -> Tensor:
    """Return `[layer]`, one where the layer is among the names."""
    return torch.tensor([layer.name in names for layer in layers], dtype=torch.uint8)


def unreached(store: ShardStore, rows: Rows, layers: Iterable[TrackedLayer]) -> list[str]:
    """Name the layers that no row gave a gradient."""
    found = torch.stack([store.read(name)[REACHED] for name in block_names(rows)]).amax(0)
    return [layer.name for layer, any_ in zip(layers, found.tolist(), strict=True) if not any_]
