"""Search: products of queries with every row, shard by shard, keeping the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Best:
    """The `k` best rows of each query, best first: `values` and example `ids`, `[query, k]`."""

    values: Tensor
    ids: Tensor


def best(blocks: Iterable[tuple[Tensor, Tensor]], k: int, *, descending: bool) -> Best:
    """Return the highest (or lowest) `k` of scores `[row, query]` that come in blocks with their ids `[row]`.

    Rows of equal score stand in the order of the blocks.
    """
    kept: Best | None = None
    for ids, scores in blocks:
        values, places = torch.sort(scores.T, dim=1, descending=descending, stable=True)
        found = Best(values=values[:, :k], ids=ids[places[:, :k]])
        kept = found if kept is None else _merged(kept, found, k, descending)
    assert kept is not None, "an index has rows"
    return kept


def _merged(first: Best, second: Best, k: int, descending: bool) -> Best:
    values = torch.cat([first.values, second.values], dim=1)
    values, places = torch.sort(values, dim=1, descending=descending, stable=True)
    ids = torch.cat([first.ids, second.ids], dim=1).gather(1, places)
    return Best(values=values[:, :k], ids=ids[:, :k])


def both_ends(blocks: Iterator[tuple[Tensor, Tensor]], k: int) -> tuple[Best, Best]:
    """Return the highest and the lowest `k`, reading the blocks once."""
    top: Best | None = None
    bottom: Best | None = None
    for block in blocks:
        high, low = best([block], k, descending=True), best([block], k, descending=False)
        top = high if top is None else _merged(top, high, k, True)
        bottom = low if bottom is None else _merged(bottom, low, k, False)
    assert top is not None, "an index has rows"
    assert bottom is not None
    return top, bottom
