"""The options of the scores, from explicit matrices: tokens, ranks, norms and sums of what `oracle.py` collects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oracle import Curvature, Example, preconditioned
from oracle_layers import Source


@dataclass
class Answer:
    """`values [query, train]`, the same by layer, `per_token [query, train, token]` and `rest [query, train]`."""

    values: Tensor
    per_layer: dict[str, Tensor]
    per_token: Tensor
    rest: Tensor


def answer(
    queries: Sequence[Example],
    train: Sequence[Example],
    curvatures: Mapping[str, Curvature],
    dampings: Mapping[str, float],
    *,
    query_rank: int | None = None,
    normalize: str | None = None,
    aggregate: str | None = None,
) -> Answer:
    """Score with options. `queries` hold measurement gradients, `train` loss gradients; rows are chosen before."""
    ready = {name: preconditioned([q.gradient[name] for q in queries], curvatures[name], dampings[name]) for name in curvatures}
    length = norms_of(queries, ready) if normalize == "cosine" else None
    if query_rank is not None:
        # The gradient of an embedding has a column for each of the row's words and is small already: it stays whole.
        whole = {name for name, layer in queries[0].layers.items() if layer.sources and all(is_lookup(source) for source in layer.sources)}
        ready = {name: matrices if name in whole else truncated(matrices, query_rank) for name, matrices in ready.items()}
    per_layer = {name: torch.einsum("qgoi,tgoi->qt", matrices, stacked(train, name)) for name, matrices in ready.items()}
    per_token, rest = by_token(ready, train)
    parts = [*per_layer.values(), per_token, rest]
    if normalize is not None:
        parts = [over(part, norms(train, curvatures, dampings), 1) for part in parts]
    if length is not None:
        parts = [over(part, length, 0) for part in parts]
    for axis, words in ((0, ("queries", "both")), (1, ("rows", "both"))):
        if aggregate in words:
            parts = [part.sum(axis, keepdim=True) for part in parts]
    *layers, per_token, rest = parts
    return Answer(sum(layers), dict(zip(per_layer, layers, strict=True)), per_token, rest)


def is_lookup(source: Source) -> bool:
    return isinstance(source.module, nn.Embedding)


def stacked(examples: Sequence[Example], name: str) -> Tensor:
    return torch.stack([example.gradient[name] for example in examples])


def over(part: Tensor, length: Tensor, axis: int) -> Tensor:
    """Divide by a length for each query (axis 0) or training row (axis 1)."""
    return part / length.view([-1 if i == axis else 1 for i in range(part.dim())])


def norms(examples: Sequence[Example], curvatures: Mapping[str, Curvature], dampings: Mapping[str, float]) -> Tensor:
    """Return `sqrt(G^T (H + damping)^-1 G)` over all layers, one number for each example."""
    ready = {name: preconditioned([e.gradient[name] for e in examples], curvatures[name], dampings[name]) for name in curvatures}
    return norms_of(examples, ready)


def norms_of(examples: Sequence[Example], ready: Mapping[str, Tensor]) -> Tensor:
    return sum((stacked(examples, name) * matrices).flatten(1).sum(1) for name, matrices in ready.items()).sqrt()


def truncated(matrices: Tensor, rank: int) -> Tensor:
    """Return the best approximation of each `[out, in]` matrix of rank `rank` at most."""
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    return u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ v[..., :rank, :]


def by_token(ready: Mapping[str, Tensor], train: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return `g_t^T P_q a_t` summed over layers for each token, and what is on no token."""
    count = len(next(iter(ready.values())))
    longest = max((example.tokens or 0 for example in train), default=0)
    tokens, rest = torch.zeros(count, len(train), longest, dtype=torch.float64), torch.zeros(count, len(train), dtype=torch.float64)
    for row, example in enumerate(train):
        for name, matrices in ready.items():
            if example.layers[name].fallback:
                rest[:, row] += torch.einsum("qgoi,goi->q", matrices, example.gradient[name])
            elif name in example.uses:
                uses = example.uses[name]
                # The padding word of an embedding has positions, but no gradient.
                kept = uses.real if example.layers[name].free[0] else torch.ones_like(uses.real)
                each = torch.einsum("pgo,qgoi,pgi->qp", uses.g * kept[:, None, None], matrices, uses.a)
                on = uses.token >= 0
                tokens[:, row].index_add_(1, uses.token[on], each[:, on])
                rest[:, row] += each[:, ~on].sum(1)
    return tokens, rest
