"""Forward and backward passes that hand every tracked layer's gradient to a consumer.

A layer is handed over as soon as the backward pass has given the gradients of all its calls. Parameters are frozen
meanwhile: autograd computes no weight gradient, and stops at the earliest tracked layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture import taps
from whence.capture.assemble import token_axis
from whence.capture.checkpoints import refuse_checkpointed
from whence.capture.compiled import CompiledTaps, without_marks
from whence.capture.deliver import Delivery
from whence.capture.formed import Formed
from whence.capture.options import CaptureOptions
from whence.capture.regroup import Regrouping
from whence.capture.singles import single_gradients
from whence.capture.sites import Site
from whence.capture.state import Call, Consumer, Pass
from whence.capture.tracking import TrackedLayer, sum_type
from whence.errors import DataError, LayerError
from whence.runtime.batches import Batch
from whence.tasks import Task

Objective = Callable[[nn.Module, Any], Tensor]
ObjectiveOf = Callable[[Batch], Objective]
"""The objective for one batch; label sampling depends on the ids of its examples."""

Programs = dict[tuple[int, ...], tuple[CompiledTaps, nn.Module, taps.Hooks]]
"""Compiled models, by the modules that are tapped: with the same hooks the compiler's work is used again."""

LARGEST_LOSS_SCALE = 2.0**16


class Recorder:
    """Runs forward and backward passes of a model and hands every tracked layer's gradient to a consumer.

    `loss_scale` multiplies the loss in float16, whose small gradients would vanish, and is taken off again.
    `with_tokens`: number the positions on the batch's token axis.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[TrackedLayer],
        task: Task,
        *,
        options: CaptureOptions | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.layers, self.task = model, list(layers), task
        self.options = options = options or CaptureOptions()
        self.sums = sum_type(model)  # half precision is summed in float32
        transform = task.transform_gradient if type(task).transform_gradient is not Task.transform_gradient else None
        self.transformed = transform is not None
        self.scales = scales or {}
        self._delivery = Delivery(sums=self.sums, half=options.half, transform=transform, scales=self.scales)
        narrow = options.precision == "float16" or any(p.dtype == torch.float16 for p in model.parameters())
        self.loss_scale, self.least_loss_scale = (LARGEST_LOSS_SCALE, 1 / LARGEST_LOSS_SCALE) if narrow else (1.0, 1.0)
        self.with_tokens = False
        self.taps = taps.Taps(self._arrived, offload=options.offload)
        self._runs = model  # what is called: the model, or its compiled form
        self._hooks = ExitStack()

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Install the taps, freeze the model and put it in eval mode; on exit everything is as found."""
        training = [(m, m.training) for m in self.model.modules()]
        # A module that the task holds is frozen too: the backward pass must leave no gradient on it.
        frozen = [self.model, *(value for value in getattr(self.task, "__dict__", {}).values() if isinstance(value, nn.Module))]
        required = [(p, p.requires_grad) for module in frozen for p in module.parameters()]
        fast = torch.backends.mha.get_fastpath_enabled()
        with torch.random.fork_rng(devices=_devices(self.model)), self._hooks:
            try:
                self.model.eval()
                # The fused encoder layer calls none of its modules.
                torch.backends.mha.set_fastpath_enabled(False)
                for parameter, _ in required:
                    parameter.requires_grad_(False)
                taps.install(self._hooks, taps.hooks(self.layers, self.taps.tap))
                yield self
            finally:
                self.taps.now = None
                torch.backends.mha.set_fastpath_enabled(fast)
                for parameter, flag in required:
                    parameter.requires_grad_(flag)
                for module, flag in training:
                    module.training = flag

    def compile(self, programs: Programs) -> None:
        """From now on run the model, with taps of another kind, through the compiler; `programs` keeps what was compiled."""
        self._hooks.close()
        self._hooks.enter_context(without_marks(self.model))
        sites = [(layer, site) for layer in self.taken for site in layer.sites]
        key = tuple(id(site.module) for _, site in sites)
        if key not in programs:
            made = CompiledTaps(self.model)
            numbers = {(layer.name, id(site)): number for number, (layer, site) in enumerate(sites)}

            def tap(layer: TrackedLayer, site: Site, x: Tensor, output: Tensor) -> Tensor:
                return made.tap(output, x, numbers[layer.name, id(site)])

            programs[key] = made, made.compile(self.model), taps.hooks(self.taken, tap)
        compiled, self._runs, hooks = programs[key]
        taps.install(self._hooks, hooks)
        self._hooks.enter_context(compiled.receiving(_Receiver(self, sites)))

    def leave_out(self, name: str) -> None:
        """Take no notice of a layer from now on."""
        self.taps.left_out.add(name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def taken(self) -> list[TrackedLayer]:
        """The layers that are not left out."""
        return [layer for layer in self.layers if layer.name not in self.taps.left_out]

    def run(self, batch: Batch, objective: ObjectiveOf, consumer: Consumer) -> Tensor:
        """Run one batch forward and backward; return the objective's values `[example]`, detached.

        `consumer(layer, gradient)` is called once per layer that took part, in the order of the backward pass.
        """
        try:
            values = self._forward(batch, objective(batch), consumer)
            now = self.taps.now
            assert now is not None
            now.backward = True
            if values.requires_grad:
                with torch.enable_grad():
                    (values.sum() * self.loss_scale).backward()
            self._unfinished(now)
        finally:
            self.taps.now = None
        self.run_singles(batch, objective, consumer)
        return values.detach()

    @contextmanager
    def forward(self, batch: Batch, objective: Objective) -> Iterator[Callable[[Tensor, Tensor, Consumer], None]]:
        """Run one batch forward, and give `backward(output, gradient, consumer)` over its graph, which may be called many times.

        Layers without a handler take no part; see `run_singles`.
        """
        try:
            self._forward(batch, objective, _ignore)
            assert self.taps.now is not None
            self.taps.now.repeated = True
            yield partial(self._backward_again, self.taps.now)
        finally:
            self.taps.now = None

    def _backward_again(self, now: Pass, output: Tensor, gradient: Tensor, consumer: Consumer) -> None:
        now.consumer, now.backward = consumer, True
        now.finished.clear()
        with torch.enable_grad():
            torch.autograd.backward(output, gradient, retain_graph=True)
        self._unfinished(now)

    def _unfinished(self, now: Pass) -> None:
        """Hand over what is left: layers with a call whose output reached no loss."""
        for name in list(now.pieces):
            self._complete(name)
        refuse_checkpointed(now.muted, now.finished)

    def run_singles(self, batch: Batch, objective: ObjectiveOf, consumer: Consumer) -> None:
        """Hand over the gradients of layers without a handler, one example at a time."""
        alone = [layer for layer in self.taken if layer.alone is not None]
        if not alone:
            return
        found = single_gradients(self.model, alone, batch, objective, self.sums)
        with torch.no_grad():
            for layer in alone:
                if layer.name in found:
                    consumer(layer, Formed(gradient=self._delivery.finished(layer, found.pop(layer.name))))

    def survey(self, batch: Batch, *, lenient: bool) -> tuple[int, dict[str, set[int]]]:
        """Run a batch forward only; return its number of rows and the leading sizes each layer was called with.

        `lenient`: note layers whose forward is not that of their kind in `taps.strangers`, where else they are an error.
        """
        leading: dict[str, set[int]] = {}

        def observe(layer: TrackedLayer, x: Tensor, output: Tensor) -> None:
            leading.setdefault(layer.name, set()).add(len(output) if output.dim() > 1 else 1)

        self.taps.observers.append(observe)
        try:
            self.taps.now = Pass(consumer=_ignore, lenient=lenient, watched=True)
            with torch.enable_grad():
                self.task.loss(self.model, batch.data)
            self.taps.overwritten()
            ids = self.task.example_ids(batch.data)
            return len(batch.ids) if ids is None else len(ids), leading
        finally:
            self.taps.now = None
            self.taps.observers.clear()

    def _forward(self, batch: Batch, objective: Objective, consumer: Consumer) -> Tensor:
        while True:
            now = self.taps.now = Pass(consumer=consumer)
            now.masks = self.task.padding_mask(batch.data)
            now.tokens = token_axis(now.masks, batch.data) if self.with_tokens else None
            with torch.enable_grad(), self._context():
                values = objective(self._runs, batch.data)
            if values.shape != (len(batch.ids),):
                raise DataError(
                    f"{type(self.task).__name__} gave a loss of shape {tuple(values.shape)} for {len(batch.ids)} rows; it must be "
                    f"one number per row of the data set, [{len(batch.ids)}], summed over the row's tokens and never over the batch."
                )
            # A later in-place operation may have changed an input that was kept by reference: then again, with copies.
            if not self.taps.overwritten():
                break
        ids = self.task.example_ids(batch.data)
        now.regrouping = None if ids is None else Regrouping(ids, len(values))
        now.rows = len(values) if now.regrouping is None else now.regrouping.rows
        now.pending.clear()
        now.shared.clear()
        return values

    @contextmanager
    def _context(self) -> Iterator[None]:
        """What a forward pass runs under: autocast on a GPU, saved tensors on the CPU."""
        device = self.device.type
        half = self.options.half
        cast: AbstractContextManager[Any] = nullcontext() if half is None or device == "cpu" else torch.autocast(device, half)
        pinned = device == "cuda"
        saved: AbstractContextManager[Any] = torch.autograd.graph.save_on_cpu(pinned) if self.options.offload else nullcontext()
        with cast, saved:
            yield

    def _arrived(self, call: Call, g: Tensor | None) -> None:
        """Take the gradient of a call's output; None where a function of the model's says that there is none."""
        now = self.taps.now
        if now is None or call.x is None or g is None:
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
        x = call.x.to(g.device, non_blocking=True)
        if not now.repeated:
            call.x = None
        pieces = now.pieces.setdefault(call.layer.name, [])
        pieces.append((call, x, g.detach()))
        if len(pieces) == now.calls[call.layer.name]:
            self._complete(call.layer.name)

    def _complete(self, name: str) -> None:
        now = self.taps.now
        assert now is not None
        pieces = now.pieces.pop(name)
        now.finished.add(name)
        with torch.no_grad():
            now.consumer(pieces[0][0].layer, self._delivery.gradient(now, pieces, self.loss_scale))


class _Receiver:
    """Takes the pairs of a compiled model, by the numbers of their taps."""

    def __init__(self, recorder: Recorder, sites: Sequence[tuple[TrackedLayer, Site]]) -> None:
        self.recorder, self.sites = recorder, sites

    def called(self, number: int, count: int) -> None:
        """Count calls of the forward pass."""
        now = self.recorder.taps.now
        if now is not None and not now.backward:
            name = self.sites[number][0].name
            now.calls[name] = now.calls.get(name, 0) + count

    def gradient(self, number: int, x: Tensor, g: Tensor) -> None:
        """Take copies: the compiled backward pass uses the memory again."""
        self.recorder._arrived(Call(*self.sites[number], x.clone(), 0), g.clone())


def _ignore(layer: TrackedLayer, gradient: object) -> None:
    """Consume nothing."""


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
