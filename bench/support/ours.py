"""whence behind the same calls as `support.peer`. Nothing here imports the peer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import whence
from support.models import Case
from whence.storage.shards import ShardStore
from whence.tasks import Task


def task_of(case: Case) -> Task:
    """Return the case's loss and measurement as a task.

    The functions are bound by closure, not kept as attributes, so that a run folder recognises the task in another process.
    """

    class CaseTask(Task):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return case.loss(model, batch)

        def measurement(self, model: nn.Module, batch: Any) -> Tensor:
            return case.measurement(model, batch)

        def padding_mask(self, batch: Any) -> Tensor | Mapping[str, Tensor] | None:
            return None if case.mask is None else case.mask(batch)

    return CaseTask()


class Ours:
    """One analysis of one case with one strategy, on the CPU, with `damping="auto"`; files go to `folder`."""

    def __init__(self, case: Case, *, strategy: str, batch: int, folder: Path) -> None:
        self.case, self.strategy, self.batch, self.folder = case, strategy, batch, folder
        self.attributor = whence.Attributor(
            case.model, task_of(case), run_dir=folder, layers=case.layers, collate=case.collate, device="cpu", progress=False
        )

    def fit(self) -> None:
        """Fit whatever the strategy needs; nothing if the folder holds it."""
        self.attributor.fit(self.case.train, strategy=self.strategy, empirical=True, batch_size=self.batch)

    def fit_eigenvalues(self) -> dict[str, Tensor]:
        """Run the pass for the eigenvalues again, from the stored eigenbases; return them `[group, out, in]` by layer."""
        factors = self.folder / "factors" / self.strategy
        settings = ShardStore.open(factors, kind="factors").settings
        with ShardStore(factors, kind="factors", settings=settings) as store:
            store.remove("eigenvalues")
        self.fit()
        return ShardStore.open(factors, kind="factors").read("eigenvalues")

    def pairwise(self, *, query_batch: int, per_layer: bool = False, count: int | None = None) -> dict[str, Tensor]:
        """Return scores `[query, train]` of the first `count` queries by layer, or under one name."""
        shutil.rmtree(self.folder / "scores", ignore_errors=True)
        scores = self.attributor.scores(
            self.case.queries[:count],
            self.case.train,
            strategy=self.strategy,
            query_batch_size=query_batch,
            batch_size=self.batch,
            per_layer=per_layer,
        )
        return dict(scores.per_layer) if per_layer else {"all_modules": scores.values}

    def self_influence(self) -> dict[str, Tensor]:
        """Return self-influence `[train]` under one name."""
        shutil.rmtree(self.folder / "self_influence", ignore_errors=True)
        values = self.attributor.self_influence(self.case.train, strategy=self.strategy, batch_size=self.batch)
        return {"all_modules": values}

    def stage_seconds(self) -> dict[str, float]:
        """Return the seconds of each stage so far, by name."""
        return {row.name: row.total_s for row in self.attributor.stages.rows()}
