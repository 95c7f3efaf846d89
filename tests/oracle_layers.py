"""What a layer's name means to the oracle: its parameters as one matrix, and the positions of each call, from the definitions.

Layout: G `[group, out, in]` with the bias as the last column; positions `a [position, group, in]`, `g [position, group, out]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Positions = tuple[Tensor, Tensor, Tensor]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Source:
    """Calls that give a layer positions: of a module, or of one projection inside an attention. Returns a, g and what is real."""

    module: nn.Module
    part: str
    positions: Callable[[Tensor, Tensor], Positions]


@dataclass(frozen=True, eq=False)
class Layer:
    """A named layer: all its parameters, how they lie in `[group, out, in]`, and who uses them. A fallback has no sources.

    `free` says on which side (in, out) the basis is the identity whatever the width.
    """

    parameters: Sequence[nn.Parameter]
    arrange: Callable[[Sequence[Tensor]], Tensor]
    sources: Sequence[Source] = ()
    free: tuple[bool, bool] = (False, False)

    @property
    def fallback(self) -> bool:
        return not self.sources


@dataclass
class _Found:
    """Modules that share the parameters of a layer, by what they are."""

    embeddings: list[nn.Embedding] = field(default_factory=list)
    others: list[nn.Module] = field(default_factory=list)


def layer_of(model: nn.Module, name: str) -> Layer:
    """Return the layer that a name in the coverage stands for."""
    owner, _, last = name.rpartition(".")
    parent = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
    if isinstance(parent, nn.MultiheadAttention) and last in PROJECTIONS:
        return projection(parent, last)
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if module is None:
        parameter = model.get_parameter(name)
        return Layer([parameter], lambda values: values[0].reshape(1, -1, 1), free=(True, True))
    shared = _Found()
    for other in model.modules():
        if weight_of(other) is not None and weight_of(other) is weight_of(module):
            (shared.embeddings if isinstance(other, nn.Embedding) else shared.others).append(other)
    if shared.embeddings:
        return embedding(shared) if isinstance(module, nn.Embedding) else head_bias(module)
    return plain(module, shared.others or [module])


def weight_of(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


def bias_of(module: nn.Module) -> Tensor | None:
    return module._parameters.get("bias")


def trained(layer: Layer) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the layer's order."""
    return [p for p in layer.parameters if p.requires_grad]


def as_trained_matrix(layer: Layer, values: Iterable[Tensor | None]) -> Tensor:
    """Arrange one tensor (None: zero) for each trained parameter as `[group, out, in]`, without columns for what is frozen."""
    rest = iter(values)
    filled = []
    for p in layer.parameters:
        value = next(rest) if p.requires_grad else None
        filled.append(torch.zeros_like(p) if value is None else value)
    return layer.arrange(filled)[..., columns(layer)].detach()


def columns(layer: Layer) -> Tensor:
    """Mark the columns of `[group, out, in]` that belong to trained parameters."""
    marks = layer.arrange([torch.full_like(p, float(p.requires_grad)) for p in layer.parameters])
    return marks[0, 0].detach() > 0


def everything_real(a: Tensor, g: Tensor) -> Positions:
    return a, g, torch.ones(len(a), dtype=torch.bool)


def with_ones(a: Tensor, bias: bool) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], dim=-1) if bias else a


# ---------------------------------------------------------------------------------------------- kinds with weight and bias


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Tell whether this is Hugging Face's Conv1D, a linear layer with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_norm(module: nn.Module) -> bool:
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCHNORMS))
    return known or type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "T5LayerNorm"


def plain(module: nn.Module, users: Sequence[nn.Module]) -> Layer:
    """Linear, convolutions and norms: a weight, a bias or both."""
    parameters = [p for p in (weight_of(module), bias_of(module)) if p is not None]
    has_weight, has_bias = weight_of(module) is not None, bias_of(module) is not None

    def arrange(values: Sequence[Tensor]) -> Tensor:
        if is_norm(module):
            return torch.stack([value.flatten() for value in values], -1)[:, None, :]
        matrix = as_matrix(module, values[0])
        return torch.cat([matrix, values[1].reshape(matrix.shape[0], -1, 1)], dim=2) if has_bias else matrix

    layer = Layer(parameters, arrange)

    def source(user: nn.Module) -> Source:
        def positions(inputs: Tensor, gradient: Tensor) -> Positions:
            a, g = pair(user, inputs, gradient)
            a = with_ones(a, has_bias) if has_weight else torch.ones_like(a)
            return everything_real(a[..., columns(layer)], g)

        return Source(user, "", positions)

    return Layer(parameters, arrange, [source(user) for user in users])


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Arrange a weight as `[group, out, in]`."""
    if isinstance(module, CONVOLUTIONS):
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1)
    return weight.T[None] if is_conv1d_of_transformers(module) else weight[None]


def pair(module: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return a (without the column of ones) and g of one call, every position in a row."""
    if isinstance(module, CONVOLUTIONS):
        return conv_positions(module, inputs, gradient)
    if is_norm(module):
        return norm_positions(module, inputs, gradient)
    return inputs.reshape(-1, 1, inputs.shape[-1]), gradient.reshape(-1, 1, gradient.shape[-1])


def conv_positions(conv: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the padded image into one patch for each output pixel, one at a time."""
    image = F.pad(inputs, padding_of(conv), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    a, g = [], []
    for row in range(gradient.shape[0]):
        for place in itertools.product(*map(range, gradient.shape[2:])):
            starts = [at * stride for at, stride in zip(place, conv.stride, strict=True)]
            cut = [
                slice(start, start + apart * (size - 1) + 1, apart)
                for start, size, apart in zip(starts, conv.kernel_size, conv.dilation, strict=True)
            ]
            a.append(image[(row, slice(None), *cut)].reshape(conv.groups, -1))
            g.append(gradient[(row, slice(None), *place)].reshape(conv.groups, -1))
    return torch.stack(a), torch.stack(g)


def padding_of(conv: nn.Module) -> list[int]:
    """Return what is added at the two ends of each axis, the last axis first, as F.pad takes it."""
    if conv.padding == "valid":
        return [0] * (2 * len(conv.kernel_size))
    if conv.padding == "same":
        totals = [apart * (size - 1) for apart, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
    return [end for amount in reversed(conv.padding) for end in (amount, amount)]


def norm_positions(norm: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised input and the output's gradient `[position, feature, 1]`."""
    if isinstance(norm, (nn.GroupNorm, *BATCHNORMS)):
        normal = batch_normal(norm, inputs) if isinstance(norm, BATCHNORMS) else group_normal(norm, inputs)
        return tuple(x.movedim(1, -1).reshape(-1, x.shape[1], 1) for x in (normal, gradient))
    features = weight_of(norm).numel() if weight_of(norm) is not None else bias_of(norm).numel()
    flat = inputs.reshape(-1, features)
    eps = next(getattr(norm, key) for key in ("eps", "variance_epsilon") if hasattr(norm, key))
    if isinstance(norm, nn.LayerNorm):
        flat = flat - flat.mean(1, keepdim=True)
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    normal = flat / (flat.square().mean(1, keepdim=True) + eps).sqrt()
    return normal[..., None], gradient.reshape(-1, features, 1)


def batch_normal(norm: nn.Module, inputs: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (inputs.dim() - 2))
    return (inputs - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()


def group_normal(norm: nn.GroupNorm, inputs: Tensor) -> Tensor:
    flat = inputs.reshape(len(inputs), norm.num_groups, -1)
    flat = flat - flat.mean(2, keepdim=True)
    return (flat / (flat.square().mean(2, keepdim=True) + norm.eps).sqrt()).reshape(inputs.shape)


# ---------------------------------------------------------------------------------------------- embeddings and tied heads


def embedding(shared: _Found) -> Layer:
    """Ids as one-hot inputs; a head with the same weight gives (a, g) exchanged. The padding id is no position of an embedding."""

    def lookup(module: nn.Embedding) -> Source:
        def positions(inputs: Tensor, gradient: Tensor) -> Positions:
            ids = inputs.flatten().long()
            a = F.one_hot(ids, module.num_embeddings).double()[:, None]
            real = torch.ones_like(ids, dtype=torch.bool) if module.padding_idx is None else ids != module.padding_idx
            return a, gradient.reshape(len(ids), 1, -1), real

        return Source(module, "", positions)

    def head(module: nn.Module) -> Source:
        return Source(
            module,
            "",
            lambda inputs, gradient: everything_real(gradient.reshape(-1, 1, gradient.shape[-1]), inputs.reshape(-1, 1, inputs.shape[-1])),
        )

    sources = [lookup(module) for module in shared.embeddings] + [head(module) for module in shared.others]
    return Layer([shared.embeddings[0].weight], lambda values: values[0].T[None], sources, free=(True, False))


def head_bias(module: nn.Module) -> Layer:
    """Return the bias of a head whose weight belongs to an embedding."""

    def positions(inputs: Tensor, gradient: Tensor) -> Positions:
        g = gradient.reshape(-1, 1, gradient.shape[-1])
        return everything_real(torch.ones(len(g), 1, 1, dtype=g.dtype), g)

    return Layer([module.bias], lambda values: values[0][None, :, None], [Source(module, "", positions)])


# ---------------------------------------------------------------------------------------------- attention


def projection(attention: nn.MultiheadAttention, part: str) -> Layer:
    """One of the four projections of an attention, as a linear layer of its own."""
    size, place = attention.embed_dim, PROJECTIONS.index(part)
    rows = slice(place * size, (place + 1) * size)
    if part == "out_proj":
        weight, bias, cut = attention.out_proj.weight, attention.out_proj.bias, (slice(None), slice(None))
    elif attention.in_proj_weight is not None:
        weight, bias, cut = attention.in_proj_weight, attention.in_proj_bias, (rows, rows)
    else:
        weight, bias, cut = getattr(attention, f"{part}_weight"), attention.in_proj_bias, (slice(None), rows)
    parameters = [p for p in (weight, bias) if p is not None]

    def arrange(values: Sequence[Tensor]) -> Tensor:
        parts = [values[0][cut[0]]] + [value[cut[1]][:, None] for value in values[1:]]
        return torch.cat(parts, dim=1)[None]

    layer = Layer(parameters, arrange)

    def positions(inputs: Tensor, gradient: Tensor) -> Positions:
        a = with_ones(inputs.reshape(-1, 1, inputs.shape[-1]), bias is not None)
        return everything_real(a[..., columns(layer)], gradient.reshape(-1, 1, gradient.shape[-1]))

    return Layer(parameters, arrange, [Source(attention, part, positions)])


def by_hand(
    attention: nn.MultiheadAttention, project: Callable[[str, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """Attend with `project(part, input)` for the four projections; returns the output and the weights of each head."""
    if not attention.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = (
        project(part, x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part, x in zip(PROJECTIONS, (query, key, value), strict=False)
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    mask, padding = options.get("attn_mask"), options.get("key_padding_mask")
    if mask is not None:
        mask = mask.view(len(query), attention.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if padding is not None:
        padding = padding[:, None, None, :]
        scores = scores.masked_fill(padding, float("-inf")) if padding.dtype == torch.bool else scores + padding
    weights = scores.softmax(-1)
    output = project("out_proj", (weights @ v).transpose(1, 2).flatten(2))
    return output if attention.batch_first else output.transpose(0, 1), weights


def projected(attention: nn.MultiheadAttention, part: str, inputs: Tensor) -> Tensor:
    """Apply one projection."""
    if part == "out_proj":
        return F.linear(inputs, attention.out_proj.weight, attention.out_proj.bias)
    place = PROJECTIONS.index(part)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)[place]
    packed = attention.in_proj_weight
    return F.linear(inputs, getattr(attention, f"{part}_weight") if packed is None else packed.chunk(3)[place], bias)
