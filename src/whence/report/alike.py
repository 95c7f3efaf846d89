"""Rows that are copies of each other, or nearly so: groups by the words that they share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

SHARED = 0.7
"""Share of runs of three words that two texts have in common, of all runs in either (Jaccard), to count as alike."""
_FEWEST_WORDS = 4
# What stands in more texts than this is a turn of phrase, and comparing all of them would take long.
_COMMON = 50


def alike_groups(texts: Sequence[str | None]) -> list[list[int]]:
    """Return groups of two texts or more that are alike, by their places; shorter texts than four words are left out.

    Alike are texts of the same words whatever their case and punctuation, and texts that share most runs of three words.
    """
    words = [tuple(re.findall(r"\w+", text.lower())) if text else () for text in texts]
    same = defaultdict[tuple[str, ...], list[int]](list)
    for place, one in enumerate(words):
        if len(one) >= _FEWEST_WORDS:
            same[one].append(place)
    kinds = list(same)
    parent = list(range(len(kinds)))

    def root(kind: int) -> int:
        while parent[kind] != kind:
            parent[kind] = kind = parent[parent[kind]]
        return kind

    for first, second in _close(kinds):
        parent[max(root(first), root(second))] = min(root(first), root(second))
    groups = defaultdict[int, list[int]](list)
    for kind, key in enumerate(kinds):
        groups[root(kind)] += same[key]
    return sorted((sorted(group) for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def _close(kinds: Sequence[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    """Give pairs of different texts that are alike."""
    runs = [{one[start : start + 3] for start in range(len(one) - 2)} for one in kinds]
    holders = defaultdict[tuple[str, ...], list[int]](list)
    for kind, own in enumerate(runs):
        for run in own:
            holders[run].append(kind)
    for kind, own in enumerate(runs):
        shared = defaultdict[int, int](int)
        for run in own:
            if len(holders[run]) <= _COMMON:
                for other in holders[run]:
                    shared[other] += 1
        for other, count in shared.items():
            if other > kind and count >= SHARED * (len(own) + len(runs[other]) - count):
                yield kind, other
