"""Which layers are tracked, and the honest account of what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from whence.capture.layers import Handler, LayerParts, handler_for
from whence.errors import LayerError


def sum_type(model: nn.Module) -> torch.dtype:
    """Return the type that sums are kept in: the model's, but float32 at least."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class TrackedLayer:
    """One set of parameters and every module that carries it (more than one if parameters are tied).

    `weight` and `bias` say which of the two is tracked; a bias is a column of ones in the inputs.
    """

    name: str
    modules: tuple[nn.Module, ...] = field(repr=False)
    handler: Handler = field(repr=False)
    kind: type[nn.Module] = field(repr=False)
    parts: LayerParts
    weight: bool
    bias: bool

    @property
    def inputs(self) -> int:
        """Features of the input, with the column of ones."""
        return self.weight * self.parts.inputs + self.bias

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[group, out, in]` of a gradient."""
        return self.parts.groups, self.parts.outputs, self.inputs

    @property
    def parameters(self) -> int:
        """Number of tracked parameters."""
        groups, outputs, inputs = self.shape
        return groups * outputs * inputs

    @property
    def own_forward(self) -> bool:
        """Whether a module is of a subclass with a forward of its own, whose result must be checked."""
        return any(type(m).forward is not self.kind.forward for m in self.modules)


@dataclass
class Coverage:
    """The share of the model's trainable parameters that is attributed, and what is left out with the reason."""

    tracked: dict[str, int]
    trainable: int
    left_out: list[tuple[str, str]]

    @property
    def share(self) -> float:
        """Tracked parameters over trainable ones."""
        return sum(self.tracked.values()) / self.trainable if self.trainable else 0.0

    def drop(self, name: str, reason: str) -> None:
        """Move a layer that turned out not to be attributable to what is left out."""
        if self.tracked.pop(name, None) is not None:
            self.left_out.append((name, reason))

    def __str__(self) -> str:
        """One line, and one for each reason why something is left out."""
        lines = [f"Attributed: {sum(self.tracked.values()):,} of {self.trainable:,} trainable parameters "
                 f"({self.share:.1%}), {len(self.tracked)} layers."]  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            lines.append(f"Left out, {reason}: {shown}.")
        return "\n".join(lines)


def track(model: nn.Module, layers: str | Sequence[str] | None = None) -> tuple[list[TrackedLayer], Coverage]:
    """Find the layers to track.

    `layers` is None (every layer that has a handler and a parameter that requires a gradient, without output heads
    as wide as the vocabulary), `"all"` (those heads too), or names and patterns as of the shell.

    Raises:
        LayerError: nothing is tracked, a pattern matches nothing, or a layer that was named cannot be tracked.
    """
    named = None if layers is None or layers == "all" else [layers] if isinstance(layers, str) else list(layers)
    modules = {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    left_out: list[tuple[str, str]] = []
    wanted = _matching(modules, named) if named is not None else modules
    heads = () if layers == "all" or named is not None else _vocabulary_heads(model)
    owners = _owners(modules)
    found: dict[tuple[int, ...], TrackedLayer] = {}
    for name, module in wanted.items():
        reason = _reason_against(module, named is not None, heads, owners)
        if reason is None:
            _add(found, name, module)
        else:
            left_out.append((name, reason))
    if named is not None:
        left_out += [(name, "not among layers=...") for name in modules.keys() - wanted.keys()]
    tracked = list(found.values())
    if not tracked or (named is not None and any(name in wanted for name, _ in left_out)):
        raise LayerError(_nothing_tracked(tracked, [entry for entry in left_out if entry[0] in wanted]))
    return tracked, _coverage(model, tracked, left_out)


def _matching(modules: dict[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in modules)]
    if idle or not patterns:
        listed = ", ".join(map(repr, list(modules)[:20])) + ("..." if len(modules) > 20 else ".")
        problem = f"{', '.join(map(repr, idle))} matches no layer" if patterns else "it names none"
        raise LayerError(f"layers={list(patterns)!r}: {problem}. The model's layers with parameters are: {listed}")
    return {name: m for name, m in modules.items() if any(fnmatchcase(name, p) for p in patterns)}


def _vocabulary_heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """Output heads as wide as the vocabulary; Hugging Face models say where theirs is."""
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return () if head is None else (head,)


def _key(module: nn.Module) -> tuple[int, ...]:
    return tuple(id(p) for p in module.parameters(recurse=False))


def _owners(modules: dict[str, nn.Module]) -> dict[int, set[object]]:
    """For every parameter, the different kinds of layer and parameter sets it is part of: more than one is a partial tie."""
    owners: dict[int, set[object]] = {}
    for module in modules.values():
        handled = handler_for(module)
        for parameter in _key(module):
            owners.setdefault(parameter, set()).add((_key(module), type(module) if handled is None else handled[1]))
    return owners


def _reason_against(module: nn.Module, named: bool, heads: tuple[nn.Module, ...], owners: dict[int, set[object]]) -> str | None:
    own = list(module.parameters(recurse=False))
    if not named and not any(p.requires_grad for p in own):
        return "frozen"
    if handler_for(module) is None:
        return f"no handler for {type(module).__name__}"
    if any(module is head for head in heads):
        return "an output head as wide as the vocabulary (layers='all' tracks it)"
    if {n for n, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
        return "parameters besides weight and bias"
    if any(len(owners[id(p)]) > 1 for p in own):
        return "a parameter shared with a layer of another kind or bias"
    return None


def _add(found: dict[tuple[int, ...], TrackedLayer], name: str, module: nn.Module) -> None:
    key = _key(module)
    if key in found:
        first = found[key]
        found[key] = replace(first, modules=(*first.modules, module))
        return
    handled = handler_for(module)
    assert handled is not None  # _reason_against has looked
    handler, kind = handled
    own = dict(module.named_parameters(recurse=False))
    # A layer named by hand though frozen is tracked whole.
    trained = {n for n, p in own.items() if p.requires_grad} or set(own)
    found[key] = TrackedLayer(
        name=name,
        modules=(module,),
        handler=handler,
        kind=kind,
        parts=handler.parts(module),
        weight="weight" in trained,
        bias="bias" in trained,
    )


def _nothing_tracked(tracked: list[TrackedLayer], refused: list[tuple[str, str]]) -> str:
    listed = "; ".join(f"{name!r}: {reason}" for name, reason in refused[:8])
    if tracked:
        return f"layers=... names layers that cannot be tracked ({listed}). Name others, or leave layers out for the default."
    return (
        f"no layer of the model can be tracked ({listed or 'it has no parameters'}). "
        "whence tracks Linear, Hugging Face Conv1D and Conv2d layers with a parameter that requires a gradient."
    )


def _coverage(model: nn.Module, tracked: list[TrackedLayer], left_out: list[tuple[str, str]]) -> Coverage:
    # Frozen layers that were named by hand count as if they were trained.
    own = [list(layer.modules[0].parameters(recurse=False)) for layer in tracked]
    thawed = {id(p) for parameters in own if not any(p.requires_grad for p in parameters) for p in parameters}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad or id(p) in thawed)
    return Coverage(tracked={layer.name: layer.parameters for layer in tracked}, trainable=trainable, left_out=left_out)
