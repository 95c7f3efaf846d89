"""Queries a few at a time: no more whole gradients of them are held than fit into `QUERY_BYTES`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

QUERY_BYTES = 2**30
"""Gradients of queries that are held at a time, where all rows or some are scored."""

Result = TypeVar("Result")


def in_turns(
    queries: Sequence[int], layers: Mapping[str, Sequence[int]], checkpoints: int, take: Callable[[Sequence[int]], Result]
) -> list[Result]:
    """Return what `take` returns of one part of the queries after the other; of no queries, what it returns of none.

    What `take` holds goes when it returns, ahead of the next turn.

    Args:
        queries: their numbers.
        layers: shape of each layer's gradient.
        checkpoints: how many gradients are held of each query.
        take: called with the numbers of a turn's queries.
    """
    several = max(1, QUERY_BYTES // (4 * checkpoints * sum(map(math.prod, layers.values()))))
    return [take(queries[first : first + several]) for first in range(0, max(1, len(queries)), several)]
