"""What a Hugging Face Trainer was trained with: model, task and collate function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from whence.errors import ConfigError
from whence.pretrained.kinds import kind_of, no_kind
from whence.tasks import Task
from whence.tasks.hugging_face import bare, forward_parameters


@dataclass(frozen=True, kw_only=True)
class TrainerCollator:
    """The Trainer's collate function, given only the columns that the Trainer would give it.

    Attributes:
        collate: the Trainer's `data_collator`.
        columns: what is passed on.
    """

    collate: Callable[[list[Any]], Any]
    columns: frozenset[str]

    def __call__(self, rows: list[Any]) -> Any:
        """Return the batch."""
        kept = [{key: value for key, value in row.items() if key in self.columns} if isinstance(row, Mapping) else row for row in rows]
        return self.collate(kept)


def open_trainer(trainer: Any, *, task: Task | None = None) -> tuple[nn.Module, Task, Callable[[list[Any]], Any]]:
    """Return the model, task and collate function of a `transformers.Trainer`.

    The model is the Trainer's own, without parallel or compiled wrappers and with its adapters; it is not copied. Rows
    are what the Trainer was given as `train_dataset`.

    Args:
        trainer: a `transformers.Trainer`, before or after training.
        task: instead of the task that the model's class stands for.

    Raises:
        ConfigError: no Trainer, a model without a ready task, or a loss that is not the task's.
    """
    missing = [name for name in ("model", "data_collator", "accelerator", "args") if not hasattr(trainer, name)]
    if missing:
        raise ConfigError(
            f"open_trainer takes a transformers.Trainer, not a {type(trainer).__name__}: it has no {' and no '.join(missing)}."
        )
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    labels = _label_name(trainer)
    if task is None:
        kind = kind_of(type(bare(model)).__name__)
        if kind is None:
            raise no_kind("the Trainer's model", type(bare(model)).__name__)
        _check_loss(trainer, kind.task.__name__)
        task = kind.task(labels=labels)
    collate = trainer.data_collator
    if trainer.args.remove_unused_columns:
        columns = frozenset({*forward_parameters(model), *trainer.label_names, "label", "label_ids"})
        collate = TrainerCollator(collate=collate, columns=columns)
    return model, task, collate


def _label_name(trainer: Any) -> str:
    names = list(getattr(trainer, "label_names", None) or ["labels"])
    if len(names) == 1 or "labels" in names:
        return "labels" if "labels" in names else str(names[0])
    raise ConfigError(
        f"the Trainer's model has several kinds of labels ({', '.join(names)}), for which whence has no ready task. "
        "Give task=..., a task of your own (whence.tasks.Task)."
    )


def _check_loss(trainer: Any, name: str) -> None:
    smoothing, own = getattr(trainer.args, "label_smoothing_factor", 0), getattr(trainer, "compute_loss_func", None)
    if smoothing or own is not None:
        what = "a loss function of its own (compute_loss_func)" if own is not None else f"label_smoothing_factor={smoothing}"
        raise ConfigError(
            f"the Trainer was given {what}, but {name} explains the plain loss. Give task=whence.tasks.{name}() to explain that "
            "all the same, or a task of your own with the loss that was trained."
        )


def training_time(trainer: Any) -> float | None:
    """Return the sum of the learning rates over the steps that a Trainer has taken.

    It is read off the Trainer's schedule, else off its log where every step was logged. None before training, and where
    neither tells.
    """
    from torch.optim.lr_scheduler import LambdaLR

    steps = int(trainer.state.global_step)
    if steps == 0:
        return None
    schedule = getattr(trainer, "lr_scheduler", None)
    schedule = getattr(schedule, "scheduler", schedule)  # as accelerate wraps it
    if type(schedule) is LambdaLR:  # the schedules of transformers, each a function of the step
        return float(sum(schedule.base_lrs[0] * schedule.lr_lambdas[0](step) for step in range(steps)))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return float(sum(rates)) if len(rates) == steps else None
