"""The cost model: in which order to contract a layer's (a, g), and how many examples at a time.

Pure functions of sizes; nothing here touches a tensor. For one example, one group, T positions, `in` x `out`
features, a gradient costs `2 T in out` FLOPs to form and `2 in out (in + out)` to rotate, while rotating inputs
and output gradients first costs `2 T (in^2 + out^2)`: for T below about a layer's width the second is far less.

The budget is a working set in bytes. On a CPU it is a part of the cache: a gradient that is reduced before it
leaves the cache costs two to seven times less than one that goes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["outer", "rotate", "form", "gram", "factor"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one layer in one batch; `inputs` counts the bias column."""

    examples: int
    positions: int
    groups: int
    inputs: int
    outputs: int
    itemsize: int = 4

    @property
    def weights(self) -> int:
        """Numbers in one example's gradient."""
        return self.groups * self.inputs * self.outputs

    @property
    def pair(self) -> int:
        """Numbers in one example's inputs and output gradients."""
        return self.groups * self.positions * (self.inputs + self.outputs)


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Which sides of a layer have an eigenbasis; a side without one need not be rotated."""

    inputs: bool
    outputs: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An order, its FLOPs for the whole batch, and how many examples (or rows of the weight) to take at a time."""

    order: Order
    flops: int
    chunk: int


def working_set(device_type: str) -> int:
    """Return the budget in bytes: what stays in a CPU's cache, or what is small beside a GPU's memory."""
    return 8 * 2**20 if device_type == "cpu" else 2**30


def _chunk(per_item: int, limit: int, sizes: Sizes, budget: int) -> int:
    return max(1, min(limit, budget // max(1, per_item * sizes.itemsize)))


def _rotate_positions(sizes: Sizes, sides: Sides) -> int:
    squares = sides.inputs * sizes.inputs**2 + sides.outputs * sizes.outputs**2
    return 2 * sizes.examples * sizes.groups * sizes.positions * squares


def _rotate_gradient(sizes: Sizes, sides: Sides) -> int:
    return 2 * sizes.examples * sizes.weights * (sides.inputs * sizes.inputs + sides.outputs * sizes.outputs)


def _form(sizes: Sizes) -> int:
    return 2 * sizes.examples * sizes.positions * sizes.weights


def gradients(sizes: Sizes, sides: Sides, budget: int) -> Choice:
    """Choose between `rotate` (positions first, then form) and `form` (then rotate the gradient)."""
    rotate, form = _rotate_positions(sizes, sides), _rotate_gradient(sizes, sides)
    order: Order = "rotate" if rotate < form else "form"
    # `form` holds the gradient, half rotated and rotated; `rotate` forms from a pair that is rotated already.
    held = 3 * sizes.weights if order == "form" else sizes.weights + sizes.pair
    return Choice(order=order, flops=_form(sizes) + min(rotate, form), chunk=_chunk(held, sizes.examples, sizes, budget))


def rotation_chunk(sizes: Sizes, budget: int) -> int:
    """Return how many examples to rotate at a time: few large products, within eight times the budget."""
    return _chunk(2 * sizes.pair, sizes.examples, sizes, 8 * budget)


def squares(sizes: Sizes, sides: Sides, budget: int, *, uniform: bool = False) -> Choice:
    """Choose the order for sums over squared rotated gradients: eigenvalues, self-influence, norms.

    With one position the square of an outer product is the outer product of squares (`outer`), and no gradient
    is formed. When every coordinate weighs the same (`uniform`), norms can come from Gram matrices (`gram`).
    """
    if sizes.positions == 1:
        flops = _rotate_positions(sizes, sides) + 2 * sizes.examples * sizes.weights
        return Choice(order="outer", flops=flops, chunk=_chunk(sizes.pair, sizes.examples, sizes, budget))
    best = gradients(sizes, sides, budget)
    gram = 2 * sizes.examples * sizes.positions * sizes.pair
    if uniform and not (sides.inputs or sides.outputs) and gram < best.flops:
        held = 2 * sizes.groups * sizes.positions**2
        return Choice(order="gram", flops=gram, chunk=_chunk(held, sizes.examples, sizes, budget))
    return best


def stay_rotated(sizes: Sizes, sides: Sides, queries: int) -> bool:
    """Whether to leave the preconditioned queries in the eigenbasis; `sizes.examples` counts all training rows.

    Rotating them back costs once per query, leaving them costs rotating every training row.
    """
    per_query = _rotate_gradient(sizes, sides) // max(1, sizes.examples)
    return _rotate_positions(sizes, sides) < queries * per_query


def keep_pairs(sizes: Sizes, sides: Sides) -> bool:
    """Whether queries without a basis are cheaper to hold and to multiply as pairs (Gram form) than as gradients."""
    return not (sides.inputs or sides.outputs) and sizes.positions * sizes.pair < sizes.weights


def pairwise(sizes: Sizes, queries: int, budget: int) -> Choice:
    """Choose the order for the products of a batch with resident dense queries.

    `form` makes gradients a few rows of the weight at a time, so that each stays in the cache for its product
    with all queries (`chunk` counts rows over all groups); `factor`, for one position, multiplies inputs with the
    queries first (`chunk` counts queries).
    """
    products = 2 * sizes.examples * queries * sizes.weights
    factor = products + 2 * sizes.examples * queries * sizes.groups * sizes.outputs
    form = products + _form(sizes)
    if sizes.positions == 1 and factor < form:
        held = sizes.examples * sizes.groups * sizes.outputs
        return Choice(order="factor", flops=factor, chunk=_chunk(held, queries, sizes, budget))
    row = sizes.examples * sizes.inputs
    return Choice(order="form", flops=form, chunk=_chunk(row, sizes.groups * sizes.outputs, sizes, budget))


def low_rank(sizes: Sizes, queries: int, rank: int, budget: int) -> Choice:
    """Choose the order for the products of a batch with resident queries of a low rank.

    `factor` multiplies inputs and output gradients with the factors (`chunk` counts queries); `form` writes the queries out
    again, a few rows at a time, once per batch (`chunk` counts rows over all groups).
    """
    factor = 2 * sizes.examples * queries * rank * sizes.pair
    written = 2 * queries * rank * sizes.weights
    form = written + 2 * sizes.examples * queries * sizes.weights + _form(sizes)
    if factor < form:
        held = 2 * sizes.examples * sizes.groups * sizes.positions * rank
        return Choice(order="factor", flops=factor, chunk=_chunk(held, queries, sizes, budget))
    row = (sizes.examples + queries) * sizes.inputs
    return Choice(order="form", flops=form, chunk=_chunk(row, sizes.groups * sizes.outputs, sizes, budget))
