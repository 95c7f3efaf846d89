"""What the methods of `finetune_lds.py` work on: a fine-tuned model, its rows, other models of its kind, scores kept on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
from whence.recipes.base import Recipe
from whence.recipes.retraining import START, Retraining
from whence.recipes.start import load_start
from whence.recipes.training import train_model


@dataclass(kw_only=True)
class Setting:
    """A recipe of a trained model, and a folder for what is worth keeping."""

    recipe: Recipe
    work: Path
    checkpoint: Path
    models: int = 3
    kept: dict[str, Tensor] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """Return where a method's scores are kept: a work folder is of one trained model."""
        return self.work / "scores" / f"{name.replace(' ', '_')}.safetensors"

    def scores(self, name: str, make: Callable[[Setting], Tensor]) -> Tensor:
        """Return a method's scores, from disk if they were made before."""
        file = self.file(name)
        if not file.is_file():
            start = time.perf_counter()
            values = make(self).float().contiguous()
            file.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file({"values": values}, file)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return safetensors.torch.load_file(file)["values"]

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Adam's second moments at the end of training."""
        assert self.recipe.second_moments is not None
        return safetensors.torch.load_file(self.recipe.second_moments)

    def options(self, *, adam: bool = False, **more: Any) -> dict[str, Any]:
        """Return an attributor's options."""
        moments = self.moments if adam else None
        return {
            "collate": self.recipe.collate,
            "second_moments": moments,
            "training_time": self.recipe.training_time,
            "progress": False,
            **more,
        }

    def attributor(self, name: str, **options: Any) -> Attributor:
        """Return an attributor with a run folder of its own."""
        return Attributor(self.recipe.model, self.recipe.task, run_dir=self.work / "runs" / name, **self.options(**options))

    def over_run(self, name: str, *, first: int | None = None, **options: Any) -> Checkpoints:
        """Return the (`first`) checkpoints of the run itself, each the middle of a segment."""
        files = [file for file, _ in self.recipe.snapshots[:first]]
        return Checkpoints(self.recipe.model, self.recipe.task, files, run_dir=self.work / "runs" / name, **self.options(**options))

    def over_models(self, name: str, **options: Any) -> Checkpoints:
        """Return models trained on all rows with other seeds."""
        return Checkpoints(
            self.recipe.model, self.recipe.task, self.trained(), run_dir=self.work / "runs" / name, **self.options(**options)
        )

    def trained(self) -> list[Path]:
        procedure = self.recipe.retraining
        assert isinstance(procedure, Retraining)
        files = [self.work / "models" / f"seed-{seed}.safetensors" for seed in range(1, self.models + 1)]
        for seed, file in enumerate(files, start=1):
            if not file.is_file():
                model = load_start(procedure.family, self.checkpoint / START, procedure.training)
                train_model(model, self.recipe.train, self.recipe.collate, procedure.training, seed=seed)
                file.parent.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, file)
        return files
