"""A check of every tracked layer against autograd, on two rows, before anything long is run.

A model may use a layer's parameters behind its back: `F.linear(h, self.embedding.weight)`, a second name for a norm's
weight. The taps then see a part of the gradient only, and nothing in the model's structure shows it. So the gradients that
the taps deliver, summed over two rows, are compared with what autograd gives for the parameters themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whence.capture.pair import IDENTITY, LayerGradient
from whence.capture.recorder import Recorder
from whence.capture.tracking import TrackedLayer
from whence.errors import LayerError
from whence.runtime.batches import Batch

TOLERANCE, HALF_TOLERANCE = 5e-3, 0.1
"""Largest relative difference; sums in half precision differ by their rounding."""

BEHIND = "its parameters are used outside of it too (its gradients and autograd's differ)"


def strange_layers(recorder: Recorder, batch: Batch, *, lenient: bool) -> dict[str, str]:
    """Return the layers whose gradients are not those of their parameters, with the reason.

    Raises:
        LayerError: there is one, and `lenient` is false.
    """
    task = recorder.task
    if recorder.transformed:  # the task has the last word on gradients
        return {}
    found: dict[str, Tensor] = {}

    def consume(layer: TrackedLayer, gradient: LayerGradient) -> None:
        found[layer.name] = next(part for _, part in gradient.merged().gradients(IDENTITY, 2**40))[0]

    recorder.run(batch, lambda _: task.loss, consume)
    wanted = _gradients(recorder, batch)
    half = recorder.options.half is not None or any(p.dtype in (torch.float16, torch.bfloat16) for p in recorder.model.parameters())
    # Gradients that are zero but for rounding (a key's bias in attention) differ by all there is of them.
    largest = max((float(gradient.norm()) for gradient in wanted.values() if torch.isfinite(gradient).all()), default=0.0)
    slack = 100 * torch.finfo(recorder.sums).eps * largest
    strange = {}
    for layer in recorder.taken:
        if layer.alone is None and layer.name in wanted and _differ(found.get(layer.name), wanted[layer.name], half, slack):
            strange[layer.name] = BEHIND
    if strange and not lenient:
        raise LayerError(
            f"layer {next(iter(strange))!r}: {BEHIND}, so its influence cannot be told from its own calls. "
            "Leave it out with layers=..., or give the model that use as a layer of its own."
        )
    return strange


def _differ(found: Tensor | None, wanted: Tensor, half: bool, slack: float) -> bool:
    size = wanted.norm()
    if not torch.isfinite(size) or (found is not None and not torch.isfinite(found).all()):
        return False  # the passes to come say where it is
    if found is None:
        return bool(size > slack)
    return bool((found - wanted).norm() > (HALF_TOLERANCE if half else TOLERANCE) * torch.maximum(size, found.norm()) + slack)


def _gradients(recorder: Recorder, batch: Batch) -> dict[str, Tensor]:
    """Return autograd's gradients of the layers' parameters, in the layers' layout; the taps sleep meanwhile."""
    parameters = {p: p.grad for layer in recorder.taken for site in layer.sites for p in site.parameters}
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            loss = recorder.task.loss(recorder.model, batch.data).sum()
            if not loss.requires_grad:
                return {}
            try:
                (loss * recorder.loss_scale).backward()  # not autograd.grad, which reentrant checkpoints refuse
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                return {}  # the model overwrites what these gradients need: it was trained otherwise, and cannot be checked
        layers = [layer for layer in recorder.taken if layer.alone is None]
        gradients = {layer.name: layer.layout(lambda p: torch.zeros_like(p) if p.grad is None else p.grad) for layer in layers}
        scale = recorder.loss_scale
        return {name: gradient.to(recorder.sums) / scale * recorder.scales.get(name, 1.0) for name, gradient in gradients.items()}
    finally:
        for parameter, gradient in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = gradient
