"""The part of an attributor that measures outputs and their projected gradients, for refitting to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whence.capture.passes import Rows
from whence.errors import MismatchError
from whence.indexing import IndexBench
from whence.refit.measure import Measure
from whence.refit.projection import Kind, ProjectionOptions, projector
from whence.refit.stored import KIND, StoredLinearised
from whence.storage.run import fingerprint_tensors
from whence.storage.settings import differences, plain_json
from whence.workbench import Size

_DATA = ("data", "rows", "per token", "basis")
"""Settings in which another measurement in the same coordinates may differ."""


class LinearBench(IndexBench):
    """What measures a model's outputs to first order."""

    def linearise(
        self,
        dataset: Any,
        *,
        dimension: int = 400,
        projection: Kind = "random",
        per_token: bool = True,
        seed: int = 0,
        like: StoredLinearised | str | Path | None = None,
        name: str | None = None,
        rows: Sequence[int] | None = None,
        batch_size: Size = "auto",
        overwrite: bool = False,
    ) -> StoredLinearised:
        """Measure the log-odds of trained labels and their gradients in k dimensions, for estimates of fine-tuning.

        The gradient is that of the tracked parameters, for instance of a LoRA adapter. Where these are to be all that is trained,
        as in fine-tuning, `outputs + gradients @ w` is the model to first order (see `whence.refit.linear.Linearised`).

        Args:
            dataset: rows with labels, of a task that defines `log_odds`: those of language models and classifiers do.
            dimension, projection, seed: see `whence.refit.projection.ProjectionOptions`. `"pca"` takes the directions from these
                rows, no more of them than there are rows.
            per_token: a row for each trained label; else one for each example, of the mean over its labels.
            like: an earlier measurement, or its name or folder: these rows get its coordinates, and `dimension`, `projection` and
                `seed` are taken from it. Validation rows need those of the training rows.
            name: folder in the run folder's `linearised`; by default `"train"`, or `"validation"` with `like`.
            rows: which rows to take; by default all.
            batch_size: rows at a time; changes no result beyond rounding.
            overwrite: start again if the folder holds another measurement.

        Raises:
            ConfigError: options that cannot be used, or a task without log-odds. MismatchError: the folder, or `like`, is of
                another model, data set or setting. DataError: a row without trained labels. NumericalError: NaN or infinity.
        """
        options = ProjectionOptions(projection=projection, dimension=dimension, seed=seed)
        base = None if like is None else self._base(like)
        if base is not None:
            options = ProjectionOptions(**base.settings["projection"])
        taken = self._rows(dataset, "linearised", rows, batch_size)
        settings = {"projection": options.to_json(), "per token": per_token, "rows": None if rows is None else list(taken.indices)}
        folder = name or ("train" if base is None else "validation")
        return StoredLinearised.open(self._linearised(taken, options, base, settings, folder, overwrite))

    def _linearised(
        self,
        rows: Rows,
        options: ProjectionOptions,
        base: StoredLinearised | None,
        settings: dict[str, Any],
        name: str,
        overwrite: bool,
    ) -> Path:
        """Measure what is not there yet; return the folder."""
        basis = None if base is None else base.basis
        with self._session(rows, data=rows.dataset) as (recorder, seen):
            shapes = {layer.name: layer.shape for layer in recorder.taken}
            made = projector(options, shapes, self.device)
            settings = {**seen.identity, **seen.data, "dtype": "float32", "projected": list(shapes), **settings}
            if base is not None:
                _refuse_other_coordinates(base.settings, settings)
            if basis is not None:
                settings["basis"] = fingerprint_tensors({"basis": basis})
            with self._store(KIND, name, settings, overwrite) as store:
                if not store.complete:
                    Measure(
                        recorder=recorder,
                        store=store,
                        stages=self.stages,
                        projector=made,
                        per_token=settings["per token"],
                        basis=basis,
                        principal=options.dimension if options.projection == "pca" and basis is None else 0,
                    ).write(rows)
                self._leave_out_unreached(store)
        self._record("linearise", settings)
        return store.folder

    def _base(self, like: StoredLinearised | str | Path) -> StoredLinearised:
        if isinstance(like, StoredLinearised):
            return like
        named = self.run.sub(KIND, str(like))
        return StoredLinearised.open(named if isinstance(like, str) and named.exists() else like)


def _refuse_other_coordinates(stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a measurement of another model, task, projection or other layers."""
    old, new = ({key: value for key, value in plain_json(s, "settings").items() if key not in _DATA} for s in (stored, present))
    found = list(differences(old, new))
    if found:
        shown = "; ".join(f"{field}: of like={one}, present {other}" for field, one, other in found[:3])
        raise MismatchError(f"{shown}. Gradients in other coordinates cannot be compared; measure both with one model and task.")
