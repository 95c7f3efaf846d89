"""The choice of how to hold one layer's queries."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from whence.capture import contract
from whence.capture.formed import Formed
from whence.capture.pair import IDENTITY, Basis, LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.scores.queries import DenseQueries, Plan, Resident
from whence.scores.queries_low_rank import LowRankQueries
from whence.scores.queries_pairs import PairQueries
from whence.scores.queries_sparse import SparseQueries


def make_resident(gradient: LayerGradient, basis: Basis, weights: Tensor | None, plan: Plan) -> Resident:
    """Choose how to hold one layer's queries, by the sizes of the first query batch and the number of training rows."""
    if isinstance(gradient, SparsePair) and not plan.dense:
        return SparseQueries(basis=basis, weights=weights, queries=plan.kept, budget=plan.budget)
    pair = gradient.live() if isinstance(gradient, Pair) else gradient
    sizes = pair.sizes
    whole = plan.dense or plan.summed or plan.rank is not None
    if isinstance(pair, Pair) and weights is None and not whole and contract.keep_pairs(sizes, IDENTITY.sides):
        return PairQueries.empty(plan.queries, pair)
    shape = (sizes.groups, sizes.outputs, sizes.inputs)
    rotated = not plan.dense and contract.stay_rotated(replace(sizes, examples=plan.train), basis.sides, plan.kept)
    like = gradient.gradient if isinstance(gradient, Formed) else gradient.g  # type: ignore[attr-defined]
    if plan.rank is not None and plan.rank < min(sizes.outputs, sizes.inputs):
        return LowRankQueries.empty(plan, like, shape, basis=basis, weights=weights, rotated=rotated)
    return DenseQueries(values=like.new_zeros(plan.kept, *shape), basis=basis, weights=weights, rotated=rotated, budget=plan.budget)
