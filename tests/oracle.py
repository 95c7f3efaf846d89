"""The slow oracle: one example at a time through autograd, explicit matrices, float64.

It is written from the definitions alone and shares no code with the engine: per-example gradients are autograd's own
gradients of the parameters, a layer's inputs and output gradients come from plain hooks in a run with a batch of one
(what a layer's name means, and what its positions are: `oracle_layers.py`), and preconditioning from solving with the
dense matrix. Options of the scores are in `oracle_options.py`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import oracle_layers
from compare import assert_close
from oracle_layers import Layer, as_trained_matrix, layer_of, trained

Objective = Callable[[nn.Module, Any, int], Tensor]
Call = tuple[Tensor, Tensor]
WIDEST = 16384


@dataclass
class Uses:
    """Every position at which an example met a layer, over all uses of the layer.

    `real` is False where padded; `token` is the position on the example's token axis, -1 for uses that are not on it.
    """

    a: Tensor
    g: Tensor
    real: Tensor
    token: Tensor


@dataclass
class Example:
    """One example: its gradient and its positions, by layer. A layer without positions is absent from `uses`.

    `tokens` counts the example's tokens; `layers` says what each name stands for.
    """

    gradient: dict[str, Tensor]
    uses: dict[str, Uses]
    tokens: int | None = None
    layers: dict[str, Layer] = field(default_factory=dict)


@dataclass
class Curvature:
    """Q_in `[group, in, in]`, Q_out `[group, out, out]`, eigenvalues `[group, out, in]`."""

    basis_in: Tensor
    basis_out: Tensor
    eigenvalues: Tensor

    def dense(self, group: int) -> Tensor:
        """Return the group's curvature `[out * in, out * in]` in the order of `G.flatten()`."""
        basis = torch.kron(self.basis_out[group].contiguous(), self.basis_in[group].contiguous())
        return basis @ torch.diag(self.eigenvalues[group].flatten()) @ basis.T


# ---------------------------------------------------------------------------------------------- one example


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def recorded(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[dict[tuple[int, str], list[Call]]]:
    """Record (input, output) of every call by (module, part). The model goes on with copies, so in-place operations touch no record."""
    sources = {(id(source.module), source.part): source.module for layer in layers.values() for source in layer.sources}
    calls: dict[tuple[int, str], list[Call]] = {key: [] for key in sources}
    handles, replaced = [], []

    def copy_inputs(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}

    def recorder(key: tuple[int, str]) -> Callable:
        def record(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            calls[key].append(([*args, *kwargs.values()][0], output))
            return output.clone()

        return record

    try:
        for key, module in sources.items():
            if not key[1]:
                handles.append(module.register_forward_pre_hook(copy_inputs, with_kwargs=True))
                # First of all hooks: what the layer computes is meant, not what its owner's hooks make of it.
                handles.append(module.register_forward_hook(recorder(key), with_kwargs=True, prepend=True))
            elif module not in replaced:
                replaced.append(module)
                module.forward = partial(attend, module, calls)
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            del module.forward


def attend(
    attention: nn.MultiheadAttention, calls: dict, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend step by step, recording the four projections, and compare with what torch gives."""
    names = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    options = dict(zip(names, args, strict=False)) | kwargs

    def project(part: str, x: Tensor) -> Tensor:
        x = x.clone()
        output = oracle_layers.projected(attention, part, x)
        calls.setdefault((id(attention), part), []).append((x, output))
        return output.clone()

    output, weights = oracle_layers.by_hand(attention, project, query, key, value, **options)
    with torch.no_grad():
        wanted, wanted_weights = nn.MultiheadAttention.forward(attention, query, key, value, **options)
    assert_close(output, wanted, "attention by hand against torch", rtol=1e-11, atol_of_largest=1e-12)
    if wanted_weights is None:
        return output, None
    return output, weights.mean(1) if options.get("average_attn_weights", True) else weights


def run_one(model: nn.Module, names: Sequence[str], task: Any, batch: Any, objective: Callable[[nn.Module, Any], Tensor]) -> Example:
    """Return gradient and positions of the single example in `batch`."""
    layers = {name: layer_of(model, name) for name in names}
    with recorded(model, layers) as recorded_calls:
        value = objective(model, batch)
        assert value.shape == (1,), f"a batch of one must give one number, not {tuple(value.shape)}"
        # Calls made while gradient checkpointing repeats the forward are not wanted: the loss hangs on the first ones.
        calls = {key: [call for call in made if call[1].requires_grad] for key, made in recorded_calls.items()}
        wanted: list[Tensor] = [p for layer in layers.values() for p in trained(layer)]
        wanted += [output for made in calls.values() for _, output in made]
        found = iter(torch.autograd.grad(value.sum(), wanted, allow_unused=True))
    gradient = {}
    for name, layer in layers.items():
        matrix = as_trained_matrix(layer, [next(found) for _ in trained(layer)])
        gradient[name] = task.transform_gradient(name, matrix[None])[0]
    slopes = {key: [(inputs.detach(), next(found)) for inputs, _ in made] for key, made in calls.items()}
    tokens = token_count(task, batch)
    uses = {}
    for name, layer in layers.items():
        parts = [
            source.positions(inputs, slope)
            for source in layer.sources
            for inputs, slope in slopes[id(source.module), source.part]
            if slope is not None
        ]
        if parts:
            uses[name] = gathered(parts, mask_for(task, name, batch), tokens)
    return Example(gradient, uses, tokens, layers)


def gathered(parts: list[oracle_layers.Positions], mask: Tensor | None, tokens: int | None) -> Uses:
    """Join the positions of all uses; mask and token axis hold for a use that has as many positions as they have."""
    real = [known & mask.flatten().bool() if mask is not None and mask.numel() == len(a) else known for a, _, known in parts]
    token = [torch.arange(len(a)) if tokens == len(a) else torch.full((len(a),), -1) for a, _, _ in parts]
    return Uses(torch.cat([a for a, _, _ in parts]), torch.cat([g for _, g, _ in parts]), torch.cat(real), torch.cat(token))


def token_count(task: Any, batch: Any) -> int | None:
    """Return the length of the token axis of a batch of one without padding: of the mask, else of `input_ids`, else there is none."""
    mask = task.padding_mask(batch)
    if isinstance(mask, Tensor):
        return mask.shape[1]
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return None if ids is None else ids.shape[1]


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


def free_sides(example: Example, name: str, widest: int = WIDEST) -> tuple[bool, bool]:
    """Tell on which side (in, out) the basis is the identity: by kind, or because the side is too wide."""
    free_in, free_out = example.layers[name].free
    _, out, into = example.gradient[name].shape
    return free_in or into > widest, free_out or out > widest


def side_of(examples: Sequence[Example], name: str, side: str, free: bool) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a covariance, or its diagonal and the identity."""
    matrix = covariance(examples, name, side)
    if not free:
        return tuple(torch.linalg.eigh(matrix))
    return matrix.diagonal(dim1=1, dim2=2), torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)


def fit_layer(name: str, strategy: str, first: Sequence[Example], second: Sequence[Example], widest: int = WIDEST) -> Curvature:
    """Fit one layer. `first` and `second` are the examples of the covariance pass and of the eigenvalue pass."""
    groups, out, into = first[0].gradient[name].shape
    eye_in, eye_out = (torch.eye(n, dtype=torch.float64).expand(groups, n, n) for n in (into, out))
    if strategy == "identity":
        return Curvature(eye_in, eye_out, torch.ones(groups, out, into, dtype=torch.float64))
    squares = mean_square([example.gradient[name] for example in (first if strategy == "kfac" else second)])
    if strategy == "diagonal" or first[0].layers[name].fallback:
        return Curvature(eye_in, eye_out, squares)
    free_in, free_out = free_sides(first[0], name, widest)
    values_in, basis_in = side_of(first, name, "a", free_in)
    values_out, basis_out = side_of(first, name, "g", free_out)
    if strategy == "ekfac":
        rotated = [basis_out.mT @ example.gradient[name] @ basis_in for example in second]
        return Curvature(basis_in, basis_out, mean_square(rotated))
    outer = torch.einsum("go,gi->goi", values_out.clamp(min=0), values_in.clamp(min=0))
    total = outer.sum((1, 2), keepdim=True)
    # A group that no example reaches (a dead feature of a norm) has no curvature.
    scale = torch.where(total > 0, squares.sum((1, 2), keepdim=True) / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    return Curvature(basis_in, basis_out, outer * scale)


def fit(
    names: Sequence[str], strategy: str, first: Sequence[Example], second: Sequence[Example] | None = None, *, widest: int = WIDEST
) -> dict[str, Curvature]:
    """Fit all layers; with the data's own labels both passes see the same gradients."""
    return {name: fit_layer(name, strategy, first, first if second is None else second, widest) for name in names}


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


def preconditioned(gradients: Sequence[Tensor], curvature: Curvature, damping: float) -> Tensor:
    """Return `(H + damping)^-1 vec(G)` of each `[group, out, in]` gradient, in its shape, by solving with the dense matrix."""
    stacked = torch.stack(list(gradients))
    parts = []
    for group in range(len(curvature.eigenvalues)):
        dense = curvature.dense(group)
        damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
        parts.append(torch.linalg.solve(damped, stacked[:, group].flatten(1).T).T.view_as(stacked[:, group]))
    return torch.stack(parts, 1)


def pairwise(
    queries: Sequence[Example], train: Sequence[Example], curvatures: Mapping[str, Curvature], dampings: Mapping[str, float]
) -> dict[str, Tensor]:
    """Return the scores `[query, train]` of each layer, `vec(G_q)^T (H + damping)^-1 vec(G_t)`; the score is their sum."""
    return {
        name: preconditioned([q.gradient[name] for q in queries], curvature, dampings[name]).flatten(1)
        @ torch.stack([t.gradient[name] for t in train]).flatten(1).T
        for name, curvature in curvatures.items()
    }
