"""Which coordinates of a layer the triplets of an index are made of.

Most of what a row has lies along the leading eigenvectors of either side; a triplet of those alone costs a part of the bytes, and
so more triplets fit into a row. How many coordinates are worth their bytes depends on the rows and on their size (`pilot.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.capture.pair import Basis

_LEAST = 16
"""Sides this short stay whole."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One layer: the matrix `sizes` (out, in) that its gradients count as, and the coordinates kept of each side; None: all."""

    sizes: tuple[int, int]
    outputs: Tensor | None = None
    inputs: Tensor | None = None

    def basis(self, whole: Basis) -> Basis:
        """Return the eigenvectors of these coordinates."""
        outputs = whole.outputs if self.outputs is None or whole.outputs is None else whole.outputs[..., self.outputs]
        inputs = whole.inputs if self.inputs is None or whole.inputs is None else whole.inputs[..., self.inputs]
        return Basis(outputs=outputs, inputs=inputs)

    def of(self, gradients: Tensor) -> Tensor:
        """Return gradients `[example, group, out, in]` of all coordinates as matrices `[example, out, in]` of these."""
        if self.outputs is not None:
            gradients = gradients[:, :, self.outputs]
        if self.inputs is not None:
            gradients = gradients[..., self.inputs]
        return gradients.reshape(len(gradients), *self.sizes)


def make_cut(shape: tuple[int, int, int], basis: Basis, energy: Tensor | None, share: float) -> Cut:
    """Keep a share of the coordinates on both sides, those with most energy `[group, out, in]`.

    Only sides with eigenvectors are cut. A layer with groups counts as one matrix `[group, out * in]` and stays whole.
    """
    groups, outputs, inputs = shape
    if groups > 1:
        return Cut(sizes=(groups, outputs * inputs))
    if energy is None or share == 1:
        return Cut(sizes=(outputs, inputs))
    kept_out = None if basis.outputs is None else _leading(energy.sum((0, 2)), share)
    kept_in = None if basis.inputs is None else _leading(energy.sum((0, 1)), share)
    sizes = (outputs if kept_out is None else len(kept_out), inputs if kept_in is None else len(kept_in))
    return Cut(sizes=sizes, outputs=kept_out, inputs=kept_in)


def _leading(energy: Tensor, share: float) -> Tensor | None:
    if len(energy) <= _LEAST:
        return None
    count = max(_LEAST, round(share * len(energy)))
    return torch.sort(energy, descending=True, stable=True).indices[:count].sort().values
