"""Fitted factors in a run folder: which there are, whether they are whole and of this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from whence.capture.pair import IDENTITY, Basis
from whence.capture.tracking import TrackedLayer
from whence.curvature.basis import Curvature, LayerCurvature, share_equal
from whence.curvature.fit import load_curvature
from whence.curvature.settings import Spectrum
from whence.curvature.strategies import STRATEGIES, StrategyName
from whence.errors import MismatchError, NotFittedError
from whence.storage.run import explain_write_errors, fingerprint_model, read_json, write_json_atomic
from whence.storage.shards import ShardStore


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """By layer: eigenvectors, and weights `[group, out, in]` or None where all are one.

    `device` is where they are wanted; where they are offloaded they come to it when they are asked for.
    """

    bases: dict[str, Basis]
    weights: dict[str, Tensor | None]
    device: torch.device
    dtype: torch.dtype

    def basis(self, name: str) -> Basis:
        """Return a layer's eigenvectors, on the device."""
        basis = self.bases[name]
        return basis if basis is IDENTITY else basis.to(self.device, self.dtype)

    def apply(self, name: str, values: Tensor) -> Tensor:
        """Return `Q w Q^T v` for vectors `[vector, group, out, in]`."""
        basis, weights = self.basis(name), self.weight(name)
        rotated = basis.rotate(values)
        return basis.rotate_back(rotated if weights is None else rotated * weights)

    def weight(self, name: str) -> Tensor | None:
        """Return a layer's weights, on the device."""
        weights = self.weights[name]
        return None if weights is None else weights.to(self.device)


def only_strategy(folder: Path) -> StrategyName:
    """Return the strategy whose factors the folder holds.

    Raises:
        NotFittedError: there are factors of none, or of several.
    """
    fitted = [name for name in STRATEGIES if (folder / name / "manifest.json").exists()]
    if len(fitted) == 1:
        return cast(StrategyName, fitted[0])
    if fitted:
        raise NotFittedError(f"{folder} holds factors of {', '.join(fitted)}: say which with strategy=...")
    raise NotFittedError(f"{folder} holds no factors: call fit(train, strategy=...) first, or say strategy='identity', which needs none.")


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


def stored_curvature(factors: ShardStore | None, layers: list[TrackedLayer]) -> Curvature:
    """Read the factors; without any, every layer is left as it is."""
    return {layer.name: LayerCurvature() for layer in layers} if factors is None else load_curvature(factors, layers)


def preconditioner(
    curvature: Curvature,
    weights: Mapping[str, Tensor | None],
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: bool = False,
) -> Preconditioner:
    """Put eigenvectors and weights where scores need them."""
    home = torch.device("cpu") if offload else device
    return Preconditioner(
        bases=share_equal({name: layer.basis.to(home, dtype) for name, layer in curvature.items()}),
        weights={name: None if values is None else values.to(home, dtype) for name, values in weights.items()},
        device=device,
        dtype=dtype,
    )


def kept_calibration(path: Path, model: nn.Module) -> Spectrum | None:
    """Read what a calibration found; None if there was none.

    Raises:
        MismatchError: it was found for another model. StorageError: the file cannot be read.
    """
    if not path.exists():
        return None
    kept = read_json(path)
    if kept["model"] != fingerprint_model(model):
        raise MismatchError(f"{path} was found for another model. Call attributor.calibrate(...) again, or use another run_dir.")
    return Spectrum.from_json(kept["spectrum"])


def keep_calibration(path: Path, model: nn.Module, spectrum: Spectrum) -> None:
    """Write what a calibration found for a model.

    Raises:
        StorageError: the file cannot be written.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {"model": fingerprint_model(model), "spectrum": spectrum.to_json()})
