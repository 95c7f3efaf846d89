"""The training rows behind an index's ids, taken only where they are the ones that were indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
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
        self._check(ids, otherwise)
        return [self.row(example) for example in ids]

    def places(self, ids: Sequence[int]) -> list[int]:
        """Return where the rows with these ids are among all rows, data set behind data set; errors as of `at`."""
        self._check(ids)
        firsts = [0, *accumulate(map(len, self.given))]
        return [firsts[number] + place for number, place in map(self._places.__getitem__, ids)]

    def row(self, example: int) -> Any:
        """Return the row with an example id; None if it is not at hand."""
        found = self._places.get(example)
        return None if found is None else self.given[found[0]][found[1]]

    def place(self, example: int) -> int | None:
        """Return where the row with an example id stands in the first data set; None if it is not there."""
        number, place = self._places.get(example, (None, 0))
        return place if number == 0 else None

    def _check(self, ids: Sequence[int], otherwise: str = "") -> None:
        """Check that rows are at hand, without reading them."""
        unknown = next((example for example in ids if example not in self._places), None)
        if unknown is not None:
            raise MismatchError(
                f"the training rows at hand are not those that were indexed (no example {unknown} among them). "
                f"Give the rows that were indexed, followed by those that were appended{otherwise and f', {otherwise}'}."
            )

    @cached_property
    def _places(self) -> Mapping[int, tuple[int, int]]:
        """Where the row with an example id is: the number of a data set at hand, since one may be given twice, and the place in it.

        A part's rows are taken only from where their fingerprint is found: content that was exchanged meanwhile would be
        scored under the ids of other rows. All data are read once for that.
        """
        found: dict[int, tuple[int, int]] = {}
        for number, rows in enumerate(self.given):
            first = 0
            for part in self.parts:
                places = range(first, first + len(part.ids))
                if int(part.ids[0]) in found:  # the same content may have been appended under other ids
                    continue
                if places.stop <= len(rows) and fingerprint_rows(Subset(rows, places)) == part.fingerprint:
                    found |= {example: (number, place) for example, place in zip(part.ids.tolist(), places, strict=True)}
                    first = places.stop
        return found
