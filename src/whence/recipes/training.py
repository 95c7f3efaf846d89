"""Training by the Hugging Face Trainer, and what a score later needs to know of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from whence.curvature.moments import second_moments
from whence.errors import ConfigError
from whence.pretrained.kinds import need, quiet
from whence.pretrained.trainer import training_time
from whence.recipes.rows import Row
from whence.recipes.settings import TrainingSettings
from whence.recipes.unfinished import KEPT, keep_only, last_checkpoint
from whence.runtime.batches import iterate_batches
from whence.runtime.progress import Stages
from whence.storage.run import read_json, write_bytes_atomic, write_json_atomic
from whence.tasks import Task

KEEP_EVERY_S = 300.0
"""Seconds between two checkpoints of an unfinished training."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The model in the midst of its training.

    Attributes:
        step: optimizer steps taken.
        time: sum of the learning rates over the segment of the run that it stands for.
        state: trained parameters and buffers, on the CPU.
    """

    step: int
    time: float
    state: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training leaves besides the model.

    Attributes:
        time: sum of the learning rates over all steps.
        moments: Adam's second moments at the end, by parameter name.
        snapshots: the model at equal distances of the run, each in the middle of its segment.
    """

    time: float
    moments: dict[str, Tensor]
    snapshots: list[Snapshot]


def train_model(
    model: nn.Module,
    rows: Sequence[Row],
    collate: Callable[[list[Any]], Any],
    settings: TrainingSettings,
    *,
    seed: int,
    snapshots: int = 0,
    stages: Stages | None = None,
    unfinished: Path | None = None,
    keep_every: float | None = None,
) -> Trained:
    """Train in place with the Trainer; the model is left on its device, in eval mode.

    The same seed gives the same weights on the same machine, also when the training was interrupted and went on; random
    states of Python, numpy and torch are as before.

    Args:
        model: from where to start.
        rows: training rows, encoded.
        collate: makes a batch of a list of rows.
        settings: all of them filled in.
        seed: of the order of rows and of dropout.
        snapshots: how many states of the run to keep.
        stages: gets the time and shows progress.
        unfinished: folder to leave checkpoints in, and to go on from the one that is there.
        keep_every: seconds between two of them; None: `KEEP_EVERY_S`.
    """
    transformers = need("transformers")
    need("accelerate")
    freeze(model, settings.freeze)
    stages = Stages(enabled=False) if stages is None else stages
    last = None if unfinished is None else last_checkpoint(unfinished)
    with TemporaryDirectory() if unfinished is None else nullcontext(str(unfinished)) as folder, _random_states():
        trainer = transformers.Trainer(
            model=model,
            args=_arguments(transformers, settings, len(rows), seed, folder),
            train_dataset=rows,
            data_collator=collate,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        steps = _steps(settings, len(rows))
        every = KEEP_EVERY_S if keep_every is None else keep_every
        make_keeper = _keeper(transformers, model, trainer, segments(steps, snapshots), unfinished, every)
        with stages.stage("Train"), stages.track(steps, "Training" if last is None else "Training, continued") as advance:
            keeper = make_keeper(advance)
            if last is not None:
                keeper.restore(last)
            trainer.add_callback(keeper)
            with quiet(transformers):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        total = training_time(trainer)
        assert total is not None
        moments = second_moments(model, _optimizer(trainer))
    model.eval()
    model.zero_grad()
    return Trained(time=total, moments={name: moment.detach().cpu() for name, moment in moments.items()}, snapshots=keeper.kept)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make the parameters of these names or patterns ones that are not trained.

    Raises:
        ConfigError: a pattern matches none, or none is left to be trained.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"freeze={pattern!r} matches no parameter; they are named like {', '.join(names[:3])}.")
    for name, parameter in model.named_parameters():
        # What was not trained before, such as the model under adapters, is not trained now.
        parameter.requires_grad_(parameter.requires_grad and not any(fnmatchcase(name, pattern) for pattern in patterns))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze={', '.join(patterns)} leaves nothing to be trained. Freeze fewer parameters.")


@torch.no_grad()
def measure(model: nn.Module, task: Task, rows: Sequence[Row], collate: Callable[[list[Any]], Any], batch_size: int) -> Tensor:
    """Return the task's measurement of every row, float64 `[row]` on the CPU."""
    batches = partial(iterate_batches, rows, collate=collate, device=next(model.parameters()).device)
    task.prepare(model, next(batches([0], batch_size=1)).data)
    parts = [task.measurement(model, batch.data) for batch in batches(range(len(rows)), batch_size=batch_size)]
    return torch.cat(parts).double().cpu()


def _steps(settings: TrainingSettings, rows: int) -> int:
    per_epoch = -(-rows // int(settings.train_batch_size or 1))
    return max(1, int(np.ceil(float(settings.num_train_epochs or 1) * per_epoch)))


def segments(steps: int, count: int) -> list[tuple[int, int]]:
    """Cut a run into `count` equal segments; return the middle and the last step of each."""
    count = min(count, steps)
    ends = [(number + 1) * steps // count for number in range(count)]
    return [((first + last + 2) // 2, last) for first, last in pairwise([0, *ends])]


def _arguments(transformers: Any, settings: TrainingSettings, rows: int, seed: int, folder: str) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.train_batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.num_train_epochs,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=round(settings.warmup_ratio * _steps(settings, rows)),
        seed=seed,
        data_seed=seed,
        optim="adamw_torch",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # Of several GPUs the Trainer would give each a batch of the named size: fewer steps, another training.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _optimizer(trainer: Any) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # as accelerate wraps it


def snapshot_file(step: int) -> str:
    """Return the name of a snapshot's file."""
    return f"step-{step:06d}.safetensors"


def _keeper(transformers: Any, model: nn.Module, trainer: Any, parts: list[tuple[int, int]], unfinished: Path | None, every: float) -> Any:
    """Return a callback that counts steps and keeps the model's state in the middle of each part of the run.

    With a folder, it has the Trainer leave a checkpoint there now and then, and adds to it what it holds itself.
    """

    class Keeper(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self, advance: Callable[[int], None]) -> None:
            self.advance = advance
            self.kept: list[Snapshot] = []
            self.before = 0.0
            self.since = time.monotonic()

        def restore(self, checkpoint: Path) -> None:
            found = read_json(checkpoint / KEPT)
            self.advance(found["step"])
            self.before = found["before"]
            for entry in found["snapshots"]:
                state = safetensors.torch.load_file(checkpoint.parent / snapshot_file(entry["step"]))
                self.kept.append(Snapshot(step=entry["step"], time=entry["time"], state=state))

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            assert unfinished is not None
            checkpoint = unfinished / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle, and not read
            for snapshot in self.kept:
                if not (file := unfinished / snapshot_file(snapshot.step)).is_file():
                    write_bytes_atomic(file, safetensors.torch.save(snapshot.state))
            entries = [{"step": snapshot.step, "time": snapshot.time} for snapshot in self.kept]
            write_json_atomic(checkpoint / KEPT, {"step": state.global_step, "before": self.before, "snapshots": entries})
            keep_only(unfinished, checkpoint)
            self.since = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.advance(1)
            for middle, last in parts:
                if state.global_step == middle:
                    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _changing(model)}
                    self.kept.append(Snapshot(step=middle, time=0.0, state=tensors))
                if state.global_step == last:
                    until = training_time(trainer) or 0.0
                    self.kept[-1] = replace(self.kept[-1], time=until - self.before)
                    self.before = until
            # Not after the last step: the model is saved then, and one that goes on is called at least once, as others are.
            if unfinished is not None and state.global_step < state.max_steps and time.monotonic() - self.since >= every:
                control.should_save = True

    return Keeper


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give buffers, and the parameters that are trained."""
    held = model.state_dict(keep_vars=True).items()
    return ((name, tensor) for name, tensor in held if tensor.requires_grad or not isinstance(tensor, nn.Parameter))


@contextmanager
def _random_states() -> Iterator[None]:
    """Give Python, numpy and torch their random states back, which the Trainer sets."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
