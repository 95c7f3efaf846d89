"""Which layers are tracked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from whence.capture.contract import Sides
from whence.capture.coverage import Coverage
from whence.capture.layers import LayerParts
from whence.capture.sites import Site, find_sites
from whence.errors import LayerError

WIDEST_BASIS = 16_384
"""Widest side that gets eigenvectors; a wider one keeps the identity basis."""

HEAD = "an output head as wide as the vocabulary (layers='all' tracks it)"
EMBEDDING = "an embedding (layers='all' tracks it)"
FROZEN = "frozen"
OTHERS = "not among layers=..."


def sum_type(model: nn.Module) -> torch.dtype:
    """Return the type that sums are kept in: the widest of the model's floating types, but float32 at least."""
    kept = torch.float32
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kept = torch.promote_types(kept, parameter.dtype)
    return kept


@dataclass(frozen=True, kw_only=True)
class TrackedLayer:
    """One set of parameters and every site that uses it (more than one if parameters are tied).

    `weight` and `bias` say which of the two is tracked; a bias is a column of ones in the inputs. `alone` is the one
    parameter of a layer that has no handler: its gradients come from batches of one, through autograd.
    """

    name: str
    sites: tuple[Site, ...] = field(default=(), repr=False)
    parts: LayerParts
    weight: bool
    bias: bool
    alone: nn.Parameter | None = field(default=None, repr=False)

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

    def layout(self, values: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes in the layout of a gradient, `[group, out, in]`."""
        if self.alone is not None:
            return values(self.alone).reshape(1, -1, 1)
        site = self.sites[0]
        parts = []
        if self.weight and site.weight is not None:
            parts.append(site.handler.matrix(site.module, site.handler.share(site.module, values(site.weight))))
        if self.bias and site.bias is not None:
            parts.append(site.handler.share(site.module, values(site.bias)).reshape(self.parts.groups, self.parts.outputs, 1))
        return torch.cat(parts, dim=2)

    @property
    def sides(self) -> Sides:
        """Which sides can have eigenvectors: not one of one-hot inputs, not one too wide, none without a handler."""
        if self.alone is not None:
            return Sides(inputs=False, outputs=False)
        one_hot = any(site.handler.one_hot for site in self.sites)
        return Sides(inputs=not one_hot and self.inputs <= WIDEST_BASIS, outputs=self.parts.outputs <= WIDEST_BASIS)


def track(model: nn.Module, layers: str | Sequence[str] | None = None, *, fallback: bool = False) -> tuple[list[TrackedLayer], Coverage]:
    """Find the layers to track.

    Args:
        model: any module.
        layers: None (every layer that has a handler and a parameter that requires a gradient, without embeddings and output
            heads as wide as the vocabulary), `"all"` (those too), or names and patterns as of the shell.
        fallback: also track every other parameter that is wanted, at the cost of one backward pass per example.

    Raises:
        LayerError: nothing is tracked, a pattern matches nothing, or a layer that was named cannot be tracked.
    """
    named = None if layers is None or layers == "all" else [layers] if isinstance(layers, str) else list(layers)
    sites, refused = find_sites(model)
    wanted = None if named is None else _matching(model, sites, refused, named)
    heads = _vocabulary_heads(model) if layers is None else ()
    found: dict[tuple[object, ...], TrackedLayer] = {}
    left_out: dict[str, str] = {}
    for site in sites:
        reason = OTHERS if wanted is not None and site.name not in wanted else _reason_against(site, layers, heads)
        if reason is None:
            _add(found, site)
        else:
            left_out.setdefault(site.name, reason)
    left_out |= _refused(model, refused, wanted)
    handled = {id(p) for layer in found.values() for site in layer.sites for p in site.parameters}
    alone = _alone(model, left_out, wanted, handled) if fallback else []
    tracked = [*found.values(), *alone]
    given_up = {name: reason for name, reason in left_out.items() if wanted is None or reason != OTHERS}
    if not tracked or (wanted is not None and given_up):
        raise LayerError(_nothing_tracked(tracked, list(given_up.items())))
    return tracked, _coverage(model, tracked, _named(model, left_out))


def _named(model: nn.Module, left_out: dict[str, str]) -> list[tuple[str, str]]:
    """Return names and reasons; of a module that is more than its own parameters, these parameters are named."""
    modules, named = dict(model.named_modules()), []
    for name, reason in left_out.items():
        module = modules.get(name)
        if module is not None and reason.startswith("no handler") and any(True for _ in module.children()):
            named += [(_join(name, own), reason) for own, _ in module.named_parameters(recurse=False)]
        else:
            named.append((name, reason))
    return named


def _matching(model: nn.Module, sites: Sequence[Site], refused: dict[str, str], patterns: Sequence[str]) -> set[str]:
    """Return the names that the patterns match: of layers, of modules with parameters, and of parameters without a layer."""
    modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    bare = [_join(name, own) for name in refused for own, _ in model.get_submodule(name).named_parameters(recurse=False)]
    names = dict.fromkeys([*modules, *(site.name for site in sites), *bare])
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle or not patterns:
        listed = ", ".join(map(repr, modules[:20])) + ("..." if len(modules) > 20 else ".")
        problem = f"{', '.join(map(repr, idle))} matches no layer" if patterns else "it names none"
        raise LayerError(f"layers={list(patterns)!r}: {problem}. The model's layers with parameters are: {listed}")
    wanted = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return wanted | {site.name for site in sites if site.part and site.name.rpartition(".")[0] in wanted}


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _vocabulary_heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """Output heads as wide as the vocabulary; Hugging Face models say where theirs is."""
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return () if head is None else (head,)


def _reason_against(site: Site, layers: str | Sequence[str] | None, heads: tuple[nn.Module, ...]) -> str | None:
    if (layers is None or layers == "all") and not any(p.requires_grad for p in site.parameters):
        return FROZEN
    if layers is None and (site.of_tied_head or any(site.module is head for head in heads)):
        return HEAD
    return EMBEDDING if layers is None and site.handler.one_hot else None


def _add(found: dict[tuple[object, ...], TrackedLayer], site: Site) -> None:
    if site.key in found:
        first = found[site.key]
        found[site.key] = replace(first, sites=(*first.sites, site))
        return
    # A layer named by hand though frozen is tracked whole.
    trained = [p for p in site.parameters if p.requires_grad] or site.parameters
    weight, bias = (any(p is one for one in trained) for p in (site.weight, site.bias))
    found[site.key] = TrackedLayer(name=site.name, sites=(site,), parts=site.sizes, weight=weight, bias=bias)


def _refused(model: nn.Module, refused: dict[str, str], wanted: set[str] | None) -> dict[str, str]:
    """Return the modules without a site that are left out, and why."""
    reasons = {}
    for name, reason in refused.items():
        own = dict(_module(model, name).named_parameters(recurse=False))
        if wanted is not None:
            reasons[name] = reason if name in wanted or any(_join(name, one) in wanted for one in own) else OTHERS
        else:
            reasons[name] = reason if any(p.requires_grad for p in own.values()) else FROZEN
    return reasons


def _module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a name, or the composite that the name is a part of."""
    return dict(model.named_modules()).get(name) or model.get_submodule(name.rpartition(".")[0])


def _alone(model: nn.Module, left_out: dict[str, str], wanted: set[str] | None, handled: set[int]) -> list[TrackedLayer]:
    """Track the parameters of modules that have no handler one by one, and take those modules off what is left out."""
    layers, seen = [], set(handled)
    for owner in [name for name, reason in left_out.items() if reason not in (OTHERS, FROZEN, HEAD, EMBEDDING)]:
        del left_out[owner]
        for own, parameter in _module(model, owner).named_parameters(recurse=False):
            name = _join(owner, own)
            chosen = parameter.requires_grad if wanted is None or owner in wanted else name in wanted
            if chosen and id(parameter) not in seen:
                seen.add(id(parameter))
                parts = LayerParts(groups=1, inputs=1, outputs=parameter.numel())
                layers.append(TrackedLayer(name=name, parts=parts, weight=True, bias=False, alone=parameter))
    return layers


def taken_alone(model: nn.Module, layers: Sequence[TrackedLayer], names: Collection[str]) -> list[TrackedLayer]:
    """Return the layers with those of the given names replaced by their parameters alone, unless another layer has these too."""
    others = {id(p) for layer in layers if layer.name not in names for site in layer.sites for p in site.parameters}
    owners = {id(p): name for name, p in model.named_parameters()}
    result: list[TrackedLayer] = []
    for layer in layers:
        own = {
            id(p): p
            for site in layer.sites
            for p in (site.weight if layer.weight else None, site.bias if layer.bias else None)
            if p is not None
        }
        if layer.name not in names or not own or own.keys() & others:
            result.append(layer)
            continue
        for key, parameter in own.items():
            parts = LayerParts(groups=1, inputs=1, outputs=parameter.numel())
            result.append(TrackedLayer(name=owners[key], parts=parts, weight=True, bias=False, alone=parameter))
    return result


def _nothing_tracked(tracked: list[TrackedLayer], refused: list[tuple[str, str]]) -> str:
    listed = "; ".join(f"{name!r}: {reason}" for name, reason in refused[:8])
    if tracked:
        return (
            f"layers=... names layers that cannot be tracked ({listed}). Name others, leave layers out for the default, "
            "or take them with fallback=True (one backward pass per example)."
        )
    return (
        f"no layer of the model can be tracked ({listed or 'it has no parameters'}). whence tracks linear, convolutional, "
        "normalisation, attention and embedding layers with a parameter that requires a gradient, and others with fallback=True."
    )


def _coverage(model: nn.Module, tracked: list[TrackedLayer], left_out: list[tuple[str, str]]) -> Coverage:
    # Frozen layers that were named by hand count as if they were trained.
    own = [layer.sites[0].parameters for layer in tracked if layer.sites]
    thawed = {id(p) for parameters in own if not any(p.requires_grad for p in parameters) for p in parameters}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad or id(p) in thawed)
    return Coverage(tracked={layer.name: layer.parameters for layer in tracked}, trainable=trainable, left_out=left_out)
