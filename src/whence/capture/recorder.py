"""The taps: the only hooks of the project, and the passes that use them.

A tap sits on every tracked module. In a forward pass it binds the module's input in a closure on the output's
gradient hook, so that the pair (a, g) can never be mismatched, whatever the order of calls or however often
gradient checkpointing runs a block. A layer is handed to the consumer as soon as the backward pass has given the
gradients of all its calls. Parameters are frozen meanwhile: autograd computes no weight gradient, and stops at
the earliest tracked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from whence.capture.assemble import joined, mask_for, regrouped
from whence.capture.checkpoints import in_reentrant_checkpoint, refuse_checkpointed
from whence.capture.pair import Pair, SharedInputs
from whence.capture.regroup import Regrouping
from whence.capture.tracking import TrackedLayer, sum_type
from whence.errors import DataError, LayerError
from whence.runtime.batches import Batch
from whence.tasks import Task

Consumer = Callable[[TrackedLayer, Pair], None]
Objective = Callable[[nn.Module, Any], Tensor]


@dataclass
class _Call:
    """One call of a tracked module: its input until the gradient arrives, and the input's version at the call."""

    layer: TrackedLayer
    module: nn.Module
    x: Tensor | None
    version: int
    shared: SharedInputs | None = None

    @property
    def overwritten(self) -> bool:
        return self.x is not None and self.x._version != self.version


@dataclass
class _Pass:
    """What is known of one forward and backward pass."""

    consumer: Consumer
    calls: dict[str, int] = field(default_factory=dict)
    pending: list[_Call] = field(default_factory=list)
    pieces: dict[str, list[tuple[_Call, Tensor, Tensor]]] = field(default_factory=dict)
    muted: dict[str, bool] = field(default_factory=dict)  # called without gradients: in a reentrant checkpoint?
    finished: set[str] = field(default_factory=set)
    shared: dict[tuple[Any, ...], SharedInputs] = field(default_factory=dict)
    backward: bool = False
    regrouping: Regrouping | None = None
    masks: Tensor | Mapping[str, Tensor] | None = None
    rows: int = 0


class Recorder:
    """Runs forward and backward passes of a model and hands (a, g) of every tracked layer to a consumer."""

    def __init__(self, model: nn.Module, layers: Sequence[TrackedLayer], task: Task) -> None:
        self.model, self.layers, self.task = model, list(layers), task
        self._transforms = type(task).transform_gradient is not Task.transform_gradient
        self._copied: set[str] = set()  # layers whose input is overwritten after use
        self._checked: set[str] = set()  # subclasses whose forward was compared
        self._left_out: set[str] = set()
        self._sums = sum_type(model)  # half precision is summed in float32
        self._pass: _Pass | None = None
        self.observers: list[Callable[[TrackedLayer, Tensor, Tensor], None]] = []

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Install the taps, freeze the model and put it in eval mode; on exit everything is as found."""
        training = [(m, m.training) for m in self.model.modules()]
        # A module that the task holds is frozen too: the backward pass must leave no gradient on it.
        frozen = [self.model, *(value for value in getattr(self.task, "__dict__", {}).values() if isinstance(value, nn.Module))]
        required = [(p, p.requires_grad) for module in frozen for p in module.parameters()]
        handles: list[RemovableHandle] = []
        with torch.random.fork_rng(devices=_devices(self.model)):
            try:
                self.model.eval()
                for parameter, _ in required:
                    parameter.requires_grad_(False)
                for layer in self.layers:
                    for module in layer.modules:
                        # Before the owner's own hooks, which may change the output.
                        handles.append(module.register_forward_hook(self._tap(layer), with_kwargs=True, prepend=True))
                yield self
            finally:
                self._pass = None
                for handle in handles:
                    handle.remove()
                for parameter, flag in required:
                    parameter.requires_grad_(flag)
                for module, flag in training:
                    module.training = flag

    def leave_out(self, name: str) -> None:
        """Take no notice of a layer from now on."""
        self._left_out.add(name)

    @property
    def taken(self) -> list[TrackedLayer]:
        """The layers that are not left out."""
        return [layer for layer in self.layers if layer.name not in self._left_out]

    def run(self, batch: Batch, objective: Objective, consumer: Consumer) -> Tensor:
        """Run one batch forward and backward; return the objective's values `[example]`, detached.

        `consumer(layer, pair)` is called once per layer that took part, in the order of the backward pass.
        """
        try:
            values = self._forward(batch, objective, consumer)
            now = self._pass
            assert now is not None
            now.backward = True
            if values.requires_grad:
                with torch.enable_grad():
                    values.sum().backward()
            # What is left had a call whose output reached no loss.
            for name in list(now.pieces):
                self._complete(name)
            refuse_checkpointed(now.muted, now.finished)
            return values.detach()
        finally:
            self._pass = None

    def survey(self, batch: Batch) -> tuple[int, dict[str, set[int]]]:
        """Run a batch forward only; return its number of rows and the leading sizes each layer was called with."""
        leading: dict[str, set[int]] = {}
        self.observers.append(lambda layer, x, output: leading.setdefault(layer.name, set()).add(len(output) if output.dim() > 1 else 1))
        try:
            self._pass = _Pass(consumer=_ignore)
            with torch.enable_grad():
                self.task.loss(self.model, batch.data)
            ids = self.task.example_ids(batch.data)
            return len(batch.ids) if ids is None else len(ids), leading
        finally:
            self._pass = None
            self.observers.clear()

    def _forward(self, batch: Batch, objective: Objective, consumer: Consumer) -> Tensor:
        while True:
            now = self._pass = _Pass(consumer=consumer)
            now.masks = self.task.padding_mask(batch.data)
            with torch.enable_grad():
                values = objective(self.model, batch.data)
            if values.shape != (len(batch.ids),):
                raise DataError(
                    f"{type(self.task).__name__} gave a loss of shape {tuple(values.shape)} for {len(batch.ids)} rows; it must be "
                    f"one number per row of the data set, [{len(batch.ids)}], summed over the row's tokens and never over the batch."
                )
            overwritten = {call.layer.name for call in now.pending if call.overwritten}
            if not overwritten:
                break
            # A later in-place operation changed an input that was kept by reference: keep copies from now on.
            self._copied |= overwritten
        ids = self.task.example_ids(batch.data)
        now.regrouping = None if ids is None else Regrouping(ids, len(values))
        now.rows = len(values) if now.regrouping is None else now.regrouping.rows
        now.pending.clear()
        now.shared.clear()
        return values

    def _tap(self, layer: TrackedLayer) -> Callable[..., Tensor | None]:
        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return self._called(layer, module, args[0] if args else next(iter(kwargs.values())), output)

        return tap

    def _called(self, layer: TrackedLayer, module: nn.Module, x: Tensor, output: Tensor) -> Tensor | None:
        now = self._pass
        if now is None or layer.name in self._left_out:
            return None
        if not now.backward:  # checkpointing calls again in the backward pass
            now.calls[layer.name] = now.calls.get(layer.name, 0) + 1
        for observe in self.observers:
            observe(layer, x, output)
        if layer.own_forward and layer.name not in self._checked:
            self._check_forward(layer, module, x, output)
        if not torch.is_grad_enabled():
            if not now.backward:
                now.muted.setdefault(layer.name, in_reentrant_checkpoint())
            return None
        kept = x.detach()
        if layer.name in self._copied or now.backward:
            kept = kept.clone()
        call = _Call(layer, module, kept, kept._version, self._shared(now, layer, kept))
        rooted = output if output.requires_grad else output.detach().requires_grad_()
        # Nothing before this layer needs a gradient, so its output becomes a root of the graph; an in-place
        # operation on a root is an error, hence the copy.
        result = output if output.requires_grad else rooted.clone()
        result.register_hook(lambda g: self._gradient(call, g))
        if not now.backward:
            now.pending.append(call)
        return None if result is output else result

    def _shared(self, now: _Pass, layer: TrackedLayer, x: Tensor) -> SharedInputs | None:
        """Return the same object for all layers that read the same input; all of them are alive until the backward pass."""
        if now.backward or not layer.handler.plain or not layer.weight:
            return None
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, layer.bias)
        shared = now.shared.setdefault(key, SharedInputs())
        shared.readers += 1
        return shared

    def _gradient(self, call: _Call, g: Tensor) -> None:
        now = self._pass
        if now is None or call.x is None:
            return
        if not now.backward:
            raise LayerError(
                f"layer {call.layer.name!r}: the task takes a gradient through the model inside its loss. The loss's own gradient then "
                "is no sum over the layer's calls, and influence cannot be computed from it. Use a loss without that term."
            )
        if call.overwritten:
            raise LayerError(
                f"layer {call.layer.name!r}: its input was changed in place between the layer's call and its gradient. "
                "Replace the in-place operation on that tensor (for example x += y by x = x + y)."
            )
        x, call.x = call.x, None
        pieces = now.pieces.setdefault(call.layer.name, [])
        pieces.append((call, x, g.detach()))
        if len(pieces) == now.calls[call.layer.name]:
            self._complete(call.layer.name)

    def _complete(self, name: str) -> None:
        now = self._pass
        assert now is not None
        pieces = now.pieces.pop(name)
        now.finished.add(name)
        layer = pieces[0][0].layer
        with torch.no_grad():
            pairs = [self._pair(now, call, x, g) for call, x, g in pieces]
            now.consumer(layer, pairs[0] if len(pairs) == 1 else joined(pairs))

    def _pair(self, now: _Pass, call: _Call, x: Tensor, g: Tensor) -> Pair:
        layer, module = call.layer, call.module
        a, g = (part.to(self._sums) for part in (layer.handler.inputs(module, x), layer.handler.gradients(module, g)))
        if not self._transforms and len(g) != now.rows:
            raise LayerError(
                f"layer {layer.name!r} was called on {len(g)} rows, but the batch has {now.rows}. Its first axis must be "
                "the batch's: give the task example_ids(batch) that say which example each row belongs to, "
                f"or leave the layer out with layers=..."
            )
        if not layer.weight:
            a = a[..., :0]
        mask = mask_for(now.masks, layer.name, a.shape[:2])
        if now.regrouping is not None:
            a, g, mask = regrouped(now.regrouping, a, g, mask)
        # Groups before positions: a view for one group, and batched products for more.
        a, g = a.transpose(1, 2), g.transpose(1, 2)
        transform = (lambda gradient: self.task.transform_gradient(layer.name, gradient)) if self._transforms else None
        shared = call.shared if now.regrouping is None else None
        return Pair(a=a, g=g, bias=layer.bias, mask=mask, transform=transform, shared=shared)

    def _check_forward(self, layer: TrackedLayer, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """Compare a subclass with a forward of its own with what its parent class computes."""
        self._checked.add(layer.name)
        with torch.no_grad():
            expected = layer.handler.forward(module, x)
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise LayerError(
                f"layer {layer.name!r} is a {type(module).__name__} whose forward does not compute what "
                f"{layer.kind.__name__} does, so its gradient cannot be taken from that class. "
                "Leave it out with layers=..., or register a handler for its type."
            )


def _ignore(layer: TrackedLayer, pair: Pair) -> None:
    """Consume nothing."""


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
