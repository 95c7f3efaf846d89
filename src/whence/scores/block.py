"""The scores of one block of training rows, as they come in layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.capture.formed import Formed
from whence.capture.pair import Basis, LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.scores.matrix import TOKENS, TOTAL, layer_key
from whence.scores.queries import Resident
from whence.scores.request import Request


def own_products(gradient: LayerGradient, basis: Basis, weights: Tensor | None, budget: int) -> Tensor:
    """Return `g_t^T (H + d)^-1 g_t` of each example, `[example]`."""
    return gradient.norms(budget).sum(1) if weights is None else gradient.weighted_squares(basis, weights, budget)


@dataclass(kw_only=True)
class Block:
    """Sums of one block, `[row, query]`, on the device; a request that sums rows has one row."""

    rows: int
    queries: int
    request: Request
    layers: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    sums: dict[str, Tensor] = field(default_factory=dict)
    norms: Tensor | None = None
    tokens: Tensor | None = None

    def __post_init__(self) -> None:
        rows = 1 if self.request.sums_rows else self.rows
        keys = [TOTAL, *(layer_key(number, name) for number, name in enumerate(self.layers))]
        self.sums = {key: torch.zeros(rows, self.queries, dtype=self.dtype, device=self.device) for key in keys}
        self._keys = {name: layer_key(number, name) for number, name in enumerate(self.layers)}
        if self.request.normalize is not None:
            self.norms = torch.zeros(self.rows, dtype=self.dtype, device=self.device)

    def add_norms(self, first: int, products: Tensor) -> None:
        """Add a layer's part of the rows' own products."""
        assert self.norms is not None
        self.norms[first : first + len(products)] += products

    def add(self, first: int, name: str, resident: Resident, gradient: LayerGradient) -> None:
        """Add a layer's scores of the rows from `first` on."""
        if self.request.sums_rows:
            first, gradient = 0, gradient.merged()
        if self.request.per_token and not isinstance(gradient, Formed) and (places := gradient.places) is not None:  # type: ignore[attr-defined]
            scores = self._add_tokens(first, resident, gradient, places)  # type: ignore[arg-type]
        else:
            scores = resident.scores(gradient)
        self.sums[TOTAL][first : first + len(scores)] += scores
        if name in self._keys:
            self.sums[self._keys[name]][first : first + len(scores)] += scores

    def _add_tokens(self, first: int, resident: Resident, gradient: Pair | SparsePair, places: Tensor) -> Tensor:
        """Add scores of positions to their tokens; return their sums `[example, query]`."""
        found = resident.position_scores(gradient)
        longest = int(places.max()) + 1
        if self.tokens is None:
            self.tokens = found.new_zeros(self.rows, 0, self.queries)
        if longest > self.tokens.shape[1]:
            self.tokens = F.pad(self.tokens, (0, 0, 0, longest - self.tokens.shape[1]))
        examples, there = torch.arange(first, first + len(found), device=found.device).unsqueeze(1).expand_as(places), places >= 0
        flat = examples[there] * self.tokens.shape[1] + places[there]
        self.tokens.view(-1, self.queries).index_add_(0, flat, found[there])
        return found.sum(1)

    def shard(self, query_norms: Tensor) -> dict[str, Tensor]:
        """Return the block's tensors as they are stored: `[query, row]`, tokens `[query, row, token]`."""
        results = dict(self.sums)
        if self.request.per_token:
            results[TOKENS] = self.sums[TOTAL].new_zeros(self.rows, 0, self.queries) if self.tokens is None else self.tokens
        if self.norms is not None:
            divisor = self.norms.clamp(min=0).sqrt().unsqueeze(1)
            if self.request.normalize == "cosine":
                divisor = divisor * query_norms.clamp(min=0).sqrt()
            # A row without any gradient scores nothing, and stays so.
            divisor = torch.where(divisor > 0, divisor, torch.inf)
            results = {key: values / (divisor.unsqueeze(1) if key == TOKENS else divisor) for key, values in results.items()}
        return {key: values.movedim(-1, 0).contiguous().cpu() for key, values in results.items()}
