"""From settings to projections."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from whence.errors import ConfigError
from whence.index.balance import Balance
from whence.index.dense import DenseRows, dense_rows, least_bytes
from whence.index.encoding import Dtype
from whence.index.factors import FactorRows
from whence.index.projection import RowSettings

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of the coordinates, that factors may be made of."""


def make_dense(
    settings: RowSettings,
    balances: Mapping[str, Balance],
    energies: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[int, int, int]],
    one_hot: Collection[str] = (),
) -> DenseRows:
    """Return the projection whose rows are one vector.

    Args:
        settings: which, and how large.
        balances: each layer's share of the weights. energies: eigenvalue times weight, `[group, out, in]`, or None.
        shapes: `[group, out, in]`, in the order of the layers.
        one_hot: layers whose inputs are one-hot: embeddings.

    Raises:
        ConfigError: a row is too small for a number of each layer, or a layer has no eigenvalues to go by.
    """
    if settings.projection != "none":
        _check_size(settings, shapes, least_bytes(shapes, settings), "one number of each layer, with its scale, takes")
    return dense_rows(balances, energies, shapes, settings, one_hot)


def make_factors(
    settings: RowSettings,
    balances: Mapping[str, Balance],
    energies: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[int, int, int]],
) -> list[FactorRows]:
    """Return the projections of triplets that settings allow: several where they leave open how. Arguments as of `make_dense`.

    Raises:
        ConfigError: a row is too small for a triplet.
    """
    dtypes: tuple[Dtype, ...] = ("int8", "int4") if settings.dtype == "auto" else (settings.dtype,)
    known = any(energy is not None for energy in energies.values())
    shares = (settings.coordinates,) if settings.coordinates else SHARES if known else (1.0,)
    tried = [
        FactorRows.make(balances, energies, shapes, replace(settings, dtype=dtype, coordinates=share))
        for share in shares
        for dtype in dtypes
    ]
    least = [max(map(rows.cost, shapes)) for rows in tried]
    _check_size(settings, shapes, min(least), "one triplet of the largest layer takes")
    return [rows for rows, cost in zip(tried, least, strict=True) if cost <= rows.budget]


def _check_size(settings: RowSettings, shapes: Mapping[str, tuple[int, int, int]], least: int, what: str) -> None:
    whole = 4 * sum(map(math.prod, shapes.values()))
    if (found := int(whole * settings.keep)) < least:
        enough = 1.05 * least / whole  # rounding to two digits must not lead below
        other = f"Give keep={enough:.2g} or more, or another projection." if enough <= 1 else "Give another projection."
        raise ConfigError(f"keep={settings.keep:.3g} leaves a row {found} bytes, and {what} {least}. {other}")
