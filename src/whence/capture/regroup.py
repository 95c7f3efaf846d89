"""Which positions belong to which example, when row i of the batch is not simply example i."""

from __future__ import annotations

import torch
from torch import Tensor

from whence.errors import LayerError


class Regrouping:
    """Gathers rows `[row, position, group, feature]` into examples `[example, position, group, feature]`.

    `ids` is the task's `example_ids`: `[row]` (all positions of a row belong to one example; a row may be one
    of an example's several, as the four choices of a question) or `[row, position]` (packed sequences).
    Examples with fewer positions are filled with zeros, which change no gradient.
    """

    def __init__(self, ids: Tensor, examples: int) -> None:
        self.ids, self.examples = ids.cpu(), examples
        if self.ids.dim() not in (1, 2) or self.ids.is_floating_point():
            raise LayerError(f"example_ids gave shape {tuple(ids.shape)} of {ids.dtype}; it takes integers [row] or [row, position].")
        if self.ids.numel() and int(self.ids.max()) >= examples:
            raise LayerError(
                f"example_ids gave {int(self.ids.max())}, but the loss has {examples} examples, numbered from 0. "
                "Let example_ids index the vector that the task's loss returns."
            )
        self._indices: dict[int, Tensor] = {}

    @property
    def rows(self) -> int:
        """Number of rows that a layer's leading axis must have."""
        return self.ids.shape[0]

    def gather(self, x: Tensor) -> Tensor:
        """Gather `[row, position, ...]` into `[example, position, ...]`, zeros where an example has fewer."""
        positions = x.shape[1]
        if self.ids.dim() == 2 and positions != self.ids.shape[1]:
            raise LayerError(
                f"a layer has {positions} positions a row, but example_ids names {self.ids.shape[1]}. "
                "Leave the layer out with layers=..., or give example_ids as [row]."
            )
        index = self._index(positions).to(x.device)
        flat = torch.cat([x.flatten(0, 1), x.new_zeros(1, *x.shape[2:])])
        return flat[index]

    def mask(self, positions: int) -> Tensor:
        """Return `[example, position]`, true where `gather` took a real position."""
        return self._index(positions) < self.rows * positions

    def _index(self, positions: int) -> Tensor:
        """`[example, position]` into flattened rows and positions; one past the end where there is none."""
        if positions not in self._indices:
            owner = self.ids.flatten() if self.ids.dim() == 2 else self.ids.repeat_interleave(positions)
            order = torch.argsort(owner, stable=True)
            order = order[owner[order] >= 0]
            counts = torch.bincount(owner[order], minlength=self.examples)
            starts = counts.cumsum(0) - counts
            place = torch.arange(len(order)) - starts.repeat_interleave(counts)
            index = torch.full((self.examples, max(1, int(counts.max()))), owner.numel())
            index[owner[order], place] = order
            self._indices[positions] = index
        return self._indices[positions]
