"""The choice of how to hold one layer's queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from whence.capture import contract
from whence.capture.contract import Sizes
from whence.capture.formed import Formed
from whence.capture.pair import IDENTITY, Basis, LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.scores.queries import DenseQueries, Holding, Resident
from whence.scores.queries_low_rank import LowRankQueries
from whence.scores.queries_pairs import PairQueries
from whence.scores.queries_sparse import SparseQueries

Form = Literal["dense", "low_rank", "pairs", "sparse"]


def form_of(sizes: Sizes, *, sparse: bool, formed: bool, weighed: bool, rank: int | None, summed: bool) -> Form:
    """Return how a layer's queries are held.

    Args:
        sizes: of the layer in a batch of queries.
        sparse: whether it is an embedding. formed: whether its gradients come formed. weighed: whether they are preconditioned.
        rank, summed: as of a `Holding`.
    """
    if sparse:
        return "sparse"
    plain = not (formed or weighed or summed or rank is not None)
    if plain and contract.keep_pairs(sizes, IDENTITY.sides):
        return "pairs"
    return "low_rank" if rank is not None and rank < min(sizes.outputs, sizes.inputs) else "dense"


def make_resident(gradient: LayerGradient, basis: Basis, weights: Tensor | None, holding: Holding) -> Resident:
    """Choose how to hold one layer's queries, by the sizes of the first query batch and the number of training rows."""
    live = gradient.live() if isinstance(gradient, Pair) else gradient
    sizes, sparse, formed = live.sizes, isinstance(gradient, SparsePair), isinstance(gradient, Formed)
    form: Form = "dense"  # a solver takes whole gradients
    if not holding.dense:
        weighed = weights is not None
        form = form_of(sizes, sparse=sparse, formed=formed, weighed=weighed, rank=holding.rank, summed=holding.summed)
    if form == "sparse":
        return SparseQueries(basis=basis, weights=weights, queries=holding.kept, budget=holding.budget)
    if form == "pairs" and isinstance(live, Pair):
        return PairQueries.empty(holding.queries, live)
    shape = (sizes.groups, sizes.outputs, sizes.inputs)
    rotated = not holding.dense and contract.stay_rotated(replace(sizes, examples=holding.train), basis.sides, holding.kept)
    like = gradient.gradient if isinstance(gradient, Formed) else gradient.g  # type: ignore[attr-defined]
    if form == "low_rank":
        return LowRankQueries.empty(holding, like, shape, basis=basis, weights=weights, rotated=rotated)
    return DenseQueries(values=like.new_zeros(holding.kept, *shape), basis=basis, weights=weights, rotated=rotated, budget=holding.budget)
