"""The digits with a bank of real retrains: what every method of `digits_lds.py` gets."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import whence
from whence.evaluate.retrain import RetrainBank, draw_masks, retrain_bank
from whence.recipes.digits import Digit, DigitsRetraining, DigitsSettings, build_network, load_data, train_network
from whence.runtime.progress import Stages
from whence.tasks import Classification

Measurement = Literal["loss", "margin"]
DIGITS = DigitsSettings()
QUERIES = 200


@lru_cache(maxsize=8)
def base_network(seed: int) -> nn.Sequential:
    """Return a network trained on all rows; its seed is that of weights and order, the data stay those of seed 0."""
    network = build_network(seed)
    train_network(network, load_data(DIGITS).train, replace(DIGITS, seed=seed))
    return network


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a base network came about: its state in the middle of each segment, the learning rates' sums, and Adam's second moments."""

    states: list[dict[str, Tensor]]
    times: list[float]
    moments: dict[str, Tensor]


@lru_cache(maxsize=2)
def watched_run(seed: int, segments: int) -> Run:
    """Train the base network once more and watch its optimizer."""
    network, states, rates, moments = build_network(seed), [], [], {}

    def watch(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        states.append({name: tensor.detach().clone() for name, tensor in network.state_dict().items()})
        moments.update(whence.second_moments(network, optimizer))

    hook = register_optimizer_step_post_hook(watch)
    try:
        train_network(network, load_data(DIGITS).train, replace(DIGITS, seed=seed))
    finally:
        hook.remove()
    bounds = [len(rates) * part // segments for part in range(segments + 1)]
    parts = list(itertools.pairwise(bounds))
    middles = [states[(start + end) // 2] for start, end in parts]
    return Run(states=middles, times=[sum(rates[start:end]) for start, end in parts], moments=moments)


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """One measurement of one base model, with subsets to calibrate on and others to report. Files go to `work`."""

    work: Path
    measurement: Measurement
    calibration: RetrainBank
    reported: RetrainBank
    seed: int = 0

    @cached_property
    def train(self) -> list[Digit]:
        """All training rows, a tenth of them with a wrong label."""
        return load_data(DIGITS).train

    @cached_property
    def queries(self) -> list[Digit]:
        """The test rows that were measured."""
        return load_data(DIGITS).test[:QUERIES]

    @property
    def network(self) -> nn.Sequential:
        """The base model."""
        return base_network(self.seed)

    @cached_property
    def attributor(self) -> whence.Attributor:
        """The engine on the base model; factors are kept in the work folder."""
        task = Classification(measurement=self.measurement)
        folder = self.work / "runs" / f"{self.measurement}-{self.seed}"
        return whence.Attributor(self.network, task, run_dir=folder, device="cpu", progress=False)

    def scores(self, *, strategy: str, **options: Any) -> Tensor:
        """Return `[query, train]` of the engine; options as for `Attributor.scores`."""
        self.attributor.fit(self.train, strategy=strategy, overwrite=True)
        return self.attributor.scores(self.queries, self.train, strategy=strategy, overwrite=True, **options).values

    def unrolled(self, *, adam: bool, segments: int = 4) -> Tensor:
        """Return `[query, train]` of the run's response, segment by segment."""
        run = watched_run(self.seed, segments)
        options: dict[str, Any] = {"second_moments": run.moments} if adam else {}
        task = Classification(measurement=self.measurement)
        checkpoints = whence.Checkpoints(self.network, task, run.states, device="cpu", progress=False, **options)
        checkpoints.fit(self.train, strategy="ekfac")
        return checkpoints.unrolled_scores(self.queries, self.train, run.times, strategy="ekfac").values


def make_bank(work: Path, *, subsets: int, repeats: int, jobs: int) -> RetrainBank:
    """Retrain on halves of the rows, or read what was retrained before; measurements are margins."""
    procedure = DigitsRetraining(settings=DIGITS, queries=QUERIES, measurement="margin")
    masks = draw_masks(len(load_data(DIGITS).train), subsets)
    stages = Stages(enabled=sys.stderr.isatty() or jobs > 0)
    return retrain_bank(procedure, masks, repeats=repeats, folder=work / "retrains", n_jobs=jobs, stages=stages)


def as_losses(margins: RetrainBank) -> RetrainBank:
    """Return the bank of cross-entropies: with minus the log-odds x of the label, the loss is log(1 + exp(x))."""
    return replace(margins, measurements=F.softplus(margins.measurements))


def random_scores(setting: Setting) -> Tensor:
    """Return scores that know nothing."""
    return torch.randn(len(setting.queries), len(setting.train), generator=torch.Generator().manual_seed(setting.seed))
