"""The slow oracle: one example at a time through autograd, explicit matrices, float64.

It is written from the definitions alone and shares no code with the engine: per-example gradients are autograd's own
gradients of the parameters, a layer's inputs and output gradients come from plain hooks in a run with a batch of one,
patches of a convolution from loops over its positions, and preconditioning from solving with the dense matrix.

Layout: G `[group, out, in]` with the bias as the last column; positions `a [position, group, in]`, `g [position, group, out]`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compare import assert_close  # noqa: F401  (used as oracle.assert_close)

Objective = Callable[[nn.Module, Any, int], Tensor]


@dataclass
class Uses:
    """Every position at which an example met a layer, over all uses of the layer; `real` is False where padded."""

    a: Tensor
    g: Tensor
    real: Tensor


@dataclass
class Example:
    """One example: its gradient and its positions, by layer. A layer without positions is absent from `uses`."""

    gradient: dict[str, Tensor]
    uses: dict[str, Uses]


@dataclass
class Curvature:
    """Q_in `[group, in, in]`, Q_out `[group, out, out]`, eigenvalues `[group, out, in]`."""

    basis_in: Tensor
    basis_out: Tensor
    eigenvalues: Tensor

    def dense(self, group: int) -> Tensor:
        """Return the group's curvature `[out * in, out * in]` in the order of `G.flatten()`."""
        basis = torch.kron(self.basis_out[group], self.basis_in[group])
        return basis @ torch.diag(self.eigenvalues[group].flatten()) @ basis.T


# ---------------------------------------------------------------------------------------------- layers


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether this is Hugging Face's Conv1D, a linear layer with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def same_parameters(model: nn.Module, name: str) -> list[nn.Module]:
    """Return every module that uses the named layer's weight, itself included: they are one layer."""
    weight = model.get_submodule(name).weight
    return [module for module in model.modules() if getattr(module, "weight", None) is weight]


def as_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arrange gradients of weight and bias as `[group, out, in]`."""
    if isinstance(module, nn.Conv2d):
        matrix = weight.reshape(module.groups, weight.shape[0] // module.groups, -1)
    elif is_conv1d(module):
        matrix = weight.T[None]
    else:
        matrix = weight[None]
    if bias is None:
        return matrix
    return torch.cat([matrix, bias.reshape(matrix.shape[0], -1, 1)], dim=2)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return what is trained of weight and bias, in this order."""
    return [p for p in (module.weight, module.bias) if p is not None and p.requires_grad]


def as_trained_matrix(module: nn.Module, values: Iterable[Tensor | None]) -> Tensor:
    """Arrange one tensor (None: zero) for each trained parameter as `[group, out, in]`, without columns for what is frozen."""
    rest = iter(values)
    pair = [None if p is None else filled(next(rest) if p.requires_grad else None, p) for p in (module.weight, module.bias)]
    return as_matrix(module, *pair)[..., columns(module)].detach()


def columns(module: nn.Module) -> Tensor:
    """Mark the columns of `[group, out, in]` that belong to trained parameters."""
    whole = as_matrix(module, torch.full_like(module.weight, float(module.weight.requires_grad)), None)[0, 0]
    if module.bias is not None:
        whole = torch.cat([whole, whole.new_tensor([float(module.bias.requires_grad)])])
    return whole.detach() > 0


def positions(module: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return `a [position, group, in]` and `g [position, group, out]` of one use, every example's positions in a row."""
    if isinstance(module, nn.Conv2d):
        a, g = conv_positions(module, inputs, gradient)
    else:
        a, g = inputs.reshape(-1, 1, inputs.shape[-1]), gradient.reshape(-1, 1, gradient.shape[-1])
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return a[..., columns(module)], g


def conv_positions(conv: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the padded image into one patch for each output pixel, one at a time."""
    image = F.pad(inputs, padding_of(conv), mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    (high, wide), (down, right), (apart_y, apart_x) = conv.kernel_size, conv.stride, conv.dilation
    a, g = [], []
    for row in range(gradient.shape[0]):
        for y in range(gradient.shape[2]):
            for x in range(gradient.shape[3]):
                top, left = y * down, x * right
                rows = slice(top, top + apart_y * (high - 1) + 1, apart_y)
                columns = slice(left, left + apart_x * (wide - 1) + 1, apart_x)
                a.append(image[row, :, rows, columns].reshape(conv.groups, -1))
                g.append(gradient[row, :, y, x].reshape(conv.groups, -1))
    return torch.stack(a), torch.stack(g)


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return what is added to an image on the left, right, top and bottom."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        total_y, total_x = (apart * (size - 1) for apart, size in zip(conv.dilation, conv.kernel_size, strict=True))
        return total_x // 2, total_x - total_x // 2, total_y // 2, total_y - total_y // 2
    return conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0]


# ---------------------------------------------------------------------------------------------- one example


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[tuple[nn.Module, Tensor, Tensor]]]]:
    """Record (module, input, output) of every call. The model goes on with copies, so in-place operations touch no record."""
    calls: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {name: [] for name in names}
    handles = []

    def copy_inputs(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(value.clone() for value in args), {key: value.clone() for key, value in kwargs.items()}

    def recorder(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            calls[name].append((module, [*args, *kwargs.values()][0], output))
            return output.clone()

        return record

    try:
        for name in names:
            for module in same_parameters(model, name):
                handles.append(module.register_forward_pre_hook(copy_inputs, with_kwargs=True))
                # First of all hooks: what the layer computes is meant, not what its owner's hooks make of it.
                handles.append(module.register_forward_hook(recorder(name), with_kwargs=True, prepend=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run_one(model: nn.Module, names: Sequence[str], task: Any, batch: Any, objective: Callable[[nn.Module, Any], Tensor]) -> Example:
    """Return gradient and positions of the single example in `batch`."""
    with recorded(model, names) as calls:
        value = objective(model, batch)
    assert value.shape == (1,), f"a batch of one must give one number, not {tuple(value.shape)}"
    # Calls made while gradient checkpointing repeats the forward are not wanted: the loss hangs on the first ones.
    calls = {name: [call for call in made if call[2].requires_grad] for name, made in calls.items()}
    layers = [model.get_submodule(name) for name in names]
    wanted: list[Tensor] = [p for layer in layers for p in trained(layer)]
    wanted += [output for made in calls.values() for _, _, output in made]
    found = iter(torch.autograd.grad(value.sum(), wanted, allow_unused=True))
    gradient = {}
    for name, layer in zip(names, layers, strict=True):
        matrix = as_trained_matrix(layer, [next(found) for _ in trained(layer)])
        gradient[name] = task.transform_gradient(name, matrix[None])[0]
    uses = {}
    for name, made in calls.items():
        parts = [(module, inputs.detach(), next(found)) for module, inputs, _ in made]
        parts = [part for part in parts if part[2] is not None]
        if parts:
            uses[name] = gathered(parts, mask_for(task, name, batch))
    return Example(gradient, uses)


def filled(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient, zero where the example does not reach the parameter."""
    return torch.zeros_like(parameter) if gradient is None else gradient


def gathered(parts: list[tuple[nn.Module, Tensor, Tensor]], mask: Tensor | None) -> Uses:
    """Join the positions of all uses; the mask holds for a use that has as many positions as the mask."""
    pairs = [positions(*part) for part in parts]
    real = [
        mask.flatten().bool() if mask is not None and mask.numel() == len(a) else torch.ones(len(a), dtype=torch.bool) for a, _ in pairs
    ]
    return Uses(torch.cat([a for a, _ in pairs]), torch.cat([g for _, g in pairs]), torch.cat(real))


def mask_for(task: Any, name: str, batch: Any) -> Tensor | None:
    """Return which positions are real for the named layer: not padding, and belonging to an example."""
    mask = task.padding_mask(batch)
    if isinstance(mask, Mapping):
        mask = next((value for pattern, value in mask.items() if fnmatch.fnmatchcase(name, pattern)), None)
    ids = task.example_ids(batch)
    if ids is None or ids.dim() == 1:
        return mask
    return ids >= 0 if mask is None else (ids >= 0) & (mask != 0)


def collect(
    model: nn.Module, names: Sequence[str], task: Any, rows: Sequence[Any], *, collate: Callable[[list], Any], objective: Objective
) -> list[Example]:
    """Run every row on its own; `objective(model, batch, index)` gives its one number."""
    return [run_one(model, names, task, collate([row]), partial(_at, objective, index)) for index, row in enumerate(rows)]


def _at(objective: Objective, index: int, model: nn.Module, batch: Any) -> Tensor:
    return objective(model, batch, index)


# ---------------------------------------------------------------------------------------------- curvature


def covariance(examples: Sequence[Example], name: str, side: str) -> Tensor:
    """Return E[a a^T] or E[g g^T] `[group, n, n]` over all real positions of all examples."""
    total, count = 0, 0
    for example in examples:
        if name in example.uses:
            uses = example.uses[name]
            for vector, real in zip(getattr(uses, side), uses.real, strict=True):
                if real:
                    total = total + torch.einsum("gi,gj->gij", vector, vector)
                    count += 1
    return total / count


def mean_square(matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean over examples of the squared entries."""
    return torch.stack(list(matrices)).square().mean(0)


def fit_layer(name: str, strategy: str, first: Sequence[Example], second: Sequence[Example]) -> Curvature:
    """Fit one layer. `first` and `second` are the examples of the covariance pass and of the eigenvalue pass."""
    groups, out, into = first[0].gradient[name].shape
    eye_in, eye_out = (torch.eye(n, dtype=torch.float64).expand(groups, n, n) for n in (into, out))
    if strategy == "identity":
        return Curvature(eye_in, eye_out, torch.ones(groups, out, into, dtype=torch.float64))
    if strategy == "diagonal":
        return Curvature(eye_in, eye_out, mean_square([example.gradient[name] for example in second]))
    values_in, basis_in = torch.linalg.eigh(covariance(first, name, "a"))
    values_out, basis_out = torch.linalg.eigh(covariance(first, name, "g"))
    if strategy == "ekfac":
        rotated = [basis_out.mT @ example.gradient[name] @ basis_in for example in second]
        return Curvature(basis_in, basis_out, mean_square(rotated))
    outer = torch.einsum("go,gi->goi", values_out.clamp(min=0), values_in.clamp(min=0))
    norm = mean_square([example.gradient[name] for example in first]).sum((1, 2), keepdim=True)
    return Curvature(basis_in, basis_out, outer * norm / outer.sum((1, 2), keepdim=True))


def fit(names: Sequence[str], strategy: str, first: Sequence[Example], second: Sequence[Example] | None = None) -> dict[str, Curvature]:
    """Fit all layers; with the data's own labels both passes see the same gradients."""
    return {name: fit_layer(name, strategy, first, first if second is None else second) for name in names}


def damping_of(curvatures: Mapping[str, Curvature], strategy: str, damping: Any) -> dict[str, float]:
    """Return the absolute damping of each layer. `damping` is a number or has `relative` and `scope`; "auto" is 0.1 per layer."""
    if strategy == "identity":
        return dict.fromkeys(curvatures, 0.0)
    if isinstance(damping, float):
        return dict.fromkeys(curvatures, damping)
    relative, scope = (0.1, "layer") if damping == "auto" else (damping.relative, damping.scope)
    if scope == "layer":
        return {name: relative * curvature.eigenvalues.mean().item() for name, curvature in curvatures.items()}
    everything = torch.cat([curvature.eigenvalues.flatten() for curvature in curvatures.values()])
    return dict.fromkeys(curvatures, relative * everything.mean().item())


# ---------------------------------------------------------------------------------------------- scores


def pairwise_layer(queries: Sequence[Tensor], train: Sequence[Tensor], curvature: Curvature, damping: float) -> Tensor:
    """Return `vec(G_q)^T (H + damping)^-1 vec(G_t)`, `[query, train]`, summed over groups."""
    total = torch.zeros(len(queries), len(train), dtype=torch.float64)
    for group in range(len(curvature.eigenvalues)):
        dense = curvature.dense(group)
        damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
        left = torch.stack([matrix[group].flatten() for matrix in queries])
        right = torch.stack([matrix[group].flatten() for matrix in train])
        total += left @ torch.linalg.solve(damped, right.T)
    return total


def pairwise(
    queries: Sequence[Example], train: Sequence[Example], curvatures: Mapping[str, Curvature], dampings: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the scores `[query, train]` of each layer; the score is their sum."""
    return {
        name: pairwise_layer([q.gradient[name] for q in queries], [t.gradient[name] for t in train], curvature, dampings[name])
        for name, curvature in curvatures.items()
    }
