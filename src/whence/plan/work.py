"""Floating-point operations: the model's own are counted as they run, ours follow from the sizes that layers were seen with.

A multiplication and an addition count as two. Of ours only products of matrices are counted, by `capture/contract.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from whence.capture import contract
from whence.capture.contract import Sides, Sizes
from whence.capture.formed import Formed
from whence.capture.pair import LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.capture.state import Consumer
from whence.capture.tracking import TrackedLayer
from whence.plan.asked import NO_SIDES, Asked
from whence.scores import resident
from whence.scores.resident import Form


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One layer in one batch.

    Attributes:
        layer: the layer.
        sizes: sizes of what its gradients are made of, without positions that no gradient comes to.
        whole: the same with all positions, of which covariances are made.
        formed: whether the gradients come formed.
        entries: for an embedding, distinct tokens per example.
    """

    layer: TrackedLayer
    sizes: Sizes
    whole: Sizes
    formed: bool = False
    entries: float | None = None

    def rows(self, count: int) -> Seen:
        """Return the same for another number of examples."""
        return replace(self, sizes=replace(self.sizes, examples=count), whole=replace(self.whole, examples=count))


def watching(seen: dict[str, Seen]) -> Consumer:
    """Return a consumer that only takes down sizes."""

    def look(layer: TrackedLayer, gradient: LayerGradient) -> None:
        sizes = whole = gradient.sizes
        entries = None
        if isinstance(gradient, SparsePair):
            entries = len(gradient.entries.tokens) / max(1, sizes.examples)
        elif isinstance(gradient, Pair):
            sizes = gradient.live().sizes
        elif isinstance(gradient, Formed) and gradient.pair is not None:
            whole = gradient.pair.sizes
        seen[layer.name] = Seen(layer=layer, sizes=sizes, whole=whole, formed=isinstance(gradient, Formed), entries=entries)

    return look


def model_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of whatever runs."""
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    with counter:
        run()
    return counter.get_total_flops()


def _cpu_attention() -> dict[Any, Any]:
    """Torch counts the attention kernels of GPUs only."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    names = {"_scaled_dot_product_flash_attention_for_cpu": forward, "_scaled_dot_product_flash_attention_for_cpu_backward": backward}
    return {getattr(torch.ops.aten, name): count for name, count in names.items() if hasattr(torch.ops.aten, name)}


def covariances(seen: Seen, asked: Asked) -> float:
    """Count the layer's part of the pass for covariances."""
    whole, sides = seen.whole, seen.layer.sides
    if seen.layer.alone is not None:
        return 0.0
    inputs = 0 if seen.entries is not None else sides.inputs * whole.inputs**2
    products = 2.0 * whole.examples * whole.groups * whole.positions * (inputs + sides.outputs * whole.outputs**2)
    return products + (norms(seen) if asked.scaled else 0.0)


def norms(seen: Seen) -> float:
    """Count the squared norms of the gradients."""
    if seen.formed or seen.entries is not None:
        return 0.0
    return contract.squares(seen.sizes, NO_SIDES, 1, uniform=True).flops


def squares(seen: Seen, sides: Sides) -> float:
    """Count sums over squared rotated gradients."""
    if seen.entries is not None:
        return 2.0 * seen.sizes.examples * seen.entries * sides.outputs * seen.sizes.outputs**2
    return _rotated(seen.sizes, sides) if seen.formed else contract.squares(seen.sizes, sides, 1).flops


def own_products(seen: Seen, asked: Asked) -> float:
    """Count each row's product with itself."""
    return squares(seen, asked.sides(seen.layer)) if asked.weighed else norms(seen)


def gradients(seen: Seen, sides: Sides) -> float:
    """Count gradients in a basis."""
    if seen.entries is not None:
        return squares(seen, sides)
    return _rotated(seen.sizes, sides) if seen.formed else contract.gradients(seen.sizes, sides, 1).flops


def _rotated(sizes: Sizes, sides: Sides) -> float:
    """Count the rotation of gradients that are formed."""
    return 2.0 * sizes.examples * sizes.weights * (sides.inputs * sizes.inputs + sides.outputs * sizes.outputs)


def form_of(seen: Seen, asked: Asked) -> Form:
    """Return how a layer's queries are held."""
    rank, summed = asked.request.query_rank, asked.request.sums_queries
    return resident.form_of(
        seen.sizes, sparse=seen.entries is not None, formed=seen.formed, weighed=asked.weighed, rank=rank, summed=summed
    )


def stays_rotated(seen: Seen, asked: Asked) -> bool:
    """Whether the layer's queries are left in the eigenbasis."""
    return contract.stay_rotated(replace(seen.sizes, examples=asked.train), asked.sides(seen.layer), asked.kept)


def query(seen: Seen, asked: Asked) -> float:
    """Count the preconditioning of queries."""
    sides, form = asked.sides(seen.layer), form_of(seen, asked)
    total = own_products(seen, asked) if asked.request.normalize == "cosine" else 0.0
    if form == "pairs":
        return total
    total += gradients(seen, sides)
    if form == "sparse":
        return total + squares(seen, sides)
    if not stays_rotated(seen, asked):
        total += _rotated(seen.sizes, sides)
    if form == "low_rank":
        short = min(seen.sizes.outputs, seen.sizes.inputs)
        total += 4.0 * seen.sizes.examples * seen.sizes.weights * short + eigen(short) * seen.sizes.examples * seen.sizes.groups
    return total


def pairwise(seen: Seen, held: Seen, asked: Asked) -> float:
    """Count the products of training rows (`seen`) with the queries (`held`)."""
    form, sides, sizes = form_of(held, asked), asked.sides(seen.layer), seen.sizes
    total = own_products(seen, asked) if asked.request.normalize is not None else 0.0
    if form == "pairs":
        both = held.sizes.positions * (sizes.inputs + sizes.outputs)
        return total + 2.0 * sizes.examples * asked.kept * sizes.groups * sizes.positions * both
    if form == "sparse":  # how many tokens are common is not known; the share is small
        return total
    if stays_rotated(held, asked):
        both_sides = sides.inputs * sizes.inputs**2 + sides.outputs * sizes.outputs**2
        total += _rotated(sizes, sides) if seen.formed else 2.0 * sizes.examples * sizes.groups * sizes.positions * both_sides
    if seen.formed:
        return total + 2.0 * sizes.examples * asked.kept * sizes.weights
    if form == "low_rank" and asked.request.query_rank is not None:
        return total + contract.low_rank(sizes, asked.kept, asked.request.query_rank, 1).flops
    return total + contract.pairwise(sizes, asked.kept, 1).flops


def eigen(size: int) -> float:
    """Count one symmetric eigendecomposition with vectors, about `9 n^3` (Golub and Van Loan, "Matrix Computations", 8.3)."""
    return 9.0 * size**3


def decompositions(layers: Iterable[TrackedLayer], asked: Asked) -> Mapping[int, int]:
    """Return how many matrices of each size are decomposed."""
    found: dict[int, int] = {}
    for layer in layers:
        groups, outputs, inputs = layer.shape
        sides = asked.sides(layer)
        for size, there in ((inputs, sides.inputs), (outputs, sides.outputs)):
            if there:
                found[size] = found.get(size, 0) + groups
    return found
