"""Taps that survive torch.compile: the pairs (input, gradient of the output) of a compiled model, handed to Python.

Dynamo traces a module's forward hooks into its graphs, so what a hook does in Python happens once, when a graph is
made. `CompiledTaps.tap` therefore leaves two things in the graph: an identity whose derivative calls the operator
`whence::deliver`, which at run time finds the current receiver and hands it the pair, and a number that says which
layer it was. Three facts of the compiler shape it:

* Parameters are frozen, so nothing would need a gradient. Every tap also reads an anchor, a scalar that does; an
  anchor's gradient (zero) is what the operator returns, so that no delivery is dead code.
* Operators without side effects are merged when their arguments are equal, as those of two equal calls are. The
  compiler takes `torch.empty` to be different each time, so one of them is an argument. Declaring a side effect
  would also do, but checkpointed regions cannot hold one (torch 2.13).
* Nothing in a graph can count the calls in the forward pass (the compiler moves such an operator to the backward
  pass, where its result is used). Each graph's taps are counted when it is made, and reported when it runs.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

_KEYS = itertools.count()
_RECEIVERS: dict[int, Receiver] = {}  # by the key of the taps; not thread-local, as CUDA's backward pass has threads of its own
_LIBRARY = torch.library.Library("whence", "DEF")
_LIBRARY.define("deliver(Tensor x, Tensor g, Tensor unique, int key, int number) -> Tensor")


class Receiver(Protocol):
    """Who takes the pairs."""

    def called(self, number: int, count: int) -> None:
        """Tap `number` takes part `count` more times in the forward pass that is beginning or under way.

        Gradient checkpointing outside a compiled graph runs forward passes again during the backward pass, and reports them again.
        """

    def gradient(self, number: int, x: Tensor, g: Tensor) -> None:
        """Take one call's input and the gradient of its output.

        Both are valid until this method returns: the compiled backward pass overwrites their memory. Copy what is to be
        kept, and change neither.
        """


class CompiledTaps:
    """The taps of one model, compiled or not.

    Args:
        model: the module whose hooks call `tap`; its parameters and buffers say which devices it lies on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._key = next(_KEYS)
        devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
        self._anchors = {str(device): torch.zeros((), device=device, requires_grad=True) for device in devices}

    def tap(self, output: Tensor, x: Tensor, number: int) -> Tensor:
        """Return `output` with a tap on it; to be returned by a forward hook in its place.

        Args:
            output: what the module returned, of any shape, on one of the model's devices.
            x: the input that the receiver is to get; also one without gradients, such as token ids.
            number: what the receiver is told; a constant of the hook.
        """
        if not torch.is_grad_enabled():
            return output
        if not torch.compiler.is_compiling():
            _called(self._key, {number: 1})
        result: Tensor = _Tap.apply(output, x.detach(), self._anchors[str(output.device)], self._key, number)  # type: ignore[no-untyped-call]
        return result

    @contextmanager
    def receiving(self, receiver: Receiver) -> Iterator[None]:
        """Hand pairs to `receiver` meanwhile; outside, taps deliver to nobody. The innermost receiver is the current one."""
        before = _RECEIVERS.get(self._key)
        _RECEIVERS[self._key] = receiver
        try:
            yield
        finally:
            for anchor in self._anchors.values():
                anchor.grad = None
            if before is None:
                del _RECEIVERS[self._key]
            else:
                _RECEIVERS[self._key] = before

    def compile(self, model: nn.Module, backend: str = "inductor", dynamic: bool | None = None) -> nn.Module:
        """Return a wrapper of `model` that compiles it when it is first called; the model itself is left as it is.

        Install the hooks before the first call, and use the wrapper only while they are there: torch does not look
        again whether hooks came or went. The same hooks may be removed and installed again between calls.
        The wrapper passes attributes on, so that `wrapper.config` is the model's. After eight graphs of one function torch
        runs it uncompiled, with the same pairs.

        Args:
            model: the model with the hooks.
            backend: a name among `torch._dynamo.list_backends(None)`; `"aot_eager"` needs no C++ compiler.
            dynamic: None: sizes become variables with their second value, which costs another compilation; True: from the
                start. A size of one is a case of its own.
        """
        compile_graph = torch._dynamo.lookup_backend(backend)

        # A function of its own for every wrapper: torch's cache of graphs, which ignores hooks, distinguishes backends by
        # identity, so a graph of the same model compiled elsewhere without taps is never taken for this one, nor this for that.
        def tapped(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            calls = _taps_in(graph)
            with warnings.catch_warnings(), torch._functorch.config.patch(donated_buffer=False):
                # The compiler's own imports, and a remark on TF32, which the caller chose by choosing the precision.
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
                compiled = compile_graph(graph, inputs)

            def run(*arguments: Any) -> Any:
                _called(self._key, calls)
                return compiled(*arguments)

            return run if calls else compiled

        marked = "_is_torch_compile" in vars(model)
        wrapper = cast(nn.Module, torch.compile(model, backend=tapped, dynamic=dynamic))
        if not marked and "_is_torch_compile" in vars(model):
            del model._is_torch_compile  # torch means to mark the wrapper, which passes attributes on
        return wrapper


_MARK = "_dynamo_static_input_type"


@contextmanager
def without_marks(model: nn.Module) -> Iterator[None]:
    """Take off, at the end, the marks that the compiler leaves on parameters and buffers; it does without them."""
    tensors = [*model.parameters(), *model.buffers()]
    marked = {id(tensor) for tensor in tensors if hasattr(tensor, _MARK)}
    try:
        yield
    finally:
        for tensor in tensors:
            if hasattr(tensor, _MARK) and id(tensor) not in marked:
                delattr(tensor, _MARK)


class _Tap(torch.autograd.Function):
    """The identity, whose derivative delivers the pair."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, key: int, number: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.key, ctx.number = key, number
        # A view must not be changed in place, as an activation may do. Inductor leaves the copy out.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        unique = torch.empty((), device=g.device)
        return g, None, torch.ops.whence.deliver(x, g, unique, ctx.key, ctx.number), None, None


def _deliver(x: Tensor, g: Tensor, unique: Tensor, key: int, number: int) -> Tensor:
    receiver = _RECEIVERS.get(key)
    if receiver is not None:
        receiver.gradient(number, x.detach(), g.detach())
    return torch.zeros_like(unique)


def _deliver_fake(x: Tensor, g: Tensor, unique: Tensor, key: int, number: int) -> Tensor:
    return torch.empty_like(unique)


_LIBRARY.impl("deliver", _deliver, "CompositeExplicitAutograd")
torch.library.register_fake("whence::deliver", _deliver_fake, lib=_LIBRARY)


def _called(key: int, calls: dict[int, int]) -> None:
    receiver = _RECEIVERS.get(key)
    if receiver is not None:
        for number, count in calls.items():
            receiver.called(number, count)


def _taps_in(graph: fx.GraphModule) -> Counter[int]:
    """Count the taps in a graph and in the graphs that it calls, checkpointed regions for example, by number."""
    found: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in {torch.ops.whence.deliver, torch.ops.whence.deliver.default}:
            found[node.args[-1]] += 1
        for argument in node.all_input_nodes:
            inner = operator.attrgetter(argument.target)(graph) if argument.op == "get_attr" else None
            if isinstance(inner, fx.GraphModule):
                found += _taps_in(inner)
    return found
