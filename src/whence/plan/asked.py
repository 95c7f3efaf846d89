"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, field

from whence.capture.contract import Sides
from whence.capture.tracking import TrackedLayer
from whence.curvature.strategies import StrategyName, get_strategy
from whence.scores.request import Request
from whence.scores.self_influence import On

NO_SIDES = Sides(inputs=False, outputs=False)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The calls that are planned.

    Attributes:
        strategy, empirical: as of `fit`.
        fitted: rows that the curvature is fitted on.
        train: rows that are scored.
        queries: number of queries; 0: no scores are planned.
        batch, query_batch: rows per batch.
        request: what is asked of the scores.
        on: what self-influence is about.
    """

    strategy: StrategyName
    empirical: bool
    fitted: int
    train: int
    queries: int
    batch: int
    query_batch: int
    request: Request = field(default_factory=Request)
    on: On = "loss"

    @property
    def kept(self) -> int:
        """Queries that are held."""
        return 1 if self.request.sums_queries else self.queries

    @property
    def weighed(self) -> bool:
        """Whether the curvature has eigenvalues."""
        return get_strategy(self.strategy).eigenvalues != "one"

    @property
    def rotated(self) -> bool:
        """Whether the curvature has eigenvectors."""
        return get_strategy(self.strategy).eigenbasis

    @property
    def scaled(self) -> bool:
        """Whether eigenvalues come from the first pass."""
        return get_strategy(self.strategy).eigenvalues == "product"

    @property
    def moments(self) -> bool:
        """Whether eigenvalues come from a pass of their own."""
        return get_strategy(self.strategy).eigenvalues == "moment"

    def sides(self, layer: TrackedLayer) -> Sides:
        """Return which sides of a layer get eigenvectors."""
        return layer.sides if self.rotated else NO_SIDES
