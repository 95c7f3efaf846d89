"""Search: products of queries with every row, shard by shard, keeping the best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Best:
    """The `k` best rows of each query, best first: `values` and example `ids`, `[query, k]`."""

    values: Tensor
    ids: Tensor


def candidates(rows: int, k: int, rescore: float) -> int:
    """Return how many rows at each end by the index are looked at for `k` answers: half of the share that is scored exactly."""
    return min(rows, max(k, round(rescore * rows / 2)))


def check_question(k: int, rescore: float, nprobe: int | None) -> None:
    """Check the options of a question.

    Raises:
        ConfigError: one cannot be used.
    """
    if k < 1 or not 0 <= rescore <= 1:
        raise ConfigError(f"k={k}, rescore={rescore}: give k of 1 or more, and a share from 0 to 1.")
    if nprobe is not None and nprobe < 0:
        raise ConfigError(f"nprobe={nprobe} is no number of lists; give 1 or more, or 0 to read all rows.")


def both_ends(blocks: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[Best, Best]:
    """Return the highest and the lowest `k` of scores `[row, query]` that come in blocks with their ids `[row]`.

    The blocks are read once. Rows of equal score stand in the order of the blocks.
    """
    top: Best | None = None
    bottom: Best | None = None
    for ids, scores in blocks:
        found = Best(values=scores.T, ids=ids.expand(scores.shape[1], -1))
        top, bottom = _best(top, found, k, descending=True), _best(bottom, found, k, descending=False)
    assert top is not None, "an index has rows"
    assert bottom is not None
    return top, bottom


def joined(parts: Sequence[Best]) -> Best:
    """Return the best rows of some queries, then of others, as those of all."""
    return Best(values=torch.cat([part.values for part in parts]), ids=torch.cat([part.ids for part in parts]))


def _best(kept: Best | None, found: Best, k: int, *, descending: bool) -> Best:
    both = [found] if kept is None else [kept, found]
    values, places = torch.sort(torch.cat([one.values for one in both], dim=1), dim=1, descending=descending, stable=True)
    return Best(values=values[:, :k], ids=torch.cat([one.ids for one in both], dim=1).gather(1, places)[:, :k])
