"""The projection that settings name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import Tensor

from whence.errors import ConfigError
from whence.index.balance import Balance
from whence.index.dense import DenseRows, dense_rows, least_bytes
from whence.index.factors import FactorRows
from whence.index.projection import Projection, RowSettings


def make_projection(
    settings: RowSettings,
    balances: Mapping[str, Balance],
    energies: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[int, int, int]],
    one_hot: Collection[str] = (),
) -> Projection:
    """Return the projection for layers.

    Args:
        settings: which, and how large.
        balances: each layer's share of the weights. energies: eigenvalue times weight, `[group, out, in]`, or None.
        shapes: `[group, out, in]`, in the order of the layers.
        one_hot: layers whose inputs are one-hot: embeddings.

    Raises:
        ConfigError: a row is too small for a triplet or for a number of each layer, or a layer has no eigenvalues to go by.
    """
    rows: FactorRows | DenseRows
    if settings.projection == "factors":
        rows = FactorRows(balances=balances, shapes=shapes, settings=settings)
        _check_size(settings, shapes, max(map(rows.cost, shapes)), "one triplet of the largest layer takes")
        return rows
    if settings.projection != "none":
        _check_size(settings, shapes, least_bytes(shapes, settings), "one number of each layer, with its scale, takes")
    return dense_rows(balances, energies, shapes, settings, one_hot)


def _check_size(settings: RowSettings, shapes: Mapping[str, tuple[int, int, int]], least: int, what: str) -> None:
    whole = 4 * sum(map(math.prod, shapes.values()))
    if (found := int(whole * settings.keep)) < least:
        enough = 1.05 * least / whole  # rounding to two digits must not lead below
        other = f"Give keep={enough:.2g} or more, or another projection." if enough <= 1 else "Give another projection."
        raise ConfigError(f"keep={settings.keep:.3g} leaves a row {found} bytes, and {what} {least}. {other}")
