"""The part of an attributor that says which tokens a score comes from, on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whence.capture.passes import Rows
from whence.capture.recorder import Recorder
from whence.capture.survey import Survey
from whence.capture.tracking import sum_type
from whence.curvature.settings import DampingLike, ResponseLike
from whence.curvature.stored import Preconditioner
from whence.curvature.strategies import StrategyName
from whence.errors import ConfigError
from whence.scores.blocks import block_names
from whence.scores.matrix import TOKENS, TOTAL, padded
from whence.scores.pairwise import Pairwise
from whence.scores.request import Request
from whence.scores.tokens import TokenScores
from whence.storage.shards import temporary_store
from whence.workbench import Size, Workbench

HELD_BYTES = 2**30
"""Gradients that are held at a time. More rows than that are taken in turns, each a pass over the other side's few rows."""


class TokenBench(Workbench):
    """What asks a model for scores by token."""

    def token_scores(
        self,
        queries: Any,
        train: Any,
        *,
        strategy: StrategyName | None = None,
        damping: DampingLike = "auto",
        response: ResponseLike = "inverse",
        query_rows: Sequence[int] | None = None,
        train_rows: Sequence[int] | None = None,
        query_batch_size: Size = "auto",
        batch_size: Size = "auto",
    ) -> TokenScores:
        """Say which tokens of a few training rows, and which tokens of the queries, the scores come from; nothing is stored.

        Each side's gradient is a sum over its tokens, and a score is linear in both. The training side is what
        `scores(per_token=True)` gives.

        Args:
            queries, train: rows as of `scores`; of `train` name a few with `train_rows`, such as a query's strongest.
            strategy, damping, response, query_rows, train_rows, query_batch_size, batch_size: as of `scores`, and so are the errors.

        Raises:
            ConfigError: no layer's positions are the batch's tokens, so that there is nothing to tell apart.
        """
        asked = self._rows(queries, "query", query_rows, query_batch_size, "query_batch_size")
        taken = self._rows(train, "training", train_rows, batch_size)
        chosen = self._chosen(strategy)
        spectrum = self._spectrum(chosen, damping, response)
        with self._session(taken, queries=queries) as (recorder, seen):
            weighed = self._preconditioner(self._factors(chosen, seen), spectrum)
            return self._by_token(recorder, weighed, seen, asked, taken)

    def _by_token(self, recorder: Recorder, weighed: Preconditioner, seen: Survey, queries: Rows, train: Rows) -> TokenScores:
        """Hold each side in turn while the other's tokens pass."""
        with temporary_store("scores", seen.identity) as store:
            pairwise = Pairwise(recorder=recorder, preconditioner=weighed, request=Request(per_token=True), store=store, stages=self.stages)
            values, of_rows = self._passed(pairwise, queries, train)
            _, of_queries = self._passed(pairwise.exchanged(), train, queries)
        if not of_rows.shape[2] and not of_queries.shape[2]:
            raise ConfigError(
                "these scores cannot be told apart by token: no layer's positions are the tokens of a batch. A task has tokens if its "
                "padding_mask gives [batch, position], or its batches have input_ids [batch, position]. Ask for scores of whole rows."
            )
        return TokenScores(values=values, rows=of_rows, queries=of_queries.transpose(0, 1))

    def _passed(self, pairwise: Pairwise, held: Rows, passed: Rows) -> tuple[Tensor, Tensor]:
        """Return `[held, passed]` and `[held, passed, token of the passed row]`."""
        each = sum(layer.parameters for layer in self._layers) * sum_type(self.model).itemsize
        several = max(1, HELD_BYTES // each)
        values, tokens = [], []
        for start in range(0, len(held), several):
            pairwise.run(replace(held, indices=held.indices[start : start + several]), passed)
            shards = [pairwise.store.read(name) for name in block_names(passed)]
            pairwise.store.remove(*block_names(passed))
            values.append(torch.cat([shard[TOTAL] for shard in shards], dim=1))
            tokens.append(padded([shard[TOKENS] for shard in shards]))
        return torch.cat(values), padded(tokens, dim=0)
