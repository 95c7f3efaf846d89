"""The demo of the standard library: train a language model on its functions, let it talk, and show what it learned that from.

Everything is real and made on this machine; nothing is downloaded. It takes minutes.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.attributor import Attributor
from whence.curvature.strategies import StrategyName
from whence.demo.claim import claim, tell
from whence.demo.talk import Reply, answers, learned
from whence.evaluate.baselines import bm25_scores, random_scores
from whence.evaluate.duplicates import DuplicateRanks, duplicate_ranks, sample_rows
from whence.evaluate.tail_patch import TailPatch, tail_patch
from whence.index.index import Index
from whence.pretrained.kinds import need
from whence.recipes.base import Recipe
from whence.recipes.families import FAMILIES
from whence.recipes.finetune import open_finetuned, train_recipe
from whence.recipes.functions import PROMPTS
from whence.recipes.record import RECORD
from whence.recipes.settings import DataSettings, PresetName, TrainingSettings
from whence.report.page import require_extra
from whence.report.run import run_report
from whence.report.run_evidence import FOLDER
from whence.runtime.progress import Stages
from whence.storage.run import write_json_atomic

SHOWN, PATCHED = 5, 10
STRATEGY: StrategyName = "ekfac"
_KEEP_EVERY_S = 20.0
_RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class StdlibSettings:
    """What makes the demo what it is; the defaults are the demo."""

    seed: int = 0
    """Of the model's start, the order of training, and which functions are checked."""

    preset: PresetName = "mini"
    """Size of the model."""

    epochs: float | None = None
    """Passes over the functions; None: as many as the recipe takes."""

    functions: int | None = None
    """Train on the first functions alone; None: on all."""

    fitted: int = 1000
    """Functions that the curvature is fitted on, drawn with the seed."""

    checked: int = 40
    """Functions that are asked for by their own text, and held-out ones that a step is taken for."""


@dataclass(frozen=True, kw_only=True)
class StdlibResult:
    """What the demo found.

    Attributes:
        replies: to each prompt.
        itself: where functions that are asked for by their own text come in the ranking, by method.
        patch: how far a step on the first rows of each method brings held-out functions down.
        tokens: that a held-out function is predicted in, on average.
        train: number of training rows.
        model, report: where the trained model and the page are.
    """

    replies: tuple[Reply, ...]
    itself: dict[str, DuplicateRanks]
    patch: TailPatch
    tokens: float
    train: int
    model: Path
    report: Path

    def __str__(self) -> str:
        """Replies, checks, where the page is, and how to go on."""
        blocks = [line for reply in self.replies for line in [*reply.lines(), ""]]
        return "\n".join([*blocks, *self._check_lines(), "", *self._closing()])

    def _check_lines(self) -> list[str]:
        first = next(iter(self.itself.values()))
        lines = [f"Functions asked for by their own text: {len(first.ranks)} of {first.rows:,}"]
        lines += [
            f"  {name:<8} itself first {one.recall(1).value:5.0%}, in the first 10 {one.recall(10).value:5.0%}"
            for name, one in self.itself.items()
        ]
        before = f"loss {float(self.patch.before.mean()):.0f}, {self.tokens:.0f} tokens"
        lines.append(f"One step on the first {self.patch.k} rows for {len(self.patch.before)} functions held out ({before})")
        for name in self.patch.falls:
            fall = self.patch.fall(name)
            lines.append(f"  {name:<8} loss falls by {fall.value:.3f} ({fall.low:.3f} to {fall.high:.3f})")
        return lines

    def _closing(self) -> list[str]:
        run = shlex.quote(str(self.report.parent))
        options = f"stdlib --checkpoint-dir {shlex.quote(str(self.model))} --run-dir {run}"
        return [
            f"ask more: whence query {options} --text 'def median(data):' --k 5",
            f"in a browser: whence serve {run}",
            f"report: {self.report}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "replies": [reply.to_json() for reply in self.replies],
            "itself": {name: one.to_json() for name, one in self.itself.items()},
            "tail_patch": self.patch.to_json(),
            "train": self.train,
            "model": str(self.model),
            "report": str(self.report),
        }


def run_stdlib_demo(*, out: Path = Path("runs/stdlib"), settings: StdlibSettings | None = None) -> StdlibResult:
    """Train a language model on the standard library's functions, let it talk, and write `out/report.html`.

    A demo that was interrupted goes on where it stopped, also within the training, and what was scored is read back. The
    stage table and the coverage go to standard error.

    Args:
        out: folder of the run, with the model in `out/model`; a demo with other settings that is there is replaced.
        settings: None: the defaults.

    Raises:
        ConfigError: an extra, `hf` or `report`, is not installed, or `out` holds something else.
    """
    for package in ("transformers", "accelerate"):
        need(package)
    require_extra("jinja2")
    settings = settings or StdlibSettings()
    known = claim(out, "stdlib", asdict(settings))
    stages = Stages()
    recipe = _model(out / "model", settings, stages, overwrite=not known)
    options = {"recipe": {"spec": "stdlib", "options": {"checkpoint_dir": str((out / "model").resolve())}}}
    attributor = Attributor(recipe.model, recipe.task, run_dir=out, collate=recipe.collate, seed=settings.seed)
    attributor.run.origin, attributor.stages = options, stages
    attributor.fit(recipe.train, strategy=STRATEGY, max_examples=min(settings.fitted, len(recipe.train)), overwrite=True)
    index = attributor.index(recipe.train, overwrite=True)
    asked = answers(recipe, PROMPTS)
    found = index.query(asked, k=SHOWN)
    replies = [Reply(prompt=row["prompt"], says=row["says"], learned=learned(recipe, found.top(place))) for place, row in enumerate(asked)]
    itself, patch, tokens = _checks(attributor, index, recipe, settings)
    # For the page: all rows, exactly, and by token.
    attributor.scores(asked, recipe.train, per_token=True, name="replies", overwrite=True)
    _write_checks(out, recipe, itself, patch)
    report = out / "report.html"
    run_report(out, report, recipe=replace(recipe, queries=asked))
    tell(attributor)
    return StdlibResult(
        replies=tuple(replies), itself=itself, patch=patch, tokens=tokens, train=len(recipe.train), model=out / "model", report=report
    )


def _model(folder: Path, settings: StdlibSettings, stages: Stages, *, overwrite: bool) -> Recipe:
    """Train the model, go on with its training, or open it."""
    family = FAMILIES["stdlib"]
    if (folder / RECORD).is_file() and not overwrite:
        return open_finetuned(family, folder, DataSettings())
    return train_recipe(
        family,
        folder,
        data=DataSettings(max_train_rows=settings.functions),
        training=TrainingSettings(preset=settings.preset, num_train_epochs=settings.epochs, seed=settings.seed),
        snapshots=0,
        overwrite=overwrite,
        keep_every=_KEEP_EVERY_S,
        stages=stages,
    )


def _checks(
    attributor: Attributor, index: Index, recipe: Recipe, settings: StdlibSettings
) -> tuple[dict[str, DuplicateRanks], TailPatch, float]:
    """Ask for training functions by their own text, and take a step on what is found for functions held out."""
    train = recipe.train
    own = sample_rows(len(train), min(settings.checked, len(train)), seed=settings.seed)
    ranked = _orders(index, [train[row] for row in own], recipe, settings.seed)
    itself = {name: duplicate_ranks(scores, own) for name, scores in ranked.items()}
    held = [recipe.queries[row] for row in range(len(PROMPTS), len(recipe.queries))][: settings.checked]
    orders = _orders(index, held, recipe, settings.seed)
    with attributor.stages.stage("Tail patch"):
        patch = tail_patch(
            recipe.model,
            recipe.task,
            held,
            train,
            orders,
            learning_rate=_RATE,
            k=min(PATCHED, len(train)),
            collate=recipe.collate,
            device=attributor.device,
            seed=settings.seed,
        )
    return itself, patch, sum(len(row["input_ids"]) - 1 for row in held) / len(held)


def _orders(index: Index, queries: list[Any], recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """Return scores `[query, train]` by name: the index's own, by words in common, and by chance."""
    own = index.scores(queries)
    return {
        STRATEGY: own[:, torch.argsort(index.ids)],
        "bm25": bm25_scores(queries, recipe.train),
        "random": random_scores(len(queries), len(recipe.train), seed=seed),
    }


def _write_checks(out: Path, recipe: Recipe, itself: dict[str, DuplicateRanks], patch: TailPatch) -> None:
    """Leave the checks where the page, and whence report, look for them."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "duplicates.json", {"recipe": recipe.name, "scores": {name: one.to_json() for name, one in itself.items()}})
    write_json_atomic(folder / "tail-patch.json", {"recipe": recipe.name, **patch.to_json()})
