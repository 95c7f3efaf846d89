"""The extension point for layer types.

A handler turns what a module saw into the internal layout, for rows r of the module's leading axis:

    inputs     [row, position, group, in]    without the column of ones that stands for the bias
    gradients  [row, position, group, out]

so that the gradient of the weight is `sum over positions of gradient outer input`, and that of the bias is the
same with an input of one. Inputs that are one-hot may be given as their indices, integers `[row, position]`.
Everything after this point knows only that layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Sizes of a layer in the internal layout; `inputs` does not count the bias column."""

    groups: int
    inputs: int
    outputs: int


class Handler:
    """What whence must know of a layer type; a handler may leave out `against` and `plain`.

    `plain`: its inputs depend on `x` alone and not on the module, so that layers with the same `x` have the same.
    `one_hot`: its inputs are indices; their covariance is diagonal, so that side needs no eigenvectors.
    """

    plain = False
    one_hot = False

    def against(self, module: nn.Module) -> str | None:
        """Return why this module cannot be tracked although its type can; None if it can."""
        return None

    def parts(self, module: nn.Module) -> LayerParts:
        """Return the layer's sizes."""
        raise NotImplementedError

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the module's input as `[row, position, group, in]`, or indices `[row, position]`."""
        raise NotImplementedError

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """Return the gradient of the module's output as `[row, position, group, out]`."""
        raise NotImplementedError

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer type gives for `x`; subclasses with a forward of their own are checked against it."""
        raise NotImplementedError

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as `[group, out, in]`."""
        parts = self.parts(module)
        return weight.reshape(parts.groups, parts.outputs, parts.inputs)

    def share(self, module: nn.Module, packed: Tensor) -> Tensor:
        """Return the layer's part of a tensor of its parameter's shape; a composite packs several layers into one."""
        return packed


Tap = Callable[[str, Tensor, Tensor], Tensor]
"""Of a composite: `tap(part, input, output)` returns the output to go on with."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of a composite's layers: its handler (given the whole module) and its parameters, or slices of them."""

    handler: Handler
    weight: nn.Parameter
    bias: nn.Parameter | None


class Composite:
    """A module that uses the parameters of several layers without calling a module for each."""

    def against(self, module: nn.Module) -> str | None:
        """Return why this module cannot be tracked although its type can; None if it can."""
        return None

    def layers(self, module: nn.Module) -> Mapping[str, Part]:
        """Return the module's layers under the names that are appended to its own."""
        raise NotImplementedError

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, tap: Tap) -> Any:
        """Compute the module's output once more, in the open, passing every layer's output through `tap`."""
        raise NotImplementedError


_handlers: dict[type[nn.Module] | str, Handler | Composite] = {}


def register(*module_types: type[nn.Module] | str) -> Callable[[type], type]:
    """Register a handler class for module types and their subclasses.

    A type of an optional library is given by its full name, in which `*` stands for anything.
    """

    def decorate(handler: type) -> type:
        for module_type in module_types:
            _handlers[module_type] = handler()
        return handler

    return decorate


def handler_for(module: nn.Module) -> tuple[Handler | Composite, type[nn.Module]] | None:
    """Return the handler of the module's nearest registered type, and that type; None if there is none."""
    for kind in type(module).__mro__:
        handler = _handlers.get(kind) or _by_name(f"{kind.__module__}.{kind.__qualname__}")
        if handler is not None:
            return handler, kind
    return None


def _by_name(name: str) -> Handler | Composite | None:
    return next((handler for key, handler in _handlers.items() if isinstance(key, str) and fnmatchcase(name, key)), None)
