"""The one form of all curvature, and the functions of it that scores need.

A layer's curvature is `Q diag(eigenvalues) Q^T` with `Q = Q_out (x) Q_in`, a mean over examples of the layer's
Fisher (or Gauss-Newton) block. EKFAC is of George et al., "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis" (2018); its use for influence of Grosse et al., "Studying Large Language Model
Generalization with Influence Functions" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whence.capture.pair import IDENTITY, Basis
from whence.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LayerCurvature:
    """Eigenvectors of both sides, and `eigenvalues` `[group, out, in]` (None: all are one, and damping does not apply)."""

    basis: Basis = IDENTITY
    eigenvalues: Tensor | None = None


def share_equal(bases: Mapping[str, Basis]) -> dict[str, Basis]:
    """Let layers whose inputs have equal eigenvectors (query, key and value projections) hold the same tensor."""
    seen: dict[object, Tensor] = {}
    shared: dict[str, Basis] = {}
    for name, basis in bases.items():
        q = basis.inputs
        if q is not None:
            first = seen.setdefault((q.shape, *q.flatten()[:8].tolist()), q)
            q = first if torch.equal(first, q) else q
        shared[name] = Basis(inputs=q, outputs=basis.outputs)
    return shared


Curvature = Mapping[str, LayerCurvature]


Scope = Literal["layer", "model"]
SCOPES: tuple[Scope, ...] = ("layer", "model")


@dataclass(frozen=True, kw_only=True)
class Damping:
    """Damping as a share of the mean eigenvalue, of each layer (`scope="layer"`) or of the whole model."""

    relative: float = 0.1
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        if not (self.relative > 0 and self.relative < float("inf")):
            raise ConfigError(f"Damping(relative={self.relative!r}): relative must be a positive number, such as 0.1.")
        if self.scope not in SCOPES:
            raise ConfigError(f"Damping(scope={self.scope!r}): scope is 'layer' or 'model'.")


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices `[..., n, n]` in float64.

    Returns eigenvalues `[..., n]`, ascending and clamped at zero, and eigenvectors `[..., n, n]` in columns.
    """
    matrix = covariance.double()
    eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return eigenvalues.clamp_(min=0), eigenvectors


def resolve_damping(damping: float | Damping | Literal["auto"]) -> float | Damping:
    """Return a checked damping; `"auto"` is a tenth of each layer's mean eigenvalue.

    Raises:
        ConfigError: a number below zero, NaN or infinite, or something that is no damping.
    """
    if damping == "auto":
        return Damping()
    if isinstance(damping, Damping):
        return damping
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 <= damping < float("inf"):
        raise ConfigError(
            f"damping={damping!r} cannot be used. Give a number of zero or more, 'auto', 'calibrated', or whence.Damping(relative=0.1)."
        )
    return float(damping)


def damping_amounts(damping: float | Damping, traces: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return each layer's absolute damping; relative ones are of the mean eigenvalue, `trace / size`, of a layer or of all."""
    if isinstance(damping, float):
        return dict.fromkeys(sizes, damping)
    if damping.scope == "layer":
        return {name: damping.relative * (traces[name] / size) for name, size in sizes.items()}
    return dict.fromkeys(sizes, damping.relative * sum(traces.values()) / max(1, sum(sizes.values())))


def layer_damping(curvature: Curvature, damping: float | Damping) -> dict[str, float]:
    """Return the absolute damping of every layer that has eigenvalues."""
    known = {name: layer.eigenvalues.double() for name, layer in curvature.items() if layer.eigenvalues is not None}
    traces = {name: values.sum().item() for name, values in known.items()}
    return damping_amounts(damping, traces, {name: values.numel() for name, values in known.items()})
