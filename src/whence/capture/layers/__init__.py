"""One short file per kind of layer: how its inputs and output gradients become the internal layout."""

from whence.capture.layers import attention, conv, embedding, linear, norm  # noqa: F401  (registers the handlers)
from whence.capture.layers.registry import Composite, Handler, LayerParts, Part, handler_for, register

__all__ = ["Composite", "Handler", "LayerParts", "Part", "handler_for", "register"]
