"""Fitted factors in a run folder: which there are, whether they are whole and of this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from whence.capture.pair import Basis
from whence.capture.tracking import TrackedLayer
from whence.curvature.basis import Damping, LayerCurvature, inverse_weights, share_equal
from whence.curvature.fit import load_curvature
from whence.curvature.strategies import STRATEGIES, StrategyName
from whence.errors import NotFittedError
from whence.storage.shards import ShardStore

Preconditioner = tuple[dict[str, Basis], dict[str, Tensor | None]]
"""By layer: eigenvectors, and `1 / (eigenvalue + damping)` `[group, out, in]` or None where all weights are one."""


def only_strategy(folder: Path) -> StrategyName:
    """Return the strategy whose factors the folder holds.

    Raises:
        NotFittedError: there are factors of none, or of several.
    """
    fitted = [name for name in STRATEGIES if (folder / name / "manifest.json").exists()]
    if len(fitted) == 1:
        return cast(StrategyName, fitted[0])
    have = f"factors of {', '.join(fitted)}" if fitted else "no factors"
    raise NotFittedError(f"{folder} holds {have}: call fit(train, strategy=...) first, or say which with strategy=...")


def open_factors(folder: Path, identity: dict[str, Any]) -> ShardStore:
    """Open the fitted factors in a folder and check that they belong to this model.

    Raises:
        NotFittedError: there are none, or the fit is unfinished. MismatchError: they are of another model or task.
    """
    if not (folder / "manifest.json").exists():
        raise NotFittedError(f"{folder} holds no factors: call fit(train, strategy={folder.name!r}) first.")
    stored = ShardStore.open(folder, kind="factors")
    stored = ShardStore.open(folder, kind="factors", settings={**stored.settings, **identity})
    if not stored.complete:
        raise NotFittedError(f"{folder}: the fit was interrupted. Call fit again with the same arguments; it continues.")
    return stored


def preconditioner(
    factors: ShardStore | None,
    layers: list[TrackedLayer],
    damping: float | Damping,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Preconditioner:
    """Read the factors and turn them into what scores need; without factors every layer is left as it is."""
    if factors is None:
        curvature = {layer.name: LayerCurvature() for layer in layers}
    else:
        curvature = load_curvature(factors, layers)
    weights = inverse_weights(curvature, damping)
    return (
        share_equal({name: layer.basis.to(device, dtype) for name, layer in curvature.items()}),
        {name: None if values is None else values.to(device, dtype) for name, values in weights.items()},
    )
