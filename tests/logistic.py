"""Logistic regression as a recipe whose retraining is its exact refit, so that estimates to first order have nothing to miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whence
from whence.tasks import Classification

FEATURES, GROUPS, EACH, QUERIES = 3, 8, 5, 12
RIDGE = 0.7
WRONG = ("source 2", "source 5")
"""Groups whose labels are all wrong."""

CALLS: list[tuple[int, ...]] = []
"""Rows of every training, for tests that run them in this process."""
STOP_AT: list[int] = []
"""Places in CALLS at which a training is interrupted."""
PARTS = ["early"] * 5 + ["late"] * (QUERIES - 5)
"""Groups of the queries, for recipes that have some."""

Row = tuple[Tensor, int]


@cache
def drawn(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, FEATURES, generator=generator)
    noise = 0.5 * torch.randn(count, generator=generator)
    return [(row, int(row[0] + 0.5 * row[1] + bump > 0)) for row, bump in zip(rows, noise, strict=True)]


def groups() -> list[str]:
    return [f"source {place % GROUPS}" for place in range(GROUPS * EACH)]


def train_rows() -> list[Row]:
    return [(x, 1 - y if group in WRONG else y) for (x, y), group in zip(drawn(GROUPS * EACH, 1), groups(), strict=True)]


def network() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(FEATURES, 2)


def fitted(rows: Sequence[int]) -> nn.Linear:
    """Return the network where the summed loss of these rows plus `RIDGE / 2` times the squared move is least, by Newton's method."""
    chosen = [train_rows()[row] for row in rows]
    x, y = torch.stack([row[0] for row in chosen]).double(), torch.tensor([row[1] for row in chosen])
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    made = network().double()
    first = torch.cat([made.weight, made.bias[:, None]], 1).detach()

    theta, one = first.clone(), F.one_hot(y, 2).double()
    for _ in range(30):
        p = (x @ theta.T).softmax(1)
        slope = (p - one).T @ x + RIDGE * (theta - first)
        bend = torch.einsum("nij,nk,nl->ikjl", torch.diag_embed(p) - p[:, :, None] * p[:, None], x, x).reshape(theta.numel(), -1)
        theta = theta - torch.linalg.solve(bend + RIDGE * torch.eye(len(bend)), slope.flatten()).view_as(theta)
    with torch.no_grad():
        made.weight.copy_(theta[:, :-1])
        made.bias.copy_(theta[:, -1])
    return made


def query_losses(model: nn.Module) -> Tensor:
    rows = drawn(QUERIES, 2)
    with torch.no_grad():
        logits = model(torch.stack([row[0] for row in rows]).double())
    return F.cross_entropy(logits, torch.tensor([row[1] for row in rows]), reduction="none")


@dataclass(frozen=True)
class ExactRefit:
    """A procedure for `whence.evaluate.retrain`; the seed has no part in it."""

    key: str = f"logistic {RIDGE}"

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        if len(CALLS) in STOP_AT:
            raise KeyboardInterrupt
        CALLS.append(tuple(rows))
        return query_losses(fitted(rows))


def mine(**options: Any) -> whence.Recipe:
    fields = {
        "name": "mine",
        "model": network(),
        "task": Classification(),
        "train": train_rows(),
        "queries": drawn(QUERIES, 2),
        "groups": groups(),
        "raw": [{"number": number, "x": x.tolist(), "y": y} for number, (x, y) in enumerate(train_rows())],
        "retraining": ExactRefit(),
    }
    return whence.Recipe(**(fields | options))


def recipe() -> whence.Recipe:
    return mine()
