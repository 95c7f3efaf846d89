"""What is asked of a matrix of scores, checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from whence.curvature.refine import ConjugateGradients, Exact, SolverLike, named_solver
from whence.curvature.settings import ResponseLike, Spectrum
from whence.curvature.strategies import StrategyName
from whence.errors import ConfigError

Aggregate = Literal["queries", "rows", "both"]
Normalize = Literal["relatif", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked.

    Attributes:
        per_layer: keep each layer's part too.
        per_token: keep each training token's part too.
        aggregate: sum over `"queries"`, training `"rows"` or `"both"`.
        normalize: `"relatif"` divides by `sqrt(g_t^T (H + d)^-1 g_t)` (Barshan et al., "RelatIF", 2020), which takes the
            weight off rows that are loud for every query; `"cosine"` also by the query's own norm.
        query_rank: keep each layer's preconditioned queries at that rank; those of an embedding, sparse already, stay whole.

    Raises:
        ConfigError: a value is not known, or two cannot be had together.
    """

    per_layer: bool = False
    per_token: bool = False
    aggregate: Aggregate | None = None
    normalize: Normalize | None = None
    query_rank: int | None = None

    def __post_init__(self) -> None:
        if self.aggregate not in (None, "queries", "rows", "both"):
            raise ConfigError(f"aggregate={self.aggregate!r} is not known; choose 'queries', 'rows', 'both' or None.")
        if self.normalize not in (None, "relatif", "cosine"):
            raise ConfigError(f"normalize={self.normalize!r} is not known; choose 'relatif', 'cosine' or None.")
        rank = self.query_rank
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(f"query_rank={rank!r} cannot be used; give a whole number of 1 or more, or None for whole gradients.")
        if self.sums_rows and (self.per_token or self.normalize):
            other = "per_token=True" if self.per_token else f"normalize={self.normalize!r}"
            raise ConfigError(f"aggregate={self.aggregate!r} sums over training rows, and {other} is about each of them; leave one out.")
        if self.sums_queries and rank is not None:
            raise ConfigError(f"query_rank={rank} keeps many queries in little memory, and aggregate sums them into one; leave one out.")
        if self.sums_queries and self.normalize == "cosine":
            raise ConfigError("normalize='cosine' needs each query's norm, and aggregate sums over queries; use normalize='relatif'.")

    @property
    def sums_queries(self) -> bool:
        """Whether queries are added up."""
        return self.aggregate in ("queries", "both")

    @property
    def sums_rows(self) -> bool:
        """Whether training rows are added up."""
        return self.aggregate in ("rows", "both")

    def to_json(self) -> dict[str, Any]:
        """Return what differs from the default, for a manifest."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request for scores; `asked` is what of it goes into the manifest beside model, data and curvature."""

    strategy: StrategyName
    spectrum: Spectrum
    request: Request = field(default_factory=Request)
    solver: Exact | ConjugateGradients | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def folder(self) -> str:
        """Name of the folder in the run folder."""
        return scores_folder(self.name, self.strategy, "direct" if self.solver is None else self.solver.name)


def check_name(name: str | None) -> None:
    """Refuse what cannot name a folder in the run folder.

    Raises:
        ConfigError: it has other characters, or begins with a dot.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ConfigError(f"name={name!r} cannot name a folder; use letters, digits, '.', '_' and '-', as in 'my-scores'.")


def scores_folder(name: str | None, strategy: str, solver: str) -> str:
    """Return the name of the folder of scores: the one given, else one that tells curvature and solver."""
    return name or {"direct": strategy, "exact": "exact", "cg": f"{strategy}-cg"}[solver]


def checked_solver(solver: SolverLike, request: Request, response: ResponseLike) -> Exact | ConjugateGradients | None:
    """Return the solver's settings, None for the direct one.

    Raises:
        ConfigError: it is not known, or cannot be had together with what else is asked.
    """
    plan = named_solver(solver)
    if plan is None:
        return None
    others = {"normalize": request.normalize, "query_rank": request.query_rank, "response": None if response == "inverse" else response}
    for name, value in others.items():
        if value is not None:
            raise ConfigError(f"{name}={value!r} needs the fitted curvature itself; use it with solver='direct'.")
    return plan
