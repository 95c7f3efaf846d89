"""One short file per kind of layer: how its inputs and output gradients become the internal layout."""

from whence.capture.layers import conv, linear  # noqa: F401  (registers the handlers)
from whence.capture.layers.registry import Handler, LayerParts, handler_for, register

__all__ = ["Handler", "LayerParts", "handler_for", "register"]
