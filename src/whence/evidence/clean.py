"""From a recipe to a cleaned data set: scores, a decision, files, and what it bought."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from whence.attributor import Attributor
from whence.errors import RecipeError
from whence.evaluate.clean import check_shares, copy_numbers, decide, duplicate_groups, harmful_scores
from whence.evaluate.clean_effect import CleaningEffect, retrain_cleaned
from whence.evaluate.cleaned import Cleaned, check_out, write_cleaned
from whence.evaluate.decision import Decision
from whence.evaluate.retrain import Running, check_jobs
from whence.evidence.retraining import measure_of, procedure_of, running_in
from whence.recipes.base import Recipe
from whence.storage.run import read_json, write_json_atomic

Drop = Literal["mislabeled", "harmful", "duplicates"]


@dataclass(frozen=True, kw_only=True)
class CleanResult:
    """A cleaned data set.

    Attributes:
        decision: which rows go and why.
        written: the files.
        flipped: how many of the dropped labels were flipped on purpose, and how many there are; None if none were.
        effect: what training again showed; None if it was not asked for.
    """

    decision: Decision
    written: Cleaned
    flipped: tuple[int, int] | None
    effect: CleaningEffect | None

    def lines(self) -> list[str]:
        """Return the summary for people."""
        lines = self.decision.lines()
        if self.flipped is not None:
            lines.append(f"{self.flipped[0]:,} of the dropped labels were flipped on purpose, of {self.flipped[1]:,} flipped in all")
        return lines + ([] if self.effect is None else self.effect.lines())

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            **self.decision.to_json(),
            "files": self.written.to_json(),
            "flipped": None if self.flipped is None else {"dropped": self.flipped[0], "in_all": self.flipped[1]},
            "effect": None if self.effect is None else self.effect.to_json(),
        }


def clean_recipe(
    recipe: Recipe,
    attributor: Attributor,
    *,
    out: str | Path,
    drop: Drop = "mislabeled",
    fraction: float = 0.05,
    keep_share: float = 0.5,
    name: str | None = None,
    repeats: int = 0,
    n_jobs: int = 1,
    backend: str = "loky",
    overwrite: bool = False,
    **options: Any,
) -> CleanResult:
    """Drop training rows of a recipe by their scores, write the rest, and train again if `repeats` is not 0.

    Args:
        recipe: with `raw`, the raw row of every training row; with `retraining`, to train again.
        attributor: bound to the recipe's model; fitted.
        out, overwrite: as of `whence.evaluate.cleaned.write_cleaned`.
        drop: `"mislabeled"`, `"harmful"` or `"duplicates"`.
        fraction, keep_share: as of `whence.evaluate.clean.decide`; without effect on duplicates.
        name: of the scores in the run folder.
        repeats, n_jobs, backend: as of `whence.evaluate.clean_effect.retrain_cleaned`; the seed is the attributor's.
        options: of `Attributor.scores` and `Attributor.self_influence`.

    Raises:
        RecipeError: the recipe has no raw rows. ConfigError: it cannot be trained again, or an option cannot be used.
    """
    check_out(Path(out), overwrite=overwrite)
    rows = _rows(recipe)
    procedure = procedure_of(recipe) if repeats else None
    if drop != "duplicates":
        check_shares(len(rows), fraction=fraction, keep_share=keep_share)
    check_jobs(n_jobs)
    groups = duplicate_groups(rows)
    classes: Tensor | None = recipe.classes
    if drop == "duplicates":
        decision = decide(copy_numbers(groups), threshold=1, classes=classes, keep_share=0.0)
    elif drop == "harmful":
        harm = harmful_scores(attributor.scores(recipe.queries, recipe.train, name=name, overwrite=overwrite, **options).values)
        decision = decide(harm, fraction=fraction, floor=0.0, classes=classes, keep_share=keep_share, groups=groups)
    else:
        odd = attributor.self_influence(recipe.train, name=name, overwrite=overwrite, **options)
        decision = decide(odd, fraction=fraction, classes=classes, keep_share=keep_share, groups=groups)
    origin: dict[str, Any] = {"recipe": recipe.name, "drop": drop, "scores": name, **{key: str(value) for key, value in options.items()}}
    written = write_cleaned(rows, decision, out, origin=origin, overwrite=overwrite)
    effect = None
    if procedure is not None and decision.dropped:  # the files are there already, should training again fail
        running: Running = {**running_in(attributor), "n_jobs": n_jobs, "backend": backend}
        margin = measure_of(recipe) == "margin"
        effect = retrain_cleaned(procedure, decision, repeats=repeats, margin=margin, seed=attributor.seed, **running)
        record = read_json(written.provenance)
        record["origin"]["effect"] = effect.to_json()
        write_json_atomic(written.provenance, record)
    flipped = None
    if recipe.flipped is not None:
        flipped = int(recipe.flipped[list(decision.dropped)].sum()), int(recipe.flipped.sum())
    return CleanResult(decision=decision, written=written, flipped=flipped, effect=effect)


def _rows(recipe: Recipe) -> list[dict[str, Any]]:
    if recipe.raw is None:
        raise RecipeError(
            f"recipe {recipe.name} has no `raw`, the rows of its training data as they were read, so they cannot be written. Give them."
        )
    return list(recipe.raw)
