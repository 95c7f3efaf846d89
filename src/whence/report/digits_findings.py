"""What a run on the digits found: the numbers that the page puts into words and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from whence.recipes.digits import Digit, DigitsData
from whence.runtime.progress import StageRow

CHECKED = 0.1


class Recall(Protocol):
    """Share of wrong labels found against share of rows looked at; see `whence.evaluate.mislabeled.RecallCurve`."""

    @property
    def fractions(self) -> Tensor:
        """Rows looked at over rows, `[point]`."""
        ...

    @property
    def recalls(self) -> Tensor:
        """Wrong labels among them over wrong labels, `[point]`."""
        ...

    def at(self, fraction: float) -> float:
        """Return the share found in the first `fraction` of the ranking."""
        ...


@dataclass(frozen=True, kw_only=True)
class Misread:
    """A test digit the network reads wrongly, with `(training row, score)`, strongest first, for and against it."""

    row: Digit
    reading: int
    proponents: Sequence[tuple[int, float]]
    opponents: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class DigitsFindings:
    """All that the page says.

    Attributes:
        data: training and test rows.
        readings: the network's reading of each training row, `[train]`.
        losses: the loss of each training row's given label, `[train]`.
        self_influence: `[train]`.
        by_self_influence, by_loss: how well these rankings find the flipped labels.
        misread: the test digits the network reads wrongly.
        stages: where the time went.
        settings: name and value.
        coverage: which parameters the scores speak for.
        footer: what made the page.
    """

    data: DigitsData
    readings: Tensor
    losses: Tensor
    self_influence: Tensor
    by_self_influence: Recall
    by_loss: Recall
    misread: Sequence[Misread]
    stages: Sequence[StageRow]
    settings: Sequence[tuple[str, str]]
    coverage: str
    footer: str

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.data.train)

    @property
    def wrong(self) -> int:
        """Training rows with a flipped label."""
        return int(self.data.flipped.sum())

    @property
    def checked(self) -> int:
        """Rows in the first tenth of a ranking."""
        return int(CHECKED * self.rows + 1e-9)

    @property
    def order(self) -> list[int]:
        """Training rows by falling self-influence."""
        return torch.argsort(self.self_influence, descending=True, stable=True).tolist()

    def found(self, recall: Recall) -> int:
        """Return how many flipped labels a ranking has in its first tenth."""
        return round(recall.at(CHECKED) * self.wrong)

    def flipped_share(self, side: Literal["proponents", "opponents"]) -> float | None:
        """Return which share of all proponents or opponents listed carry a flipped label; None if none are listed."""
        listed = [index for case in self.misread for index, _ in (case.proponents if side == "proponents" else case.opponents)]
        return sum(is_flipped(self.data.train[index]) for index in listed) / len(listed) if listed else None


def is_flipped(row: Digit) -> bool:
    """Return whether a row's label is another than the digit it shows."""
    return row.label != row.truth


def percent(share: float) -> str:
    """Return a share with three digits."""
    return f"{100 * share:.3g}%"


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many}"


def signed(score: float) -> str:
    """Return a score with three digits, its sign and a true minus."""
    digits = f"{abs(score):,.0f}" if abs(score) >= 99.95 else f"{abs(score):.3g}"
    return ("\u2212" if score < 0 else "+") + digits
