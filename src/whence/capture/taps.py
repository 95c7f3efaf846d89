"""The taps: the only hooks on what is tracked.

A tap sits on every tracked module. In a forward pass it binds the module's input in a closure on the output's
gradient hook, so that the pair (a, g) can never be mismatched, whatever the order of calls or however often
gradient checkpointing runs a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture.checkpoints import in_reentrant_checkpoint
from whence.capture.layers import Composite, handler_for
from whence.capture.pair import SharedInputs
from whence.capture.sites import Site, check_forward
from whence.capture.state import Call, Pass
from whence.capture.tracking import TrackedLayer
from whence.errors import LayerError

Tap = Callable[[TrackedLayer, Site, Tensor, Tensor], Tensor | None]
"""`tap(layer, site, input, output)` returns what takes the output's place, or None."""


Hooks = list[tuple[nn.Module, Callable[..., Any]]]


def hooks(layers: Sequence[TrackedLayer], tap: Tap) -> Hooks:
    """Return a forward hook for every module that the layers are used by."""
    found: Hooks = []
    parts: dict[nn.Module, dict[str, tuple[TrackedLayer, Site]]] = {}
    for layer in layers:
        for site in layer.sites:
            if site.part is not None:
                parts.setdefault(site.module, {})[site.part] = layer, site
            else:
                found.append((site.module, _hook(layer, site, tap)))
    return found + [(module, _replay(module, own, tap)) for module, own in parts.items()]


def install(stack: ExitStack, found: Hooks) -> None:
    """Put the hooks on, until the stack is closed; before the owner's own hooks, which may change the output."""
    for module, hook in found:
        stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)


def _hook(layer: TrackedLayer, site: Site, tap: Tap) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        return tap(layer, site, args[0] if args else next(iter(kwargs.values())), output)

    return hook


def _replay(module: nn.Module, own: Mapping[str, tuple[TrackedLayer, Site]], tap: Tap) -> Callable[..., Any]:
    """Return a hook that computes a composite's output once more, every part of it through its tap."""
    handled = handler_for(module)
    assert handled is not None
    composite = handled[0]
    assert isinstance(composite, Composite)
    checked = False

    def tapped(part: str, x: Tensor, output: Tensor) -> Tensor:
        result = tap(*own[part], x, output) if part in own else None
        return output if result is None else result

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal checked
        result = composite.replay(module, args, kwargs, output, tapped)
        if not checked and not torch.compiler.is_compiling():
            checked = True
            check_forward(result[0], output[0], next(iter(own.values()))[0].name, module, type(module))
        return result

    return hook


class Taps:
    """What a tap does in a forward pass; `now` is the pass under way, if any.

    `strangers`: layers whose forward is not that of their kind, with the reason. `observers` see every call.
    """

    def __init__(self, deliver: Callable[[Call, Tensor | None], None], *, offload: bool) -> None:
        self.deliver, self.offload = deliver, offload
        self.now: Pass | None = None
        self.left_out: set[str] = set()
        self.copied: set[str] = set()  # layers whose input is overwritten after use
        self.cloned: set[str] = set()  # layers whose output is a view, and is overwritten
        self.strangers: dict[str, str] = {}
        self.observers: list[Callable[[TrackedLayer, Tensor, Tensor], None]] = []
        self._checked: set[tuple[str, nn.Module]] = set()  # modules whose forward was compared

    def tap(self, layer: TrackedLayer, site: Site, x: Tensor, output: Tensor) -> Tensor | None:
        """Bind a call's input to the gradient of its output."""
        now = self.now
        if now is None or layer.name in self.left_out:
            return None
        if not now.backward:  # checkpointing calls again in the backward pass
            now.calls[layer.name] = now.calls.get(layer.name, 0) + 1
        for observe in self.observers:
            observe(layer, x, output)
        if site.checkable and (layer.name, site.module) not in self._checked:
            self._check(now, layer, site, x, output)
        if not torch.is_grad_enabled():
            if not now.backward:
                now.muted.setdefault(layer.name, in_reentrant_checkpoint())
            return None
        kept = x.detach()
        if layer.name in self.copied or now.backward:
            kept = kept.clone()
        call = Call(layer, site, kept, kept._version, now.calls[layer.name] - 1, self._shared(now, layer, site, kept))
        if self.offload:
            call.x, call.version = (held := kept.to("cpu", non_blocking=True)), held._version
        # Where nothing before this layer needs a gradient, its output becomes a root of the graph; an in-place operation
        # on a root is an error, and one on a view would drop the hook, hence the copies.
        rooted = output if output.requires_grad else output.detach().requires_grad_()
        result = output if output.requires_grad and layer.name not in self.cloned else rooted.clone()
        result.register_hook(lambda g: self.deliver(call, g))
        if not now.backward:
            now.pending.append(call)
            if now.watched and result._is_view():
                call.view = result, result._version
        return None if result is output else result

    def _check(self, now: Pass, layer: TrackedLayer, site: Site, x: Tensor, output: Tensor) -> None:
        self._checked.add((layer.name, site.module))
        try:
            with torch.no_grad():
                check_forward(site.handler.forward(site.module, x), output, layer.name, site.module, site.kind)
        except LayerError:
            if not now.lenient:
                raise
            self.strangers[layer.name] = f"a {type(site.module).__name__} that does not compute what {site.kind.__name__} does"

    def _shared(self, now: Pass, layer: TrackedLayer, site: Site, x: Tensor) -> SharedInputs | None:
        """Return the same object for all layers that read the same input; all of them are alive until the backward pass."""
        if now.backward or not site.handler.plain or not layer.weight:
            return None
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, layer.bias)
        shared = now.shared.setdefault(key, SharedInputs())
        shared.readers += 1
        return shared

    def learned(self) -> tuple[set[str], set[str], set[tuple[str, nn.Module]]]:
        """Return what the passes so far have taught about the model, for `recall`."""
        return set(self.copied), set(self.cloned), set(self._checked)

    def recall(self, learned: tuple[set[str], set[str], set[tuple[str, nn.Module]]]) -> None:
        """Know from the beginning what other taps on the same model have learned."""
        for own, known in zip((self.copied, self.cloned, self._checked), learned, strict=True):
            own |= known  # type: ignore[operator]

    def overwritten(self) -> bool:
        """Note what the forward pass overwrote in place after a tap saw it; whether anything that was kept is wrong now."""
        assert self.now is not None
        inputs = {call.layer.name for call in self.now.pending if call.overwritten}
        outputs = {call.layer.name for call in self.now.pending if call.view is not None and call.view[0]._version != call.view[1]}
        self.copied |= inputs
        self.cloned |= outputs
        return bool(inputs or outputs)
