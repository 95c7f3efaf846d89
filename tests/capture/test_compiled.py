"""Taps in a compiled model deliver what eager hooks see: every call once, for every size, without compiling for ever."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from whence.capture.compiled import CompiledTaps

pytestmark = [
    # Dynamo makes the objects that it warns of making, and asks tensors between two graphs for gradients they do not have.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

Pairs = dict[int, list[tuple[Tensor, Tensor]]]
SIZES = [(4, 7), (4, 7), (3, 5)]
INDUCTOR = pytest.param(
    "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")]
)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Kept:
    """A receiver that keeps copies."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.pairs: Pairs = {}

    def called(self, number: int, count: int) -> None:
        self.calls[number] += count

    def gradient(self, number: int, x: Tensor, g: Tensor) -> None:
        self.pairs.setdefault(number, []).append((x.clone(), g.clone()))


class Reuse(nn.Module):
    """A layer called twice on the same input and once on another, a call without a gradient, and what is asked for."""

    def __init__(self, *, inplace: bool = False, checkpointed: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.first, self.again, self.second, self.dead, self.last = (nn.Linear(*s) for s in ((5, 6), (6, 6), (6, 6), (6, 2), (6, 3)))
        self.relu, self.checkpointed, self.broken = nn.ReLU(inplace=inplace), checkpointed, broken

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(self.relu(self.again(h))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.relu(self.first(x))
        h = self.again(h) + self.again(h)
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        if self.broken:
            torch._dynamo.graph_break()
        return self.last(h), self.dead(h)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0].square().sum()


def layers_of(model: nn.Module) -> list[nn.Module]:
    kinds = ("Linear", "Conv1D", "LayerNorm", "Embedding")
    return [module for module in model.modules() if type(module).__name__ in kinds]


def eager_pairs(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Pairs:
    pairs: Pairs = {}

    def hook(number: int, x: Tensor, output: Tensor) -> Tensor:
        x, output = x.detach().clone(), (output if output.requires_grad else output.detach().requires_grad_()).clone()
        output.register_hook(lambda g: pairs.setdefault(number, []).append((x, g.clone())))
        return output

    handles = [
        layer.register_forward_hook(lambda _, args, output, number=number: hook(number, args[0], output))
        for number, layer in enumerate(layers_of(model))
    ]
    loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    return pairs


def assert_same(pairs: Pairs, wanted: Pairs, tolerance: float) -> None:
    # A compiled graph gives zeros to what the loss does not depend on, where eager hooks are not called.
    pairs = {number: [pair for pair in many if pair[1].any()] for number, many in pairs.items()}
    assert {number: len(many) for number, many in pairs.items() if many} == {number: len(many) for number, many in wanted.items()}
    for number, many in wanted.items():
        # The order of a layer's calls is free.
        found, expected = (
            sorted(some, key=lambda pair: float(pair[0].double().sum() + pair[1].double().sum())) for some in (pairs[number], many)
        )
        for (x, g), (x_wanted, g_wanted) in zip(found, expected, strict=True):
            torch.testing.assert_close(x, x_wanted, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(g, g_wanted, rtol=tolerance, atol=tolerance)


class Tapped:
    """A frozen model with taps, compiled."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, backend: str) -> None:
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.taps = CompiledTaps(model)
        # Kept, so that the same hooks come back.
        self.hooks = [self.hook(number) for number in range(len(layers_of(model)))]
        self.compiled = self.taps.compile(model, backend)

    def hook(self, number: int) -> Callable[..., Tensor]:
        return lambda _, args, output: self.taps.tap(output, args[0], number)

    def run(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Kept:
        kept = Kept()
        handles = [layer.register_forward_hook(hook, prepend=True) for layer, hook in zip(layers_of(self.model), self.hooks, strict=True)]
        try:
            with self.taps.receiving(kept):
                loss(self.compiled, batch).backward()
        finally:
            for handle in handles:
                handle.remove()
        return kept


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(*size, 5, dtype=dtype) for size in SIZES]


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"checkpointed": True}, {"checkpointed": True, "inplace": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_every_call_is_delivered_once(backend: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    tapped = Tapped(Reuse(**options), dtype, backend)
    for x in inputs(dtype) * 2:
        wanted = eager_pairs(tapped.model, x, squares)
        kept = tapped.run(x, squares)
        assert_same(kept.pairs, wanted, TOLERANCE[dtype])
        assert kept.calls == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1}
    assert counters["stats"]["unique_graphs"] == 2, "one for the first size, one for all others"
    assert not counters["graph_break"]


def test_a_graph_break_loses_nothing() -> None:
    tapped = Tapped(Reuse(broken=True), torch.float64, "aot_eager")
    for x in inputs():
        kept = tapped.run(x, squares)
        assert_same(kept.pairs, eager_pairs(tapped.model, x, squares), 1e-9)
        assert kept.calls == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1}
    assert counters["graph_break"]


def test_when_compiling_is_given_up_the_taps_still_deliver() -> None:
    tapped = Tapped(Reuse(), torch.float64, "aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for x in inputs():
            kept = tapped.run(x, squares)
            assert_same(kept.pairs, eager_pairs(tapped.model, x, squares), 1e-9)
            assert kept.calls == {0: 1, 1: 3, 2: 1, 3: 1, 4: 1}
    assert counters["stats"]["unique_graphs"] == 1


def test_many_sizes_need_few_graphs() -> None:
    tapped = Tapped(Reuse(), torch.float64, "aot_eager")
    for rows in (4, 3, 1, 2, 6):
        for length in (7, 5, 1, 2):
            assert tapped.run(torch.randn(rows, length, 5, dtype=torch.float64), squares).pairs.keys() >= {0, 1, 2, 4}
    # A size is a constant, a variable or one; at eight graphs torch would give up and run the model uncompiled.
    assert counters["stats"]["unique_graphs"] < 8


def test_graphs_compiled_elsewhere_are_not_taken_for_these() -> None:
    """The compiler's cache does not look at hooks; each wrapper must find its own graphs, and others theirs."""
    model, x = Reuse().double().eval().requires_grad_(False), inputs()[0]
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    others = torch.compile(model, backend="aot_eager")
    assert not others(x)[0].requires_grad
    tapped = Tapped(model, torch.float64, "aot_eager")
    for taps in (tapped, Tapped(model, torch.float64, "aot_eager")):
        assert taps.run(x, squares).calls.total() == 7
    kept = Kept()
    with tapped.taps.receiving(kept):
        assert not others(x)[0].requires_grad
        assert not torch.compile(model, backend="eager")(x)[0].requires_grad
    assert not kept.calls
    del model._is_torch_compile  # by torch.compile above
    assert names == {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_wrapper_leaves_nothing_on_the_model_and_passes_attributes_on() -> None:
    model = Reuse().double().eval().requires_grad_(False)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    tapped = Tapped(model, torch.float64, "aot_eager")
    tapped.run(inputs()[0], squares)
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}
    assert tapped.compiled.relu is model.relu
    assert tapped.compiled.checkpointed is False
    assert all(anchor.grad is None for anchor in tapped.taps._anchors.values())


def test_without_a_receiver_nothing_is_delivered_and_an_error_of_a_receiver_arrives() -> None:
    class Refusing(Kept):
        def gradient(self, number: int, x: Tensor, g: Tensor) -> None:
            raise KeyError(number)

    tapped, x = Tapped(Reuse(), torch.float64, "aot_eager"), inputs()[0]
    tapped.run(x, squares)
    for layer, hook in zip(layers_of(tapped.model), tapped.hooks, strict=True):
        layer.register_forward_hook(hook)
    squares(tapped.compiled, x).backward()
    with pytest.raises(KeyError), tapped.taps.receiving(Refusing()):
        squares(tapped.compiled, x).backward()
    inner, outer = Kept(), Kept()
    with tapped.taps.receiving(outer):
        with tapped.taps.receiving(inner):
            squares(tapped.compiled, x).backward()
        squares(tapped.compiled, x).backward()
    assert inner.calls == outer.calls


def test_several_backward_passes_of_one_forward_pass() -> None:
    def total(model: nn.Module, x: Tensor) -> Tensor:
        values = model(x)[0].square().sum((1, 2))
        values[0].backward(retain_graph=True)
        return values[1:].sum()

    kept = Tapped(Reuse(), torch.float64, "aot_eager").run(inputs()[0], total)
    assert {number: len(pairs) for number, pairs in kept.pairs.items()} == {0: 2, 1: 6, 2: 2, 3: 2, 4: 2}


def transformer(name: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "attn_implementation": attention}
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, **common)
        return transformers.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **sizes, **common))


def log_probability(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(model(**batch).logits, -1)[..., 0].sum()


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("backend", "dtype"), [("aot_eager", torch.float64), ("inductor", torch.float32)])
def test_transformers(name: str, attention: str, backend: str, dtype: torch.dtype) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    tapped = Tapped(transformer(name, attention), dtype, backend)
    for rows, length in SIZES:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, -2:] = 0
        batch = {"input_ids": torch.randint(2, 50, (rows, length)), "attention_mask": mask}
        kept = tapped.run(batch, log_probability)
        assert_same(kept.pairs, eager_pairs(tapped.model, batch, log_probability), TOLERANCE[dtype])
        assert tapped.compiled.config is tapped.model.config
        assert kept.calls == {number: len(pairs) for number, pairs in kept.pairs.items()}
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
