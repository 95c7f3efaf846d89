"""Parameters without a handler: their per-example gradients, one backward pass per example through autograd.

Slow, and right for whatever the model does with them: every example is run in a batch of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture.tracking import TrackedLayer
from whence.errors import LayerError
from whence.runtime.batches import Batch


def single_gradients(
    model: nn.Module,
    layers: Sequence[TrackedLayer],
    batch: Batch,
    objective: Callable[[Batch], Callable[[nn.Module, Any], Tensor]],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return the gradients `[example, 1, parameter, 1]` of each layer; a layer that no example reached is left out.

    Raises:
        LayerError: the batch was not made of rows that can be collated one by one.
    """
    if batch.single is None:
        raise LayerError("parameters without a handler need batches of one row, and this batch cannot be taken apart.")
    parameters = [layer.alone for layer in layers if layer.alone is not None]
    rows: list[tuple[Tensor | None, ...]] = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for place in range(len(batch.ids)):
            one = batch.single(place)
            with torch.enable_grad():
                value = objective(one)(model, one.data)
            rows.append(
                torch.autograd.grad(value.sum(), parameters, allow_unused=True) if value.requires_grad else (None,) * len(parameters)
            )
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    found = {}
    for layer, gradients in zip(layers, zip(*rows, strict=True), strict=True):
        if any(gradient is not None for gradient in gradients):
            filled = [torch.zeros_like(layer.alone) if gradient is None else gradient for gradient in gradients]  # type: ignore[arg-type]
            found[layer.name] = torch.stack(filled).to(dtype).reshape(len(filled), 1, -1, 1)
    return found
