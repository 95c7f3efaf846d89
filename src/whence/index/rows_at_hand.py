"""The training rows behind an index's ids, taken only where they are the ones that were indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch.utils.data import Subset

from whence.errors import MismatchError
from whence.index.stored import Part
from whence.storage.fingerprints import fingerprint_rows


class RowsAtHand:
    """Finds training rows by their example ids.

    Args:
        parts: what was indexed.
        given: data sets; None counts as none. The first is `train`, the others were appended.
    """

    def __init__(self, parts: Sequence[Part], *given: Any) -> None:
        self.parts = parts
        self.given = [rows for rows in given if rows is not None]

    def __bool__(self) -> bool:
        return bool(self.given)

    def followed_by(self, parts: Sequence[Part], more: Any) -> RowsAtHand:
        """Return these rows and more of them, for an index that has these parts now."""
        return RowsAtHand(parts, *self.given, more)

    def at(self, ids: Sequence[int], otherwise: str = "") -> list[Any]:
        """Return the rows with these ids.

        Raises:
            MismatchError: one is not at hand.
        """
        unknown = [example for example in ids if example not in self._places]
        if unknown:
            raise MismatchError(
                f"the training rows at hand are not those that were indexed (no example {unknown[0]} among them). "
                f"Give the rows that were indexed, followed by those that were appended{otherwise and f', {otherwise}'}."
            )
        return [self.row(example) for example in ids]

    def places(self, ids: Sequence[int]) -> list[int]:
        """Return where the rows with these ids are among all rows, data set behind data set; errors as of `at`."""
        self.at(ids)
        firsts = {id(rows): sum(map(len, self.given[:number])) for number, rows in enumerate(self.given)}
        return [firsts[id(rows)] + place for rows, place in (self._places[example] for example in ids)]

    def row(self, example: int) -> Any:
        """Return the row with an example id; None if it is not at hand."""
        rows, place = self._places.get(example, ([None], 0))
        return rows[place]

    def place(self, example: int) -> int | None:
        """Return where the row with an example id stands in the first data set; None if it is not there."""
        rows, place = self._places.get(example, (None, 0))
        return place if self.given and rows is self.given[0] else None

    @cached_property
    def _places(self) -> Mapping[int, tuple[Any, int]]:
        """Where the row with an example id is: a data set at hand and the place in it.

        A part's rows are taken only from where their fingerprint is found: content that was exchanged meanwhile would be
        scored under the ids of other rows. All data are read once for that.
        """
        found: dict[int, tuple[Any, int]] = {}
        for rows in self.given:
            first = 0
            for part in self.parts:
                places = range(first, first + len(part.ids))
                if int(part.ids[0]) in found:  # the same content may have been appended under other ids
                    continue
                if places.stop <= len(rows) and fingerprint_rows(Subset(rows, places)) == part.fingerprint:
                    found |= {example: (rows, place) for example, place in zip(part.ids.tolist(), places, strict=True)}
                    first = places.stop
        return found
