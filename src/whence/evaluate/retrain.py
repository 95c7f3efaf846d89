"""Banks of real retrains: train again on subsets of the rows, measure the queries, and keep every number.

A retrain is a pure job: `RetrainSpec` in, measurements `[query]` out. A bank is `subsets x repeats` of them, run through
joblib, each on one thread. Finished jobs are kept on disk under a hash of what they are made of, so that an interrupted
bank continues, and a larger one (more subsets, more repeats) only runs what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from whence.errors import ConfigError, DataError, NumericalError, StorageError
from whence.runtime.device import one_thread
from whence.runtime.progress import Stages
from whence.storage.shards import ShardStore

_KIND = "retrain_bank"


class Procedure(Protocol):
    """A training procedure that can be sent to another process, such as `whence.recipes.digits.DigitsRetraining`.

    It must depend on its arguments alone. It is sent with every job: load large data inside of it rather than holding it.
    """

    @property
    def key(self) -> str:
        """Text that changes whenever the results could: data, model, hyper-parameters, measurement."""
        ...

    def __call__(self, rows: Sequence[int], seed: int) -> Tensor:
        """Train on these rows of the training data, everything random keyed by `seed`; return measurements `[query]`."""
        ...


class Running(TypedDict, total=False):
    """How trainings are run; all of it may be left out.

    `folder` keeps finished jobs, to be found by their content; None: nowhere. `n_jobs` run at a time, as for joblib: -1 uses
    every core. `backend` is joblib's for more than one at a time. `stages` gets the time and shows progress.
    """

    folder: str | Path | None
    n_jobs: int
    backend: str
    stages: Stages | None


@dataclass(frozen=True, kw_only=True)
class RetrainSpec:
    """One job: which procedure, on which rows, with which seed.

    Attributes:
        key: the procedure's key.
        rows: indices of the training rows, rising.
        seed: of first weights, order, dropout and whatever else is random.

    Raises:
        ConfigError: the rows do not rise, are none, or are negative.
    """

    key: str
    rows: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if not self.rows or self.rows[0] < 0 or not rising:
            raise ConfigError(f"RetrainSpec: rows={self.rows[:5]}... cannot be used; give the indices of one row or more, from 0, rising.")

    @classmethod
    def from_mask(cls, mask: Tensor, *, key: str, seed: int) -> Self:
        """Return the job of a mask, bool `[train]`."""
        return cls(key=key, rows=tuple(torch.nonzero(mask).flatten().tolist()), seed=seed)

    @cached_property
    def digest(self) -> str:
        """64 hex digits over all fields."""
        return hashlib.sha256(json.dumps([self.key, self.rows, self.seed]).encode()).hexdigest()


def retrain(procedure: Procedure, spec: RetrainSpec) -> Tensor:
    """Run one job on one thread and return its measurements `[query]`, float64 on the CPU.

    Raises:
        ConfigError: the specification is of another procedure.
        DataError: the procedure does not return `[query]`. NumericalError: it returns NaN or infinity.
    """
    if procedure.key != spec.key:
        raise ConfigError(f"the job is of procedure {spec.key!r}, but {procedure.key!r} was given. Use the procedure it was made for.")
    with one_thread():
        measured = procedure(list(spec.rows), spec.seed)
    if measured.dim() != 1:
        raise DataError(f"a procedure must return one number per query, `[query]`; this one returned shape {tuple(measured.shape)}.")
    measured = measured.detach().double().cpu()
    if not torch.isfinite(measured).all():
        first = int((~torch.isfinite(measured)).nonzero()[0])
        raise NumericalError(
            f"retraining on {len(spec.rows)} rows with seed {spec.seed}: the measurement of query {first} is {measured[first].item()}. "
            "Lower the learning rate, or choose a measurement that stays finite."
        )
    return measured


@dataclass(frozen=True, kw_only=True)
class RetrainBank:
    """Measurements of models trained on subsets.

    Attributes:
        masks: which rows each subset has, bool `[subset, train]`.
        measurements: float64 `[subset, repeat, query]`; repeats differ in their seed only.
        settings: what it was made with, JSON.

    Raises:
        DataError: the shapes do not belong together.
    """

    masks: Tensor
    measurements: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = self.masks.dim() == 2 and self.measurements.dim() == 3 and len(self.masks) == len(self.measurements)
        if not fits or self.masks.dtype != torch.bool:
            raise DataError(
                f"a bank holds masks, bool [subset, train], and measurements [subset, repeat, query]; "
                f"these are {self.masks.dtype} {tuple(self.masks.shape)} and {tuple(self.measurements.shape)}."
            )

    @property
    def mean(self) -> Tensor:
        """Mean over repeats, `[subset, query]`."""
        return self.measurements.mean(1)

    def split(self, *, calibration: int) -> tuple[Self, Self]:
        """Set the first `calibration` subsets aside: return (calibration, reported), which share no subset.

        Raises:
            ConfigError: one side would be empty. DataError: a subset occurs on both sides.
        """
        if not 0 < calibration < len(self.masks):
            raise ConfigError(f"calibration={calibration!r}: of {len(self.masks)} subsets, 1 to {len(self.masks) - 1} can be set aside.")
        sides = {"calibration": slice(None, calibration), "reported": slice(calibration, None)}
        parts = [
            replace(self, masks=self.masks[cut], measurements=self.measurements[cut], settings={**self.settings, "part": part})
            for part, cut in sides.items()
        ]
        both = {tuple(row) for row in parts[0].masks.tolist()} & {tuple(row) for row in parts[1].masks.tolist()}
        if both:
            raise DataError(
                f"{len(both)} subsets would be used to calibrate and to report. Draw the masks anew, with another seed or larger subsets."
            )
        return parts[0], parts[1]

    def save(self, folder: str | Path) -> None:
        """Write the bank into a folder of its own, replacing a bank that is there."""
        with ShardStore(folder, kind=_KIND, settings=self.settings, overwrite=True) as store:
            store.write("bank", {"masks": self.masks, "measurements": self.measurements})
            store.finish()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a bank that `save` wrote.

        Raises:
            StorageError: the folder holds no bank, or it is unfinished or damaged.
        """
        store = ShardStore.open(folder, kind=_KIND)
        if not store.complete:
            raise StorageError(f"{folder}: this bank is unfinished. Save it again.")
        return cls(**store.read("bank"), settings=store.settings)


def draw_masks(rows: int, count: int, *, share: float = 0.5, seed: int = 0) -> Tensor:
    """Draw `count` subsets of exactly `round(share * rows)` rows each, bool `[count, rows]`.

    A larger count only adds subsets: the first ones stay as they are.

    Raises:
        ConfigError: a subset would hold no row or all of them, or the count is less than one.
    """
    size = round(share * rows)
    if not 0 < size < rows or count < 1:
        raise ConfigError(
            f"draw_masks({rows}, {count}, share={share}): {count} subsets of {size} rows. Ask for one or more, of some rows but not all."
        )
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, rows, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(rows, generator=generator)[:size]] = True
    return masks


def repeat_seed(seed: int, subset: int, repeat: int) -> int:
    """Return the seed of one job: every repeat of every subset has its own, whatever the size of the bank."""
    return int(np.random.SeedSequence([seed, subset, repeat]).generate_state(1)[0])


def retrain_bank(
    procedure: Procedure, masks: Tensor, *, repeats: int = 5, seed: int = 0, common_seeds: bool = False, **running: Unpack[Running]
) -> RetrainBank:
    """Train on every subset `repeats` times and measure the queries.

    Args:
        procedure: trains and measures; see `Procedure`.
        masks: the subsets, bool `[subset, train]`; see `draw_masks`.
        repeats: trainings per subset, with different seeds.
        seed: keys the seeds of all trainings.
        common_seeds: repeat r of every subset has the same seed, so that what the seed alone does (first weights, say) is
            the same for all subsets and drops out of their ranking. By default every training has a seed of its own.
        running: see `Running`.

    Raises:
        ConfigError: fewer than one repeat, or no job at a time. StorageError: another process is using the folder, or it cannot be written.
    """
    if masks.dim() != 2 or masks.dtype != torch.bool or not len(masks) or repeats < 1:
        raise ConfigError(f"masks are {masks.dtype} {tuple(masks.shape)}, repeats={repeats}; give bool [subset, train] and 1 or more.")
    key = procedure.key
    specs = [
        RetrainSpec.from_mask(mask, key=key, seed=repeat_seed(seed, 0 if common_seeds else subset, repeat))
        for subset, mask in enumerate(masks)
        for repeat in range(repeats)
    ]
    measured = retrain_all(procedure, specs, **running)
    measurements = torch.stack(measured).unflatten(0, (len(masks), repeats))
    settings = {"key": key, "repeats": repeats, "seed": seed, "common_seeds": common_seeds}
    return RetrainBank(masks=masks, measurements=measurements, settings=settings)


def retrain_all(
    procedure: Procedure,
    specs: Sequence[RetrainSpec],
    *,
    folder: str | Path | None = None,
    n_jobs: int = 1,
    backend: str = "loky",
    stages: Stages | None = None,
) -> list[Tensor]:
    """Run jobs and return the measurements `[query]` of each, float64, in the order of the jobs.

    Equal jobs run once. Arguments as of `Running`, errors as of `retrain_bank`.
    """
    check_jobs(n_jobs)
    stages = Stages(enabled=False) if stages is None else stages
    jobs = {spec.digest: spec for spec in specs}
    with ExitStack() as stack:
        store = None if folder is None else stack.enter_context(_jobs(Path(folder), procedure.key))
        done = {} if store is None else {name: store.read(name)["measurements"] for name in store.names if name in jobs}
        missing = [spec for digest, spec in jobs.items() if digest not in done]
        stack.enter_context(stages.stage("Retrain"))
        advance = stack.enter_context(stages.track(len(missing), "Retraining"))
        for digest, measured in _run(procedure, missing, n_jobs, backend):
            if store is not None:
                store.write(digest, {"measurements": measured})
            done[digest] = measured
            advance(1)
    return [done[spec.digest] for spec in specs]


def check_jobs(n_jobs: int) -> None:
    """Check a number of jobs at a time before long work starts.

    Raises:
        ConfigError: it is 0.
    """
    if n_jobs == 0:
        raise ConfigError("n_jobs=0 trains nothing; give how many trainings run at a time, or -1 for one per core.")


def _jobs(folder: Path, key: str) -> ShardStore:
    """Open the finished jobs of a procedure; each procedure has a folder of its own."""
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return ShardStore(folder / name, kind="retrains", settings={"key": key})


def _run(procedure: Procedure, specs: Iterable[RetrainSpec], n_jobs: int, backend: str) -> Iterator[tuple[str, Tensor]]:
    """Yield `(digest, measurements)` in the order in which jobs end; closing it sends no more."""
    from joblib import Parallel, delayed

    # One job per message, and each result as soon as it is there: what has ended is never lost.
    parallel = Parallel(n_jobs=n_jobs, backend=backend, batch_size=1, return_as="generator_unordered")
    yield from parallel(delayed(_job)(procedure, spec) for spec in specs)


def _job(procedure: Procedure, spec: RetrainSpec) -> tuple[str, Tensor]:
    return spec.digest, retrain(procedure, spec)
