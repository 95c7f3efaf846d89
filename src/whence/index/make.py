"""The projection that settings name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from whence.errors import ConfigError
from whence.index.balance import Balance
from whence.index.dense import dense_rows
from whence.index.factors import FactorRows
from whence.index.projection import Projection, RowSettings


def make_projection(
    settings: RowSettings,
    balances: Mapping[str, Balance],
    energies: Mapping[str, Tensor | None],
    shapes: Mapping[str, tuple[int, int, int]],
) -> Projection:
    """Return the projection for layers.

    Args:
        settings: which, and how large.
        balances: each layer's share of the weights. energies: eigenvalue times weight, `[group, out, in]`, or None.
        shapes: `[group, out, in]`, in the order of the layers.

    Raises:
        ConfigError: a row is too small for a triplet, or a layer has no eigenvalues to go by.
    """
    if settings.projection == "factors":
        rows = FactorRows(balances=balances, shapes=shapes, settings=settings)
        if rows.budget < (least := max(map(rows.cost, shapes))):
            whole = rows.budget / settings.keep
            raise ConfigError(
                f"keep={settings.keep:.3g} leaves a row {rows.budget} bytes, and one triplet of the largest layer takes {least}. "
                f"Give keep={least / whole:.2g} or more, or another projection."
            )
        return rows
    return dense_rows(balances, energies, shapes, settings)
