"""Which training rows to drop: from one number per row to a decision that can be read and checked.

The rows with the highest numbers go. What a high number means is the caller's choice: self-influence or loss for labels
that may be wrong, `harmful_scores` for rows that push the queries' measurements up, `copy_numbers` for repeated rows.

Exact copies share one fate, if groups are given: a wrong label of which one copy stays is still in the data, and copies
support each other, so that each looks less suspicious than it would alone. A group stands where its highest row stands.
No class loses more than its share (`keep_share`), for a method that suspects a whole class must not delete it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.decision import BELOW, BY_SCORE, CLASS_LIMIT, KEPT, NO_ROOM, Decision, falling
from whence.storage.fingerprints import fingerprint_rows

ID_COLUMNS = ("id", "idx")


def decide(
    scores: Tensor,
    *,
    fraction: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    floor: float | None = None,
    classes: Tensor | None = None,
    keep_share: float = 0.5,
    groups: Tensor | None = None,
) -> Decision:
    """Drop the rows with the highest scores; give one of `fraction`, `count` and `threshold`.

    Args:
        scores: `[train]`, high for rows that should go.
        fraction: of all rows that go, above 0 and below 1, rounded down to whole rows.
        count: how many rows go.
        threshold: rows with this score or a higher one go.
        floor: rows with this score or a lower one never go, so that fewer may go than were asked for; 0 for `harmful_scores`.
        classes: class of every row, int64 `[train]`.
        keep_share: share of every class that stays at least, rounded up to whole rows; one row always stays. Of no effect
            without classes.
        groups: equal numbers for rows that go or stay together, int64 `[train]`; see `duplicate_groups`.

    Raises:
        ConfigError: not exactly one of the three is given, a number is out of its range, or no row would be kept.
        DataError: the sizes differ, or a score is NaN or infinite.
    """
    _check(scores, classes, groups, floor, keep_share)
    scores = scores.detach().double().cpu()
    most, least = _wanted(len(scores), fraction, count, threshold)
    lowest = least if floor is None else max(least, math.nextafter(floor, math.inf))
    reasons = _reasons(scores, most, lowest, classes, keep_share, groups)
    kept = tuple(row for row, reason in enumerate(reasons) if reason in KEPT)
    if not kept:
        raise ConfigError(f"all {len(scores)} rows score {threshold} or more, so that none would be kept. Give a higher threshold.")
    asked = {"fraction": fraction, "count": count, "threshold": threshold, "floor": floor}
    return Decision(
        scores=scores,
        dropped=tuple(row for row, reason in enumerate(reasons) if reason not in KEPT),
        kept=kept,
        reasons=reasons,
        classes=None if classes is None else classes.detach().cpu(),
        settings=asked | {"keep_share": None if classes is None else keep_share, "copies": "apart" if groups is None else "together"},
    )


def check_shares(rows: int, *, fraction: float, keep_share: float) -> None:
    """Check, before anything is scored, that `decide` can take a fraction of so many rows and a share to keep.

    Raises:
        ConfigError: it cannot.
    """
    _wanted(rows, fraction, None, None)
    _check_kept(keep_share)


def harmful_scores(scores: Tensor) -> Tensor:
    """Return how much each row pushes the queries' measurements up in all, minus the sum over queries, float64 `[train]`.

    Args:
        scores: `[query, train]`, positive for rows that push a measurement down. Measurements are lower where the model does
            better, so that a row above 0 harms, and dropping a row below 0 would do harm: `decide` takes `floor=0`.

    Raises:
        DataError: the scores have another shape.
    """
    if scores.dim() != 2:
        raise DataError(f"scores have shape {tuple(scores.shape)}; give [query, train], as `Scores.values`.")
    return -scores.detach().double().cpu().sum(0)


def duplicate_groups(rows: Sequence[dict[str, Any]], *, ignore: Sequence[str] = ID_COLUMNS) -> Tensor:
    """Return for every row the number of the first row with the same content, int64 `[row]`.

    Args:
        rows: raw rows.
        ignore: columns that may differ between copies, such as a running number.

    Raises:
        DataError: a row holds something whose content cannot be compared.
    """
    fingerprint_rows(rows)  # names the row that cannot be compared by its number
    first: dict[str, int] = {}
    digests = (fingerprint_rows([{name: value for name, value in row.items() if name not in ignore}]) for row in rows)
    return torch.tensor([first.setdefault(digest, number) for number, digest in enumerate(digests)], dtype=torch.int64)


def copy_numbers(groups: Tensor) -> Tensor:
    """Return how many earlier rows are in the same group, float64 `[row]`: `decide` with `threshold=1` keeps the first copy only."""
    seen: Counter[int] = Counter()
    numbers = []
    for group in groups.tolist():
        numbers.append(seen[group])
        seen[group] += 1
    return torch.tensor(numbers, dtype=torch.float64)


def _check(scores: Tensor, classes: Tensor | None, groups: Tensor | None, floor: float | None, keep_share: float) -> None:
    if scores.dim() != 1 or len(scores) < 2:
        raise DataError(f"scores have shape {tuple(scores.shape)}; give one number per row, `[train]`, of two rows or more.")
    for name, values in (("classes", classes), ("groups", groups)):
        if values is not None and (values.shape != scores.shape or values.is_floating_point()):
            raise DataError(
                f"{name} are {values.dtype} of shape {tuple(values.shape)}, the scores are of {len(scores)} rows; "
                "give one whole number per row."
            )
    if not torch.isfinite(scores).all():
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise DataError(f"the score of row {row} is {scores[row].item()}, so rows cannot be ranked. Find out where it comes from.")
    if floor is not None and not math.isfinite(floor):
        raise ConfigError(f"floor={floor!r} is no score; give a finite number, or None.")
    _check_kept(keep_share)


def _check_kept(keep_share: float) -> None:
    if not 0 <= keep_share <= 1:
        raise ConfigError(f"keep_share={keep_share!r} is no share of a class; give a number from 0 to 1.")


def _wanted(rows: int, fraction: float | None, count: int | None, threshold: float | None) -> tuple[int, float]:
    """Return how many rows go at most, and the lowest score of a row that goes."""
    given = {name: value for name, value in (("fraction", fraction), ("count", count), ("threshold", threshold)) if value is not None}
    if len(given) != 1:
        came = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none of them"
        raise ConfigError(f"give exactly one of fraction, count and threshold; got {came}.")
    if threshold is not None:
        if not math.isfinite(threshold):
            raise ConfigError(f"threshold={threshold!r} is no score; give a finite number.")
        return rows, threshold
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ConfigError(f"fraction={fraction!r} is no share of the rows to drop; give a number above 0 and below 1.")
        # 0.29 * 100 is 28.999...: a share that is meant to be a whole number of rows is one.
        count = int(fraction * rows + 1e-9)
        if count == 0:
            raise ConfigError(f"fraction={fraction!r} of {rows} rows is less than one row; give at least {1 / rows:.2g}.")
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < rows:
        raise ConfigError(f"count={count!r} of {rows} rows cannot be dropped; give a whole number from 1 to {rows - 1}.")
    return count, -math.inf


def _reasons(scores: Tensor, most: int, lowest: float, classes: Tensor | None, keep_share: float, groups: Tensor | None) -> tuple[str, ...]:
    """Return why each row goes or stays: at most `most` rows go, none below `lowest` unless it is a copy of one above."""
    labels = [0] * len(scores) if classes is None else classes.tolist()
    room = {label: size if classes is None else _may_lose(size, keep_share) for label, size in Counter(labels).items()}
    reasons = dict.fromkeys(range(len(scores)), BELOW)
    for unit in _units(scores, groups):
        if most == 0 or scores[unit[0]] < lowest:
            break
        needed = Counter(labels[row] for row in unit)
        if any(number > room[label] for label, number in needed.items()):
            reasons.update(dict.fromkeys(unit, CLASS_LIMIT))
        elif len(unit) > most:
            reasons.update(dict.fromkeys(unit, NO_ROOM))
        else:
            most -= len(unit)
            room.update({label: room[label] - number for label, number in needed.items()})
            reasons.update({unit[0]: BY_SCORE} | dict.fromkeys(unit[1:], f"copy of row {unit[0]}"))
    return tuple(reasons.values())


def _may_lose(size: int, keep_share: float) -> int:
    """Return how many rows of a class may go."""
    return size - max(1, math.ceil(keep_share * size - 1e-9))


def _units(scores: Tensor, groups: Tensor | None) -> list[list[int]]:
    """Return the rows that go together, highest first, by the score of the first of each."""
    order = falling(scores).tolist()
    names = range(len(order)) if groups is None else groups.tolist()
    units: dict[int, list[int]] = {}
    for row in order:
        units.setdefault(names[row], []).append(row)
    return list(units.values())
