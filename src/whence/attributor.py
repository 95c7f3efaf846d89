"""The face of the library: fit the curvature once, then ask for scores and self-influence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from whence.capture.passes import Rows, draw_rows
from whence.capture.recorder import Recorder
from whence.capture.survey import Survey, survey
from whence.capture.tracking import sum_type, track
from whence.curvature.basis import Damping, resolve_damping
from whence.curvature.fit import Fitter, unfitted
from whence.curvature.stored import Preconditioner, only_strategy, open_factors, preconditioner
from whence.curvature.strategies import StrategyName, get_strategy
from whence.errors import ConfigError
from whence.runtime.batches import check_dataset
from whence.runtime.device import resolve_device
from whence.runtime.progress import Stages
from whence.scores.blocks import block_names, unreached
from whence.scores.matrix import Scores
from whence.scores.pairwise import Pairwise
from whence.scores.self_influence import SelfInfluence
from whence.storage.run import RunFolder
from whence.storage.shards import ShardStore
from whence.tasks import Task


class Attributor:
    """Traces a trained model's behaviour to its training examples.

    Nothing of the model is replaced; hooks, frozen parameters and eval mode last for one call and are undone, also
    after an error. Everything is kept in `run_dir`: a call that was interrupted continues where it stopped, and a
    call that was made before with the same model, data and settings is read back.

    Args:
        model: any module with Linear, Hugging Face Conv1D or Conv2d layers.
        task: what the model is trained on; see `whence.tasks`.
        run_dir: folder for factors and scores; None: a temporary one that goes with this object.
        layers: None (all layers with a handler that are trained, without output heads as wide as the vocabulary),
            `"all"`, or names and shell patterns.
        collate: makes a batch of a list of rows; by default torch's `default_collate`.
        device: `"auto"` (a GPU if there is one), or a torch device. The model is moved there.
        seed: keys the labels drawn for the true Fisher, and the choice of `max_examples`.
        progress: show progress on standard error.

    Raises:
        LayerError: no layer can be tracked, or a name in `layers` matches none.
        ConfigError: the device does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        run_dir: str | Path | None = None,
        layers: str | Sequence[str] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.device = resolve_device(device)
        self.model, self.task, self.collate, self.seed = model.to(self.device), task, collate, seed
        self._layers, self.coverage = track(model, layers)
        self.stages = Stages(enabled=progress)
        self.run = RunFolder(None if run_dir is None else Path(run_dir))
        self._temporary = run_dir is None
        self._strategy: StrategyName | None = None

    def fit(
        self,
        train: Any,
        *,
        strategy: StrategyName = "ekfac",
        empirical: bool = False,
        batch_size: int = 32,
        max_examples: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Fit the curvature on training rows; `"identity"` needs no pass over them.

        Args:
            train: anything with `__len__` and `__getitem__`; None will do for `"identity"`.
            strategy: `"identity"`, `"diagonal"`, `"kfac"` or `"ekfac"`.
            empirical: use the data's labels; by default labels are drawn from the model (true Fisher).
            batch_size: rows at a time; changes no result beyond rounding.
            max_examples: fit on that many rows, drawn with the seed.
            overwrite: start again if the run folder holds factors of another model, data set or setting.

        Raises:
            DataError: a row cannot be used. NumericalError: NaN or infinity. MismatchError: see `overwrite`.
        """
        get_strategy(strategy)
        if strategy == "identity":  # nothing to fit
            self._strategy = strategy
            return self
        indices = draw_rows(check_dataset(train, "training"), max_examples, seed=self.seed)
        rows = self._rows(train, indices, batch_size)
        with self._session(rows, train=train) as (recorder, seen):
            settings = {
                "strategy": strategy,
                "empirical": empirical,
                "seed": self.seed,
                "max_examples": len(indices),
                **seen.identity,
                **seen.data,
            }
            with self._store("factors", strategy, settings, overwrite) as store:
                if not store.complete:
                    Fitter(
                        recorder=recorder,
                        rows=rows,
                        strategy=strategy,
                        empirical=empirical,
                        seed=self.seed,
                        store=store,
                        stages=self.stages,
                    ).fit()
                    store.finish({"unreached": unfitted(store, self._layers)})
                self._leave_out_unreached(store)
        self._strategy = strategy
        self._record("fit", settings)
        return self

    def scores(
        self,
        queries: Any,
        train: Any,
        *,
        strategy: StrategyName | None = None,
        damping: float | Damping | Literal["auto"] = "auto",
        per_layer: bool = False,
        query_batch_size: int = 32,
        batch_size: int = 32,
        overwrite: bool = False,
    ) -> Scores:
        """Score every training row for every query, in one pass over the training rows.

        Args:
            queries: rows whose measurement is to be explained.
            train: rows that may explain it.
            strategy: which fitted curvature to use; by default the one fitted last, else the only one in the run folder.
            damping: added to every eigenvalue; a number, `"auto"` (a tenth of each layer's mean eigenvalue) or `Damping`.
            per_layer: also keep the scores of each layer.
            query_batch_size: queries at a time while their gradients are taken.
            batch_size: training rows at a time; changes no result beyond rounding.
            overwrite: start again if the run folder holds scores of another model, other data or settings.

        Raises:
            NotFittedError: `fit` was not called. MismatchError: what is in the run folder belongs to another model,
            data set or setting. DataError, NumericalError: as `fit`.
        """
        query_rows = self._rows(queries, range(check_dataset(queries, "query")), query_batch_size, "query_batch_size")
        train_rows = self._rows(train, range(check_dataset(train, "training")), batch_size)
        strategy, checked = self._chosen(strategy), resolve_damping(damping)
        with self._session(train_rows, train=train, queries=queries) as (recorder, seen):
            factors = self._factors(strategy, seen)
            settings = {**self._score_settings(strategy, checked, seen, factors), "per_layer": per_layer}
            with self._store("scores", strategy, settings, overwrite) as store:
                if not store.complete:
                    bases, weights = self._preconditioner(factors, checked)
                    Pairwise(
                        recorder=recorder,
                        bases=bases,
                        weights=weights,
                        per_layer=per_layer,
                        store=store,
                        stages=self.stages,
                    ).run(query_rows, train_rows)
                    store.finish({"unreached": unreached(store, train_rows, self._layers)})
                self._leave_out_unreached(store)
        self._record("scores", settings)
        return Scores.load(store.folder)

    def self_influence(
        self,
        train: Any,
        *,
        strategy: StrategyName | None = None,
        damping: float | Damping | Literal["auto"] = "auto",
        batch_size: int = 32,
        overwrite: bool = False,
    ) -> Tensor:
        """Return each row's influence on its own loss, `[train]` on the CPU; high for mislabelled and odd rows.

        Arguments and errors as for `scores`.
        """
        rows = self._rows(train, range(check_dataset(train, "training")), batch_size)
        strategy, checked = self._chosen(strategy), resolve_damping(damping)
        with self._session(rows, train=train) as (recorder, seen):
            factors = self._factors(strategy, seen)
            settings = self._score_settings(strategy, checked, seen, factors)
            with self._store("self_influence", strategy, settings, overwrite) as store:
                if not store.complete:
                    bases, weights = self._preconditioner(factors, checked)
                    SelfInfluence(recorder=recorder, bases=bases, weights=weights, store=store, stages=self.stages).run(rows)
                    store.finish({"unreached": unreached(store, rows, self._layers)})
                self._leave_out_unreached(store)
        self._record("self_influence", settings)
        return torch.cat([store.read(name)["total"] for name in block_names(rows)])

    def _rows(self, dataset: Any, indices: Sequence[int], batch_size: int, name: str = "batch_size") -> Rows:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"{name}={batch_size!r} cannot be used; give a number of rows, 1 or more.")
        return Rows(dataset=dataset, indices=indices, batch_size=batch_size, collate=self.collate, device=self.device)

    @contextmanager
    def _session(self, rows: Rows, **datasets: Any) -> Iterator[tuple[Recorder, Survey]]:
        """Install the taps for one call and look at model and data."""
        recorder = Recorder(self.model, self._layers, self.task)
        with recorder.recording():
            seen = survey(recorder, rows, datasets)
            for name in seen.unbatched:
                self.coverage.drop(name, "called without the batch's axis")
            yield recorder, seen

    def _leave_out_unreached(self, store: ShardStore) -> None:
        for name in store.result["unreached"]:
            self.coverage.drop(name, "reached by no gradient (never called as a module, or cut off from the loss)")

    @contextmanager
    def _store(self, kind: str, strategy: str, settings: dict[str, Any], overwrite: bool) -> Iterator[ShardStore]:
        # Nobody else sees a temporary folder, so there is nothing to protect in it.
        replace = overwrite or self._temporary
        with ShardStore(self.run.sub(kind, strategy), kind=kind, settings=settings, overwrite=replace) as store:
            yield store

    def _chosen(self, strategy: StrategyName | None) -> StrategyName:
        """Return the strategy asked for, fitted last, or alone in the run folder."""
        if strategy is not None:
            get_strategy(strategy)
            return strategy
        return self._strategy or only_strategy(self.run.sub("factors"))

    def _factors(self, strategy: str, seen: Survey) -> ShardStore | None:
        """Open the fitted factors; None for identity, which has none."""
        if strategy == "identity":
            return None
        stored = open_factors(self.run.sub("factors", strategy), seen.identity)
        self._leave_out_unreached(stored)
        return stored

    def _score_settings(self, strategy: str, damping: float | Damping, seen: Survey, factors: ShardStore | None) -> dict[str, Any]:
        fitted = {} if factors is None else {k: v for k, v in factors.settings.items() if k not in seen.identity}
        return {
            "strategy": strategy,
            "damping": damping if isinstance(damping, float) else vars(damping),
            **seen.identity,
            "factors": fitted,
            **seen.data,
        }

    def _preconditioner(self, factors: ShardStore | None, damping: float | Damping) -> Preconditioner:
        return preconditioner(factors, self._layers, damping, device=self.device, dtype=sum_type(self.model))

    def _record(self, command: str, settings: dict[str, Any]) -> None:
        self.run.record(
            {
                "call": command,
                "settings": settings,
                "coverage": {"share": self.coverage.share, "left_out": self.coverage.left_out},
                "stages": self.stages.to_json(),
            }
        )
