"""How the curvature's weights are shared between the rows of an index and its queries.

A score is `<G_q, (H + d)^-1 G_t>`. In the eigenbasis the inverse is a weight `w[group, out, in]` per coordinate, and the score is
a plain product of `Z = s_out G~_t s_in` and `P = (w / s_out s_in) G~_q`, whatever the scales. They are chosen so that both sides
carry about half of the weight, `s_out s_in = sqrt(w)` as near as a product of two vectors comes to it. Two things follow: what is
lost of a row in these coordinates is lost in the measure that scores care for, and, because the scales act on each side by
itself, a row is still a sum over positions of products of two vectors, and keeps its rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.capture.pair import Basis


@dataclass(frozen=True, kw_only=True)
class Balance:
    """One layer: `rows` turns training gradients into Z, `queries` and then `weights` (None: one) turn measurements' into P.

    `rows` holds eigenvectors times scales; `weights` is `[group, out, in]`; `like` is of the type and device that gradients have.
    """

    rows: Basis
    queries: Basis
    weights: Tensor | None
    like: Tensor


def balance(basis: Basis, weights: Tensor | None, like: Tensor) -> Balance:
    """Share weights between both sides of a product; a side without eigenvectors is left as it is. `like` has their type and device."""
    if weights is None:
        return Balance(rows=basis, queries=basis, weights=None, like=like)
    tiny = weights.max().clamp(min=torch.finfo(weights.dtype).tiny) * 1e-12
    logs = weights.clamp(min=tiny).double().log()
    middle = logs.mean((1, 2))
    outputs, inputs = logs.mean(2), logs.mean(1)
    if basis.inputs is not None and basis.outputs is not None:  # the mean is in both
        outputs, inputs = outputs - middle[:, None] / 2, inputs - middle[:, None] / 2
    s_out, s_in = ((side / 2).exp().to(weights) for side in (outputs, inputs))
    left = weights
    rows_out, rows_in = basis.outputs, basis.inputs
    if rows_out is not None:
        rows_out, left = rows_out * s_out[:, None, :], left / s_out[:, :, None]
    if rows_in is not None:
        rows_in, left = rows_in * s_in[:, None, :], left / s_in[:, None, :]
    return Balance(rows=Basis(inputs=rows_in, outputs=rows_out), queries=basis, weights=left, like=like)
