"""What stands behind `Attributor`: sessions on the model, stores in the run folder, and what results depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whence.capture.options import CaptureOptions, Precision
from whence.capture.passes import Rows
from whence.capture.recorder import Programs, Recorder
from whence.capture.survey import Known, Survey, survey
from whence.capture.tracking import sum_type, taken_alone, track
from whence.curvature.basis import Curvature
from whence.curvature.moments import layer_scales
from whence.curvature.refine import GAUSS_NEWTON_DAMPING, ConjugateGradients, Exact, Refinement
from whence.curvature.response import Unrolled, remainders, spectral_weights
from whence.curvature.settings import DampingLike, ResponseLike, Spectrum, resolve
from whence.curvature.stored import (
    Preconditioner,
    keep_calibration,
    kept_calibration,
    only_strategy,
    open_factors,
    preconditioner,
    stored_curvature,
)
from whence.curvature.strategies import StrategyName, get_strategy
from whence.errors import ConfigError, LayerError, MismatchError
from whence.runtime.batches import check_dataset, check_rows
from whence.runtime.device import resolve_device
from whence.runtime.memory import BatchSize
from whence.runtime.progress import Stages
from whence.scores.blocks import block_names, unreached
from whence.scores.matrix import Scores
from whence.scores.pairwise import Pairwise
from whence.scores.request import Ask, Request
from whence.scores.self_influence import On, SelfInfluence
from whence.storage.run import RunFolder, fingerprint_tensors
from whence.storage.shards import ShardStore, temporary_store
from whence.tasks import Task, check_model_and_task

Size = int | Literal["auto"]


class Workbench:
    """A model, a task, the layers that are tracked, and a run folder."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        run_dir: str | Path | None = None,
        layers: str | Sequence[str] | None = None,
        fallback: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        device: str | torch.device = "auto",
        precision: Precision = "float32",
        compile: bool = False,  # noqa: A002  (torch's name for it)
        offload: bool = False,
        second_moments: Mapping[str, Tensor] | None = None,
        training_time: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        check_model_and_task(model, task)
        self.device = resolve_device(device)
        self.options = CaptureOptions(precision=precision, compile=compile, offload=offload)
        self.model, self.task, self.collate, self.seed = model.to(self.device), task, collate, seed
        self._named = layers is not None and layers != "all"
        self._layers, self.coverage = track(model, layers, fallback=fallback)
        self._programs: Programs = {}
        self._known: Known = {}
        self._fallback, self._moments = fallback, second_moments
        self._scales = layer_scales(model, self._layers, second_moments)
        self.training_time = training_time
        self.stages = Stages(enabled=progress)
        self.run = RunFolder(None if run_dir is None else Path(run_dir))
        self._temporary = run_dir is None
        self._strategy: StrategyName | None = None

    def _score(self, queries: Rows, train: Rows, ask: Ask) -> Scores:
        with self._session(train, train=train.dataset, queries=queries.dataset) as (recorder, seen):
            factors = self._factors(ask.strategy, seen)
            settings = self._score_settings(ask, seen, factors)
            with self._store("scores", ask.folder, settings, ask.overwrite) as store:
                if not store.complete:
                    self._pairwise(recorder, factors, ask, store, train).run(queries, train)
                    store.finish({"unreached": unreached(store, train, self._layers)})
                self._leave_out_unreached(store)
        self._record("scores", settings)
        return Scores.load(store.folder)

    def _pairwise(self, recorder: Recorder, factors: ShardStore | None, ask: Ask, store: ShardStore, train: Rows) -> Pairwise:
        weighed = self._preconditioner(factors, ask.spectrum)
        solver = None
        if ask.solver is not None:
            # The model was trained on all rows, whichever are scored.
            whole = replace(train, indices=range(len(train.dataset)))
            solver = Refinement(
                settings=ask.solver,
                recorder=recorder,
                train=whole,
                preconditioner=weighed,
                damping=ask.spectrum.damping,
                seed=self.seed,
                stages=self.stages,
            )
        return Pairwise(recorder=recorder, preconditioner=weighed, request=ask.request, store=store, stages=self.stages, solver=solver)

    def query_gradients(
        self,
        queries: Any,
        train: Any,
        *,
        query_rows: Sequence[int] | None = None,
        query_batch_size: Size = "auto",
    ) -> dict[str, Tensor]:
        """Return the measurement's gradients of each layer, `[query, group, out, in]`.

        `train` is looked at as by `scores`; nothing is stored.
        """
        rows = self._rows(queries, "query", query_rows, query_batch_size, "query_batch_size")
        whole = self._rows(train, "training", None, "auto")
        plain = Ask(strategy="identity", spectrum=Spectrum(damping=0.0))
        with self._session(whole, queries=queries) as (recorder, seen), temporary_store("scores", seen.identity) as store:
            return self._pairwise(recorder, None, plain, store, whole).plain_gradients(rows, len(whole))

    def segment_scores(
        self,
        gradients: Mapping[str, Tensor],
        queries: Any,
        train: Any,
        segment: Unrolled,
        *,
        strategy: StrategyName | None = None,
        damping: float = 0.0,
        per_layer: bool = False,
        query_rows: Sequence[int] | None = None,
        train_rows: Sequence[int] | None = None,
        batch_size: Size = "auto",
        overwrite: bool = False,
    ) -> tuple[Scores, dict[str, Tensor]]:
        """Score training rows for queries whose gradients come from a later point of the run.

        Returns the scores, and the gradients carried back to before this segment. Arguments as of `scores` and of
        `Checkpoints.unrolled_scores`.
        """
        rows = self._rows(train, "training", train_rows, batch_size)
        subsets = {"query rows": query_rows, "train rows": None if train_rows is None else rows.indices}
        asked = {key: [int(row) for row in given] for key, given in subsets.items() if given is not None} | {"trained rows": len(train)}
        ask = Ask(
            strategy=self._chosen(strategy),
            spectrum=Spectrum(damping=damping, response=segment),
            request=Request(per_layer=per_layer),
            asked={**asked, "gradients": fingerprint_tensors(gradients)},
            name="segment",
            overwrite=overwrite,
        )
        with self._session(rows, train=train, queries=queries) as (recorder, seen):
            factors = self._factors(ask.strategy, seen)
            settings = self._score_settings(ask, seen, factors)
            with self._store("scores", ask.folder, settings, ask.overwrite) as store:
                if not store.complete:
                    pairwise = self._pairwise(recorder, factors, ask, store, rows)
                    pairwise.meet(pairwise.weighed(gradients), rows)
                    store.finish({"unreached": unreached(store, rows, self._layers)})
                self._leave_out_unreached(store)
            curvature = stored_curvature(factors, self._layers)
            left = self._placed(curvature, remainders(curvature, damping, segment))
            carried = {name: left.apply(name, values) for name, values in gradients.items()}
        self._record("segment", settings)
        return Scores.load(store.folder), carried

    def _self_influence(self, rows: Rows, ask: Ask, on: On) -> Tensor:
        if on not in ("loss", "measurement"):
            raise ConfigError(f"on={on!r} is not known; choose 'loss' or 'measurement'.")
        with self._session(rows, train=rows.dataset) as (recorder, seen):
            factors = self._factors(ask.strategy, seen)
            settings = self._score_settings(ask, seen, factors) | ({} if on == "loss" else {"on": on})
            with self._store("self_influence", ask.folder, settings, ask.overwrite) as store:
                if not store.complete:
                    weighed = self._preconditioner(factors, ask.spectrum)
                    SelfInfluence(recorder=recorder, preconditioner=weighed, on=on, store=store, stages=self.stages).run(rows)
                    store.finish({"unreached": unreached(store, rows, self._layers)})
                self._leave_out_unreached(store)
        self._record("self_influence", settings)
        return torch.cat([store.read(name)["total"] for name in block_names(rows)])

    def _rows(self, dataset: Any, what: str, rows: Sequence[int] | None, size: Size, name: str = "batch_size") -> Rows:
        batch_size = BatchSize(size, device=self.device, name=name)
        indices = check_rows(rows, check_dataset(dataset, what), f"{what} rows")
        return Rows(dataset=dataset, indices=indices, batch_size=batch_size, collate=self.collate, device=self.device)

    @contextmanager
    def _session(self, rows: Rows, **datasets: Any) -> Iterator[tuple[Recorder, Survey]]:
        """Install the taps for one call and look at model and data."""
        recorder = Recorder(self.model, self._layers, self.task, options=self.options, scales=self._scales)
        with recorder.recording():
            seen = survey(recorder, rows, datasets, lenient=not self._named, known=self._known)
            if not self._take_alone(seen.left_out):
                for name, reason in seen.left_out.items():
                    self.coverage.drop(name, reason)
                if not recorder.taken:
                    raise LayerError(f"no layer of the model can be attributed. {self.coverage}")
                if self.options.compile:
                    recorder.compile(self._programs)
                yield recorder, seen
                return
        with self._session(rows, **datasets) as again:
            yield again

    def _take_alone(self, left_out: Mapping[str, str]) -> bool:
        """With `fallback`, track the parameters of layers that cannot be taken one by one; whether there are any."""
        layers = taken_alone(self.model, self._layers, left_out) if self._fallback else self._layers
        if layers == self._layers:
            return False
        self._layers = layers
        self._scales = layer_scales(self.model, layers, self._moments)
        self.coverage.tracked = {layer.name: layer.parameters for layer in layers}
        return True

    def _leave_out_unreached(self, store: ShardStore) -> None:
        for name in store.result["unreached"]:
            self.coverage.drop(name, "reached by no gradient (never called as a module, or cut off from the loss)")

    @contextmanager
    def _store(self, kind: str, name: str, settings: dict[str, Any], overwrite: bool) -> Iterator[ShardStore]:
        # Nobody else sees a temporary folder, so there is nothing to protect in it.
        replace = overwrite or self._temporary
        try:
            opened = ShardStore(self.run.sub(kind, name), kind=kind, settings=settings, overwrite=replace)
        except MismatchError as error:
            keep = "" if kind == "factors" else ", or with name='...' to keep both"
            raise MismatchError(f"{error} Or call with overwrite=True to replace it{keep}.") from None
        with opened as store:
            yield store

    def _chosen(self, strategy: StrategyName | None) -> StrategyName:
        """Return the strategy asked for, fitted last, or alone in the run folder."""
        if strategy is not None:
            get_strategy(strategy)
            return strategy
        return self._strategy or only_strategy(self.run.sub("factors"))

    def _spectrum(
        self, strategy: str, damping: DampingLike, response: ResponseLike, solver: Exact | ConjugateGradients | None = None
    ) -> Spectrum:
        if solver is not None and damping == "auto":
            damping = GAUSS_NEWTON_DAMPING
        key = strategy if solver is None else solver.name
        kept = self.run.sub("calibration", f"{key}.json")
        calibration = kept_calibration(kept, self.model) if damping == "calibrated" else None
        return resolve(damping, response, calibration=calibration, training_time=self.training_time)

    def _keep_calibration(self, key: str, spectrum: Spectrum) -> None:
        keep_calibration(self.run.sub("calibration", f"{key}.json"), self.model, spectrum)

    def _factors(self, strategy: str, seen: Survey) -> ShardStore | None:
        """Open the fitted factors; None for identity, which has none."""
        if strategy == "identity":
            return None
        stored = open_factors(self.run.sub("factors", strategy), seen.identity)
        self._leave_out_unreached(stored)
        return stored

    def _score_settings(self, ask: Ask, seen: Survey, factors: ShardStore | None) -> dict[str, Any]:
        fitted = self._fitted(factors, seen)
        return {"strategy": ask.strategy, **ask.spectrum.to_json(), **seen.identity, "factors": fitted, **seen.data, **ask.asked}

    def _fitted(self, factors: ShardStore | None, seen: Survey) -> dict[str, Any]:
        """Return how the factors were fitted, beside the model and the task."""
        return {} if factors is None else {key: value for key, value in factors.settings.items() if key not in seen.identity}

    def _preconditioner(self, factors: ShardStore | None, spectrum: Spectrum) -> Preconditioner:
        return self._weighed(stored_curvature(factors, self._layers), spectrum)

    def _weighed(self, curvature: Curvature, spectrum: Spectrum) -> Preconditioner:
        weights = spectral_weights(curvature, spectrum.damping, spectrum.response, {layer.name: layer.shape for layer in self._layers})
        return self._placed(curvature, weights)

    def _placed(self, curvature: Curvature, weights: Mapping[str, Tensor | None]) -> Preconditioner:
        return preconditioner(curvature, weights, device=self.device, dtype=sum_type(self.model), offload=self.options.offload)

    def _record(self, command: str, settings: dict[str, Any]) -> None:
        self.run.record(
            {
                "call": command,
                "settings": settings,
                "coverage": {"share": self.coverage.share, "left_out": self.coverage.left_out},
                "stages": self.stages.to_json(),
            }
        )
