"""Where a model uses its parameters: one site per layer-like use, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from whence.capture.layers import Composite, Handler, LayerParts, handler_for
from whence.capture.layers.linear import HeadBias, TiedHead
from whence.errors import LayerError

SHARED = "a parameter shared with a layer of another kind or bias"


@dataclass(frozen=True, kw_only=True)
class Site:
    """One use of a weight and a bias by a module; `part` names the projection if the module is a composite."""

    name: str
    module: nn.Module = field(repr=False)
    handler: Handler = field(repr=False)
    kind: type[nn.Module] = field(repr=False)
    weight: nn.Parameter | None = field(repr=False)
    bias: nn.Parameter | None = field(repr=False)
    part: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for sites of the same parameters: they are one layer."""
        return id(self.weight), id(self.bias), self.part

    @property
    def checkable(self) -> bool:
        """Whether the forward may not be that of the kind: a subclass with its own, or a class that is known by name only."""
        return self.part is None and (type(self.module).forward is not self.kind.forward or not self.kind.__module__.startswith("torch."))

    @property
    def of_tied_head(self) -> bool:
        """Whether it is a part of an output head that shares its weight with an embedding."""
        return isinstance(self.handler, TiedHead | HeadBias)

    @property
    def exchanged(self) -> bool:
        """Whether inputs and output gradients change places, as for a head in its embedding's layout."""
        return isinstance(self.handler, TiedHead)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The site's parameters; a part's packed parameter belongs to several sites."""
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def sizes(self) -> LayerParts:
        """The layer's sizes; `inputs` does not count the bias column."""
        return LayerParts(groups=1, inputs=0, outputs=len(_given(self.bias))) if self.weight is None else self.handler.parts(self.module)


def _given(bias: nn.Parameter | None) -> nn.Parameter:
    assert bias is not None
    return bias


def find_sites(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Return all sites in the order of the model's modules, and the reason for every module with parameters that has none."""
    sites: list[Site] = []
    refused: dict[str, str] = {}
    held: set[nn.Module] = set()  # children that a composite uses without calling them
    for name, module in model.named_modules():
        if module in held or not any(True for _ in module.parameters(recurse=False)):
            continue
        found = _sites_of(name, module)
        if isinstance(found, str):
            refused[name] = found
            continue
        sites += found
        if any(site.part for site in found):
            held.update(module.children())
    return _checked(_tied(sites), refused)


def _sites_of(name: str, module: nn.Module) -> list[Site] | str:
    handled = handler_for(module)
    if handled is None:
        return f"no handler for {type(module).__name__}"
    handler, kind = handled
    if (reason := handler.against(module)) is not None:
        return reason
    if isinstance(handler, Composite):
        return [
            Site(
                name=f"{name}.{part}" if name else part,
                module=module,
                handler=p.handler,
                kind=kind,
                weight=p.weight,
                bias=p.bias,
                part=part,
            )
            for part, p in handler.layers(module).items()
        ]
    own = dict(module.named_parameters(recurse=False))
    if own.keys() - {"weight", "bias"}:
        return "parameters besides weight and bias"
    return [Site(name=name, module=module, handler=handler, kind=kind, weight=own.get("weight"), bias=own.get("bias"))]


def _tied(sites: list[Site]) -> list[Site]:
    """Turn output heads that share their weight with an embedding into uses of the embedding, their biases into layers."""
    embeddings = {id(site.weight): site for site in sites if site.handler.one_hot}
    return [new for site in sites for new in _untangled(site, embeddings.get(id(site.weight)))]


def _untangled(site: Site, embedding: Site | None) -> Iterator[Site]:
    # A head is an nn.Linear; other kinds that share an embedding's weight are refused by `_checked`.
    if embedding is None or site.handler.one_hot or site.kind is not nn.Linear:
        yield site
        return
    yield replace(site, name=embedding.name, handler=TiedHead(), bias=None)
    if site.bias is not None:
        yield replace(site, handler=HeadBias(), weight=None)


def _checked(sites: list[Site], refused: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
    """Drop sites that share a parameter with a site that is another layer."""
    owners: dict[object, set[object]] = {}
    for site in sites:
        for parameter in site.parameters:
            kind = TiedHead if isinstance(site.handler, TiedHead) or site.handler.one_hot else site.kind
            owners.setdefault(_owned(site, parameter), set()).add((site.key, kind))
    good = []
    for site in sites:
        if any(len(owners[_owned(site, p)]) > 1 for p in site.parameters):
            refused[site.name] = SHARED
        else:
            good.append(site)
    return good, refused


def _owned(site: Site, parameter: nn.Parameter) -> object:
    """Return what a site owns of a parameter: all, or the slice that its part is."""
    whole = site.handler.share(site.module, parameter).shape == parameter.shape
    return id(parameter), None if whole else site.part


def check_forward(expected: Tensor, output: Tensor, name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Compare what a module gave with what its kind of layer computes.

    Raises:
        LayerError: they differ.
    """
    if expected.shape != output.shape or not _close(expected, output):
        raise LayerError(
            f"layer {name!r} is a {type(module).__name__} whose forward does not compute what "
            f"{kind.__name__} does, so its gradient cannot be taken from that class. "
            "Leave it out with layers=..., or register a handler for its type."
        )


def _close(expected: Tensor, output: Tensor) -> bool:
    """Whether two ways of computing the same differ by no more than the rounding of their type."""
    rounding = 16 * torch.finfo(output.dtype).eps
    largest = float(output.detach().abs().max()) if output.numel() else 0.0
    rtol, atol = max(1e-3, rounding), max(1e-4, rounding * largest) if largest < float("inf") else 1e-4
    return torch.allclose(expected.to(output.dtype), output, rtol=rtol, atol=atol, equal_nan=True)
