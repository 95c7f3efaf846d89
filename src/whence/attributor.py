"""The face of the library: fit the curvature once, then ask for scores and self-influence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from whence.capture.passes import draw_rows
from whence.curvature.basis import SCOPES, Damping, resolve_damping
from whence.curvature.fit import Fitter, unfitted
from whence.curvature.refine import Exact, SolverLike, named_solver
from whence.curvature.response import Unrolled
from whence.curvature.settings import DampingLike, ResponseLike, Spectrum
from whence.curvature.strategies import StrategyName, get_strategy
from whence.evaluate.lds import Calibration, calibrate
from whence.evaluate.retrain import RetrainBank
from whence.index.claim import checked_ids
from whence.index.encoding import Dtype
from whence.index.index import Index
from whence.index.projection import Kind, RowSettings
from whence.linearising import LinearBench
from whence.plan.predict import make_plan
from whence.plan.result import Plan
from whence.pretrained import open_pretrained, open_trainer, training_time
from whence.runtime.batches import check_dataset
from whence.scores.matrix import Scores
from whence.scores.request import Aggregate, Ask, Normalize, Request, checked_solver
from whence.scores.self_influence import On
from whence.tasks import Task
from whence.workbench import Size

CANDIDATES = tuple(Damping(relative=relative, scope=scope) for scope in SCOPES for relative in (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0))
"""Dampings that a calibration tries, if it is not told which."""


class Attributor(LinearBench):
    """Traces a trained model's behaviour to its training examples.

    Nothing of the model is replaced; hooks, frozen parameters and eval mode last for one call and are undone, also
    after an error. Everything is kept in `run_dir`: a call that was interrupted continues where it stopped, and a
    call that was made before with the same model, data and settings is read back.

    Args:
        model: any module; see `whence.capture.layers` for the layers that have a handler.
        task: what the model is trained on; see `whence.tasks`.
        run_dir: folder for factors and scores; None: a temporary one that goes with this object.
        layers: None (all layers with a handler that are trained, without embeddings and output heads as wide as the
            vocabulary), `"all"`, or names and shell patterns.
        fallback: also track trained parameters without a handler, at the cost of a backward pass per example.
        collate: makes a batch of a list of rows; by default torch's `default_collate`.
        device: `"auto"` (a GPU if there is one), or a torch device. The model is moved there.
        precision, compile, offload: how passes are run; see `CaptureOptions`.
        second_moments: Adam's, by parameter name (`whence.second_moments`): gradients are scaled as Adam's steps are.
        training_time: sum of the learning rates of all training steps, for `response="unrolled"`.
        seed: keys the labels drawn for the true Fisher, and the choice of `max_examples`.
        progress: show progress on standard error.

    Raises:
        LayerError: no layer can be tracked, or a name in `layers` matches none.
        ConfigError: the device does not exist, or an option cannot be used.
    """

    @classmethod
    def from_pretrained(cls, path: str | Path, *, task: Task | None = None, **options: Any) -> Self:
        """Open a Hugging Face folder or hub name; task, collate function and adapters are inferred.

        Rows are tokenised, as for the Hugging Face `Trainer`. `options` are those of the class.

        Raises:
            ConfigError: no such folder, no ready task for the architecture, or an extra that is not installed.
        """
        model, found, collate = open_pretrained(path, task=task)
        return cls(model, found, **{"collate": collate, **options})

    @classmethod
    def from_trainer(cls, trainer: Any, *, task: Task | None = None, **options: Any) -> Self:
        """Take model, task, collate function and the length of training from a Hugging Face `Trainer`.

        The length is that of gradient descent. For `response="unrolled"` of a model trained with Adam also give
        `second_moments=whence.second_moments(model, trainer.optimizer)`; momentum and weight decay are not looked at.
        `options` are those of the class.

        Raises:
            ConfigError: no Trainer, or no ready task for its model or loss.
        """
        model, found, collate = open_trainer(trainer, task=task)
        return cls(model, found, **{"collate": collate, "training_time": training_time(trainer), **options})

    def fit(
        self,
        train: Any,
        *,
        strategy: StrategyName = "ekfac",
        empirical: bool = False,
        batch_size: Size = "auto",
        max_examples: int | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Fit the curvature on training rows; `"identity"` needs no pass over them.

        Args:
            train: anything with `__len__` and `__getitem__`; None will do for `"identity"`.
            strategy: `"identity"`, `"diagonal"`, `"kfac"` or `"ekfac"`.
            empirical: use the data's labels; by default labels are drawn from the model (true Fisher).
            batch_size: rows at a time; changes no result beyond rounding. `"auto"` is halved when memory runs out.
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
        rows = self._rows(train, "training", indices, batch_size)
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
        damping: DampingLike = "auto",
        response: ResponseLike = "inverse",
        solver: SolverLike = "direct",
        query_rank: int | None = None,
        normalize: Normalize | None = None,
        per_layer: bool = False,
        per_token: bool = False,
        aggregate: Aggregate | None = None,
        query_rows: Sequence[int] | None = None,
        train_rows: Sequence[int] | None = None,
        query_batch_size: Size = "auto",
        batch_size: Size = "auto",
        name: str | None = None,
        overwrite: bool = False,
    ) -> Scores:
        """Score every training row for every query, in one pass over the training rows.

        Args:
            queries, train: rows whose measurement is to be explained, and all rows that the model was trained on.
            strategy: which fitted curvature to use; by default the one fitted last, else the only one in the run folder.
            damping: a number, `Damping`, `"calibrated"`, or `"auto"`: a tenth of each layer's mean eigenvalue, for the solvers
                30 times the model's.
            response: `"inverse"` for a converged model, `"unrolled"` or `Unrolled` for a run of finite length.
            solver: `"direct"`, `"cg"` or `"exact"`, or `ConjugateGradients` or `Exact` with settings of their own.
            query_rank, normalize, per_layer, per_token, aggregate: see `whence.scores.request.Request`.
            query_rows, train_rows: which rows to take; by default all.
            query_batch_size, batch_size: rows at a time; they change no result beyond rounding.
            name: folder of these scores in the run folder, by default the strategy's name, `"exact"` or `"ekfac-cg"`.
            overwrite: start again if the run folder holds scores of another model, other data or settings.

        Raises:
            ConfigError: options that cannot be used, or not together. NotFittedError: `fit` was not called.
            MismatchError: the run folder's content is of another model, data set or setting. DataError, NumericalError: as `fit`.
        """
        request = Request(per_layer=per_layer, per_token=per_token, aggregate=aggregate, normalize=normalize, query_rank=query_rank)
        query_set = self._rows(queries, "query", query_rows, query_batch_size, "query_batch_size")
        train_set = self._rows(train, "training", train_rows, batch_size)
        plan = checked_solver(solver, request, response)
        # An exact inverse needs no fitted curvature.
        chosen = "identity" if strategy is None and isinstance(plan, Exact) else self._chosen(strategy)
        spectrum = self._spectrum(chosen, damping, response, plan)
        subsets = {
            "query rows": None if query_rows is None else query_set.indices,
            "train rows": None if train_rows is None else train_set.indices,
        }
        asked = {
            **request.to_json(),
            **({} if plan is None else plan.to_json()),
            **{key: list(rows) for key, rows in subsets.items() if rows is not None},
            "trained rows": len(train),
        }
        ask = Ask(strategy=chosen, spectrum=spectrum, request=request, solver=plan, asked=asked, name=name, overwrite=overwrite)
        return self._score(query_set, train_set, ask)

    def self_influence(
        self,
        train: Any,
        *,
        strategy: StrategyName | None = None,
        damping: DampingLike = "auto",
        response: ResponseLike = "inverse",
        on: On = "loss",
        train_rows: Sequence[int] | None = None,
        batch_size: Size = "auto",
        name: str | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Return each row's influence on its own loss, `[train]` on the CPU; high for mislabelled and odd rows.

        Args:
            train: the rows.
            on: `"loss"`, or `"measurement"` for each row's influence on its own measurement, which may be negative.
            strategy, damping, response, train_rows, batch_size, name, overwrite: as for `scores`, and so are the errors.
        """
        rows = self._rows(train, "training", train_rows, batch_size)
        chosen = self._chosen(strategy)
        spectrum = self._spectrum(chosen, damping, response)
        asked = {} if train_rows is None else {"train rows": list(rows.indices)}
        return self._self_influence(rows, Ask(strategy=chosen, spectrum=spectrum, asked=asked, name=name, overwrite=overwrite), on)

    def index(
        self,
        train: Any,
        *,
        projection: Kind = "factors",
        keep: float = 1 / 64,
        dtype: Dtype | Literal["auto"] = "auto",
        strategy: StrategyName | None = None,
        damping: DampingLike = "auto",
        response: ResponseLike = "inverse",
        ids: Sequence[int] | None = None,
        batch_size: Size = "auto",
        name: str | None = None,
        overwrite: bool = False,
    ) -> Index:
        """Keep a small row of every training example, so that new queries need no pass over the training data.

        Args:
            train: rows that the model was trained on.
            projection, keep, dtype: what is kept of a gradient, and in how many bytes; see `whence.index.projection.RowSettings`.
            strategy, damping, response, batch_size, name, overwrite: as of `scores`, and so are the errors.
            ids: whole numbers that rows are found by; by default their places. `overwrite` also drops appended rows and deletions.
        """
        made = RowSettings(projection=projection, keep=keep, dtype=dtype, seed=self.seed)
        rows = self._rows(train, "training", None, batch_size)
        chosen = self._chosen(strategy)
        ask = Ask(strategy=chosen, spectrum=self._spectrum(chosen, damping, response), name=name, overwrite=overwrite)
        folder = self.write_index(rows, checked_ids(ids, len(rows)), ask, made)
        return Index(self, folder, train=train)

    def plan(self, train: Any, queries: Any = None, **options: Any) -> Plan:
        """Predict what `fit`, `scores` and `self_influence` will cost; options and errors are those of `whence.plan.predict.make_plan`."""
        return make_plan(self, train, queries, **options)

    def calibrate(
        self,
        queries: Any,
        train: Any,
        bank: RetrainBank,
        *,
        strategy: StrategyName | None = None,
        solver: SolverLike = "direct",
        candidates: Sequence[float | Damping | Unrolled] = CANDIDATES,
        **options: Any,
    ) -> Calibration[Spectrum]:
        """Choose damping or response, and the scale of removal effects, on retrained subsets; `damping="calibrated"` uses them.

        Args:
            queries, train: the rows that the bank's columns and masks stand for.
            bank: real retrains that are not reported: `RetrainBank.split(...)`'s calibration side.
            strategy, solver: which curvature to calibrate for, as of `scores`.
            candidates: dampings (with the inverse) and finite runs (without damping) to choose from.
            options: `query_rows`, `train_rows`, `query_batch_size`, `batch_size` as of `scores`.
        """
        spectra = [
            Spectrum(damping=0.0, response=c) if isinstance(c, Unrolled) else Spectrum(damping=resolve_damping(c)) for c in candidates
        ]

        def values(spectrum: Spectrum) -> Tensor:
            named: dict[str, Any] = {"damping": spectrum.damping, "response": spectrum.response, "name": "calibration"}
            return self.scores(queries, train, strategy=strategy, solver=solver, **named, **options, overwrite=True).values

        found = calibrate(values, spectra, bank)
        plan = named_solver(solver)
        key = self._chosen(strategy) if plan is None else plan.name
        self._keep_calibration(key, replace(found.damping, scale=found.scale))
        return found
