"""Rows of the cases and how they are collated into batches. Padding is filled with rubbish, so that reading it shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TRAIN, QUERIES = 13, 4


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Correlated, off-centre numbers: a plain Gaussian would hide a forgotten rotation or mean."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2.0, shape[-1], dtype=torch.float64) if shape else 1.0
    return x * scale + 0.3 * x.roll(1, -1) + 0.2 if shape else x


def integer(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def labelled(generator: torch.Generator, count: int, *, shape: Sequence[int], classes: int = 3) -> list:
    """Rows (x, label)."""
    return [(normal(generator, *shape), int(integer(generator, classes))) for _ in range(count)]


def targeted(generator: torch.Generator, count: int, *, shape: Sequence[int], out: Sequence[int]) -> list:
    """Rows (x, y) for regression."""
    return [(normal(generator, *shape), normal(generator, *out)) for _ in range(count)]


def pairs(generator: torch.Generator, count: int) -> list:
    return [(normal(generator, 4), normal(generator, 4)) for _ in range(count)]


def gated(generator: torch.Generator, count: int) -> list:
    """The gate is shut in rows 5 to 9 and for the last query, so no batch (5 rows, 3 queries) mixes open and shut."""
    rows = labelled(generator, count, shape=(4,))
    shut = range(5, 10) if count == TRAIN else range(3, 4)
    for index, (x, _) in enumerate(rows):
        x[0] = -x[0].abs() if index in shut else x[0].abs()
    return rows


def groups(generator: torch.Generator, count: int) -> list:
    """Rows of one to four sub-rows, each with a label of its own."""
    sizes = [1 + (3 * index + 1) % 4 for index in range(count)]
    return [(normal(generator, size, 4), integer(generator, 3, size)) for size in sizes]


def sequences(generator: torch.Generator, count: int) -> list:
    """Rows of two to five positions with a label for each and one for all."""
    lengths = [2 + (3 * index + 1) % 4 for index in range(count)]
    return [
        {"x": normal(generator, n, 4), "y": normal(generator, 1 + n % 3, 4), "tags": integer(generator, 3, n), "labels": n % 3}
        for n in lengths
    ]


# ---------------------------------------------------------------------------------------------- collation


def collate_groups(rows: list) -> dict:
    """Put all sub-rows into one batch, in an order that interleaves the examples."""
    x, labels = torch.cat([x for x, _ in rows]), torch.cat([labels for _, labels in rows])
    ids = torch.cat([torch.full((len(part),), index) for index, (part, _) in enumerate(rows)])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))
    return {"x": x[order], "labels": labels[order], "ids": ids[order], "count": len(rows)}


def collate_packed(rows: list) -> dict:
    """Pack sequences end to end into rows of six tokens; an example may run over into the next row. Padding holds rubbish."""
    tokens, labels = torch.cat([row["x"] for row in rows]), torch.cat([row["tags"] for row in rows])
    ids = torch.cat([torch.full((len(row["x"]),), index) for index, row in enumerate(rows)])
    missing = -len(ids) % 6
    tokens = torch.cat([tokens, torch.full((missing, 4), 7.0, dtype=tokens.dtype)])
    labels, ids = torch.cat([labels, torch.full((missing,), -100)]), torch.cat([ids, torch.full((missing,), -1)])
    return {"x": tokens.view(-1, 6, 4), "labels": labels.view(-1, 6), "ids": ids.view(-1, 6), "count": len(rows)}


def padded(values: list[Tensor], filler: float, extra: int = 0) -> Tensor:
    longest = max(map(len, values)) + extra
    return torch.stack([torch.cat([v, v.new_full((longest - len(v), *v.shape[1:]), filler)]) for v in values])


def mask_of(values: list[Tensor], extra: int = 0) -> Tensor:
    return padded([torch.ones(len(value), dtype=torch.float64) for value in values], 0.0, extra)


def collate_padded(rows: list, extra: int = 0) -> dict:
    """Pad to the longest row of the batch, and `extra` more. Padding holds rubbish."""
    x = [row["x"] for row in rows]
    return {"inputs": {"x": padded(x, 7.0, extra), "mask": mask_of(x, extra)}, "labels": torch.tensor([row["labels"] for row in rows])}


def collate_tagged(rows: list, extra: int = 0) -> dict:
    """As `collate_padded`, with a label per position and -100 at padding."""
    return collate_padded(rows, extra) | {"labels": padded([row["tags"] for row in rows], -100, extra)}


def collate_streams(rows: list) -> dict:
    y = [row["y"] for row in rows]
    batch = collate_padded(rows)
    return batch | {"inputs": batch["inputs"] | {"y": padded(y, 5.0), "y_mask": mask_of(y)}}
