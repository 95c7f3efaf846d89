"""Floating-point operations of every stage, from the sizes alone, for both libraries; and what the machine can do.

One Linear with `i` inputs (bias column included), `o` outputs and `T` positions; multiply and add count as two.
The peer forms each example's gradient and rotates it; whence rotates the positions where that is less, and only
positions that have a gradient: the classifier reads one token, which leaves most of the last block with one.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from support.models import Case


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of each side for one call of a stage."""

    ours: float
    peer: float


def layer_sizes(case: Case, tokens: int) -> list[tuple[int, int, int]]:
    """Return `(positions, inputs with bias, outputs)` of every tracked Linear of the BERT classifier."""
    sizes = []
    for name in case.layers:
        layer = case.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        positions = 1 if "pooler" in name or "classifier" in name else tokens
        sizes.append((positions, layer.in_features + (layer.bias is not None), layer.out_features))
    return sizes


def live_sizes(case: Case, tokens: int) -> list[tuple[int, int, int]]:
    """Return the same, counting only positions whose output reaches the loss."""
    last = f"encoder.layer.{case.model.config.num_hidden_layers - 1}."
    alone = [last in name and not name.endswith((".key", ".value")) for name in case.layers]
    return [(1 if one else t, i, o) for one, (t, i, o) in zip(alone, layer_sizes(case, tokens), strict=True)]


def model_flops(case: Case, tokens: int) -> float:
    """Return one example's forward pass and backward pass without weight gradients."""
    linear = sum(4 * t * i * o for t, i, o in layer_sizes(case, tokens))
    config = case.model.config
    # Scores and weighted values forward, and twice that backward.
    return linear + config.num_hidden_layers * 12 * tokens**2 * config.hidden_size


def eigenvalues(case: Case, tokens: int) -> Work:
    """Count the pass for the eigenvalues."""
    sizes, live, model = layer_sizes(case, tokens), live_sizes(case, tokens), model_flops(case, tokens)
    ours = model + sum(_rotated(t, i, o) + 2 * i * o for t, i, o in live)
    peer = model + sum(2 * t * i * o + 2 * i * o * (i + o) + 2 * i * o for t, i, o in sizes)
    return Work(ours=len(case.train) * ours, peer=len(case.train) * peer)


def self_influence(case: Case, tokens: int) -> Work:
    """Count self-influence; the peer rotates every gradient back."""
    sizes, live, model = layer_sizes(case, tokens), live_sizes(case, tokens), model_flops(case, tokens)
    ours = model + sum(_rotated(t, i, o) + 3 * i * o for t, i, o in live)
    peer = model + sum(2 * t * i * o + 4 * i * o * (i + o) + 3 * i * o for t, i, o in sizes)
    return Work(ours=len(case.train) * ours, peer=len(case.train) * peer)


def pairwise(case: Case, tokens: int, *, queries: int, passes: int) -> Work:
    """Count pairwise scores; the peer goes through the training data once per batch of queries."""
    sizes, live, model, train = layer_sizes(case, tokens), live_sizes(case, tokens), model_flops(case, tokens), len(case.train)
    products = train * sum(2 * queries * i * o for _, i, o in sizes)
    formed = train * (model + sum(2 * t * i * o for t, i, o in live if t > 1))
    formed_by_peer = train * (model + sum(2 * t * i * o for t, i, o in sizes))
    ours = queries * (model + sum(_rotated(t, i, o) + 2 * i * o * (i + o) for t, i, o in live))
    peer = queries * (model + sum(2 * t * i * o + 4 * i * o * (i + o) for t, i, o in sizes))
    return Work(ours=ours + formed + products, peer=peer + passes * formed_by_peer + products)


def _rotated(t: int, i: int, o: int) -> int:
    """Return the least work to have an example's gradient in the eigenbasis; with one position none is formed."""
    if t == 1:
        return 2 * (i * i + o * o)
    return 2 * t * i * o + min(2 * t * (i * i + o * o), 2 * i * o * (i + o))


def gemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """Return the measured float32 matrix product rate in FLOP/s: the median of a few products `size`^3."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)
