"""The extension point for layer types.

A handler turns what a module saw into the internal layout, for rows r of the module's leading axis:

    inputs     [row, position, group, in]    without the column of ones that stands for the bias
    gradients  [row, position, group, out]

so that the gradient of the weight is `sum over positions of gradient outer input`, and that of the bias is the
same with an input of one. Everything after this point knows only that layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Sizes of a layer in the internal layout; `inputs` does not count the bias column."""

    groups: int
    inputs: int
    outputs: int


class Handler(Protocol):
    """What whence must know of a layer type.

    `plain`: its inputs depend on `x` alone and not on the module, so that layers with the same `x` have the same.
    """

    plain: bool

    def parts(self, module: nn.Module) -> LayerParts:
        """Return the layer's sizes."""
        ...

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the module's input as `[row, position, group, in]`."""
        ...

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """Return the gradient of the module's output as `[row, position, group, out]`."""
        ...

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer type gives for `x`; subclasses with a forward of their own are checked against it."""
        ...


_handlers: dict[type[nn.Module] | str, Handler] = {}


def register(module_type: type[nn.Module] | str) -> Callable[[type], type]:
    """Register a handler class for a module type (or its full name, for one of an optional library) and its subclasses."""

    def decorate(handler: type) -> type:
        _handlers[module_type] = handler()
        return handler

    return decorate


def handler_for(module: nn.Module) -> tuple[Handler, type[nn.Module]] | None:
    """Return the handler of the module's nearest registered type, and that type; None if there is none."""
    for kind in type(module).__mro__:
        handler = _handlers.get(kind) or _handlers.get(f"{kind.__module__}.{kind.__qualname__}")
        if handler is not None:
            return handler, kind
    return None
