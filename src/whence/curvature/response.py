"""Spectral functions: what weight a score gives to an eigen-direction of the curvature.

`inverse` is the answer for a model trained to convergence. A short run has moved only along the directions it had time
for: after gradient descent of total length `time` (the sum of its learning rates) a direction of eigenvalue `l` has gone
`1 - exp(-time l)` of its way (one segment of Bae et al., "Training Data Attribution via Approximate Unrolled
Differentiation", 2024). Every function here maps eigenvalues `[group, out, in]`, damping already added, to weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from whence.curvature.basis import Curvature, Damping, LayerCurvature, layer_damping
from whence.errors import ConfigError, NumericalError


@dataclass(frozen=True, kw_only=True)
class Unrolled:
    """The response of a run of finite length.

    Attributes:
        time: sum of the learning rates over all steps of gradient descent on the mean loss. As it grows, the weights
            become those of the inverse; as it shrinks, `time` times plain gradient products.
    """

    time: float

    def __post_init__(self) -> None:
        if not (0 < self.time < float("inf")):
            raise ConfigError(f"Unrolled(time={self.time!r}): time, the sum of the learning rates, must be a positive number.")

    def weights(self, values: Tensor) -> Tensor:
        """Return `(1 - exp(-time l)) / l`, and its limit `time` at zero."""
        return torch.where(values * self.time < 1e-12, self.time, -torch.expm1(-values * self.time) / values.clamp(min=1e-300))

    def remainder(self, values: Tensor) -> Tensor:
        """Return `exp(-time l)`: what is left of an earlier difference at the end of the run."""
        return torch.exp(-values * self.time)


Response = Unrolled | Literal["inverse"]


def damped(name: str, layer: LayerCurvature, amount: float) -> Tensor:
    """Return eigenvalues and damping, in float64."""
    assert layer.eigenvalues is not None, f"layer {name!r} has no eigenvalues"
    return layer.eigenvalues.double() + amount


def spectral_weights(
    curvature: Curvature, damping: float | Damping, response: Response, shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, Tensor | None]:
    """Return the weights of every layer, in float64 `[group, out, in]` of its shape; None where all are one.

    A layer without any curvature (no gradient came to it from the fitted rows) weighs nothing under relative damping.

    Raises:
        NumericalError: an eigenvalue and the damping are both zero, and the response is the inverse.
    """
    amounts = layer_damping(curvature, damping)
    weights: dict[str, Tensor | None] = {}
    for name, layer in curvature.items():
        if layer.eigenvalues is None:
            # Nothing is known of the curvature: as if it were flat, where a run goes as far as its time.
            zeros = torch.zeros(shapes[name], dtype=torch.float64)
            weights[name] = response.weights(zeros) if isinstance(response, Unrolled) else None
            continue
        values = damped(name, layer, amounts[name])
        if isinstance(response, Unrolled):
            weights[name] = response.weights(values)
        elif not layer.eigenvalues.any() and amounts[name] == 0:
            weights[name] = torch.zeros_like(values)
        elif values.min() <= 0:
            raise NumericalError(
                f"layer {name!r}: {int((values <= 0).sum())} of {values.numel()} eigenvalues are zero, and damping={amounts[name]} "
                "leaves them so; their inverse is infinite. Use damping='auto' or a positive number."
            )
        else:
            weights[name] = values.reciprocal()
    return weights


def remainders(curvature: Curvature, damping: float | Damping, response: Unrolled) -> Mapping[str, Tensor | None]:
    """Return `exp(-time l)` of every layer, in float64; None for a layer without eigenvalues, whose differences stay as they are."""
    amounts = layer_damping(curvature, damping)
    return {
        name: None if layer.eigenvalues is None else response.remainder(damped(name, layer, amounts[name]))
        for name, layer in curvature.items()
    }
