"""Cases with norm layers, and with convolutions of one and three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import case_tasks as t
from case import Case, simple
from case_data import collate_padded, labelled, sequences


def spread(norm: nn.Module) -> nn.Module:
    """Give a norm weights and running statistics that are not those it starts with."""
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(0.7 + torch.rand_like(p))
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return norm


class Normed(nn.Module):
    """A norm between two layers on `[batch, ..., 4]`, averaged over all positions."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 5), spread(norm()), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.inner(x)))
        return self.head(x if x.dim() == 2 else x.flatten(1, -2).mean(1))


class NormedGrid(nn.Module):
    """A norm over the last two axes of `[batch, 3, 2, 4]`."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.head = spread(norm()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x)).mean(1).flatten(1))


class NormedChannels(nn.Module):
    """A norm whose features are axis 1 of `[batch, 4, ...]`."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.head = spread(norm()), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(x))
        return self.head(x if x.dim() == 2 else x.flatten(2).mean(2))


class NormReused(nn.Module):
    """One norm applied to seven positions, then to their mean; recomputed in the backward pass if `checkpointed`."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.norm, self.mix, self.head = spread(nn.LayerNorm(4)), nn.Linear(4, 4), nn.Linear(4, 3)
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(self.norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(torch.tanh(self.norm(x.mean(1))))


class NormsTied(nn.Module):
    """Two norms with one weight and one bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = spread(nn.LayerNorm(4)), nn.LayerNorm(4), nn.Linear(4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.sin(2.0 * self.first(x)))))


class NormInPlace(nn.Module):
    """What goes into a norm and what comes out of it is overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 5), spread(nn.LayerNorm(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x)) * 1.0
        y = self.norm(x)
        y.mul_(1.5).tanh_()
        return self.head(y.mean(1) + x.mean(1))


class NormedPool(nn.Module):
    """Norms at each position of a padded sequence, and one on the masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.last, self.head = nn.Linear(4, 5), spread(nn.LayerNorm(5)), spread(nn.RMSNorm(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.inner(x))) * mask.unsqueeze(-1)
        return self.head(self.last(x.sum(1) / mask.sum(1, keepdim=True)))


class Convolved(nn.Module):
    """One convolution, averaged over its pixels."""

    def __init__(self, kind: type[nn.Module], into: int, out: int, **options: Any) -> None:
        super().__init__()
        self.conv, self.head = kind(into, out, **options), nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


def half_frozen(norm: Callable[[], nn.Module], part: str) -> nn.Module:
    """A norm with its weight or its bias frozen."""
    made = norm()
    getattr(made, part).requires_grad_(False)
    return made


many = partial(labelled, shape=(7, 4))
strip, cube = partial(labelled, shape=(4, 9)), partial(labelled, shape=(2, 4, 3, 5))
layer_norm, rms_norm = partial(nn.LayerNorm, 5), partial(nn.RMSNorm, 5)


def between(name: str, norm: Callable[[], nn.Module], rows: Any = many, **options: Any) -> Case:
    """A norm between two layers."""
    return simple(name, partial(Normed, norm), "inner norm head", rows=rows, **options)


def channels(name: str, norm: Callable[[], nn.Module], *shape: int) -> Case:
    """A norm over the channels of images of a shape."""
    return simple(name, partial(NormedChannels, norm), "norm head", rows=partial(labelled, shape=shape))


def conv1d(name: str, out: int = 6, **options: Any) -> Case:
    """A convolution on strips."""
    factory = partial(Convolved, nn.Conv1d, 4, out, **{"kernel_size": 3, **options})
    return simple(f"strip_{name}", factory, "conv head", rows=strip)


def conv3d(name: str, out: int = 3, **options: Any) -> Case:
    """A convolution on cubes."""
    factory = partial(Convolved, nn.Conv3d, 2, out, **{"kernel_size": (2, 1, 3), **options})
    return simple(f"cube_{name}", factory, "conv head", rows=cube)


NORMS = [
    between("layer_norm", layer_norm),
    between("layer_norm_on_vectors", layer_norm, rows=partial(labelled, shape=(4,))),
    between("layer_norm_on_a_grid_of_positions", layer_norm, rows=partial(labelled, shape=(2, 3, 4))),
    between("layer_norm_without_bias", partial(layer_norm, bias=False)),
    between("layer_norm_frozen_weight", partial(half_frozen, layer_norm, "weight")),
    between("layer_norm_frozen_bias", partial(half_frozen, layer_norm, "bias")),
    between("layer_norm_large_eps", partial(layer_norm, eps=0.3)),
    simple("layer_norm_two_axes", partial(NormedGrid, partial(nn.LayerNorm, (2, 4))), "norm head", rows=partial(labelled, shape=(3, 2, 4))),
    between("rms_norm", rms_norm),
    between("rms_norm_eps", partial(rms_norm, eps=0.2)),
    simple("rms_norm_two_axes", partial(NormedGrid, partial(nn.RMSNorm, (2, 4))), "norm head", rows=partial(labelled, shape=(3, 2, 4))),
    channels("group_norm", partial(nn.GroupNorm, 2, 4), 4, 3, 5),
    channels("group_norm_on_vectors", partial(nn.GroupNorm, 1, 4), 4),
    channels("group_norm_on_strips", partial(nn.GroupNorm, 2, 4, eps=0.1), 4, 6),
    channels("batch_norm_on_vectors", partial(nn.BatchNorm1d, 4), 4),
    channels("batch_norm_on_strips", partial(nn.BatchNorm1d, 4), 4, 6),
    channels("batch_norm_on_images", partial(nn.BatchNorm2d, 4, eps=0.1), 4, 3, 5),
    channels("batch_norm_on_cubes", partial(nn.BatchNorm3d, 4), 4, 2, 3, 2),
    simple("norm_reused", NormReused, "norm mix head", rows=many),
    simple("norm_checkpointed", partial(NormReused, checkpointed=True), "norm mix head", rows=many),
    simple("norms_tied", NormsTied, "first head"),
    simple("norm_in_place", NormInPlace, "inner norm head", rows=many),
    simple(
        "norm_padded",
        NormedPool,
        "inner norm last head",
        rows=sequences,
        task=partial(t.PaddedTask, inputs="inputs", labels="labels", measurement="margin"),
        collate=collate_padded,
    ),
    conv1d("plain"),
    conv1d("all_options", stride=2, padding=1, dilation=2, bias=False),
    conv1d("groups_reflect", groups=2, padding=2, padding_mode="reflect"),
    conv1d("same_circular", kernel_size=2, padding="same", padding_mode="circular"),
    conv3d("plain"),
    conv3d("all_options", out=4, stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1), groups=2),
    conv3d("replicate", kernel_size=(1, 2, 2), padding=(0, 1, 1), padding_mode="replicate", bias=False),
]
