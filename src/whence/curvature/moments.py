"""Adam's second moments as a preconditioner.

Adam divides a parameter's step by `sqrt(v)`. In coordinates stretched by `D^(1/2)`, `D = sqrt(v) + eps`, it is plain gradient
descent, so scores for a run of Adam are those of gradient descent on gradients multiplied by `D^(-1/2)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from whence.capture.tracking import TrackedLayer
from whence.errors import ConfigError

EPS = 1e-8
"""What Adam adds to `sqrt(v)`."""


def second_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return Adam's second moments by parameter name, corrected for their start from zero.

    Raises:
        ConfigError: the optimizer keeps none for a trained parameter of the model.
    """
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state:
            group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
            # With amsgrad the step is divided by the largest there was.
            moments[name] = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1 - group["betas"][1] ** float(state["step"]))
        elif parameter.requires_grad:
            raise ConfigError(
                f"{type(optimizer).__name__} holds no second moments (exp_avg_sq) of parameter {name!r}. "
                "Give the Adam or AdamW optimizer that trained this model, after at least one step."
            )
    return moments


def layer_scales(model: nn.Module, layers: Sequence[TrackedLayer], moments: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return `(sqrt(v) + eps)^(-1/2)` of every layer, in the layout of its gradient `[group, out, in]`.

    Raises:
        ConfigError: a tracked parameter has no second moments, or they are of another shape.
    """
    if moments is None:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def scale(parameter: nn.Parameter) -> Tensor:
        name = names[id(parameter)]
        found = moments.get(name)
        if found is None or found.shape != parameter.shape:
            have = "none" if found is None else f"shape {tuple(found.shape)}"
            raise ConfigError(f"second_moments of {name!r}: found {have}, expected {tuple(parameter.shape)}; give Adam's, of this model.")
        return (found.detach().to(parameter.device).sqrt() + EPS).rsqrt()

    return {layer.name: layer.layout(scale) for layer in layers}
