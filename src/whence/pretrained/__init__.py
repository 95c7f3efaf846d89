"""Hugging Face checkpoints and Trainers: model, task and collate function, inferred from what was saved or trained."""

from __future__ import annotations

from whence.pretrained.loading import open_pretrained
from whence.pretrained.trainer import open_trainer, training_time

__all__ = ["open_pretrained", "open_trainer", "training_time"]
