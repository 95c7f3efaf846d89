"""The demo of digits: find wrong labels among handwritten digits, explain the network's mistakes, and write a page about it.

Everything is real: the images, the network, its training, the scores. It needs no download and takes seconds.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import whence
from whence.attributor import Attributor
from whence.demo.claim import claim, tell
from whence.evaluate.mislabeled import recall_curve
from whence.recipes.base import Recipe
from whence.recipes.digits import DigitsData, DigitsSettings, build_network, load_data, make_recipe, predict, train_network
from whence.report.digits import digits_page
from whence.report.digits_findings import DigitsFindings, Misread
from whence.report.page import require_extra, write_page
from whence.runtime.device import one_thread
from whence.scores.matrix import Scores
from whence.tasks import Classification

NEIGHBOURS = 6


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo found; recalls are shares from 0 to 1 of the flipped labels."""

    recall_at_10: float
    recall_at_20: float
    loss_recall_at_10: float
    loss_recall_at_20: float
    train: int
    flipped: int
    misread: int
    report: Path

    @property
    def line(self) -> str:
        """The result in one line."""
        return f"recall of flipped labels: {100 * self.recall_at_10:.1f}% in the first 10%, {100 * self.recall_at_20:.1f}% in the first 20%"

    def __str__(self) -> str:
        """The result, and where the page is."""
        return f"{self.line}\nreport: {self.report}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"report": str(self.report)}


def run_demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> DemoResult:
    """Train a network on digits with some wrong labels, find them, and write `out/report.html`.

    A demo that was interrupted continues where it stopped: the network is trained again, to the same numbers, and what
    was scored is read back. The stage table and the coverage go to standard error.

    Args:
        out: folder of the run; a demo that is there already is continued, or replaced if it had another seed.
        seed: of everything random.

    Raises:
        ConfigError: the extra `report` is not installed, or `out` holds something else.
    """
    for module in ("jinja2", "matplotlib"):
        require_extra(module)
    settings = DigitsSettings(seed=seed)
    claim(out, "digits", asdict(settings))
    with one_thread():
        findings, attributor = _work(settings, out)
    report = out / "report.html"
    write_page(digits_page(findings), report)
    tell(attributor)
    return _result(findings, report)


def _work(settings: DigitsSettings, out: Path) -> tuple[DigitsFindings, Attributor]:
    """Train, fit, score, and gather what was found."""
    network = build_network(settings.seed)
    # A network this small gains nothing from a GPU.
    attributor = Attributor(network, Classification(), run_dir=out, device="cpu", seed=settings.seed)
    # For whence report, which tells other rows (of another seed) by their fingerprint.
    attributor.run.origin = {"recipe": {"spec": "digits", "options": {}}}
    with attributor.stages.stage("Train network"):
        data = load_data(settings)
        train_network(network, data.train, settings)
    recipe = make_recipe(network, data, settings)
    attributor.fit(data.train, overwrite=True)
    self_influence = attributor.self_influence(data.train, overwrite=True)
    scores = attributor.scores(recipe.queries, data.train, overwrite=True) if recipe.queries else None
    readings, losses = predict(network, data.train)
    findings = DigitsFindings(
        data=data,
        readings=readings,
        losses=losses,
        self_influence=self_influence,
        by_self_influence=recall_curve(self_influence, data.flipped),
        by_loss=recall_curve(losses, data.flipped),
        misread=_misread(recipe, scores),
        stages=attributor.stages.rows(),
        settings=_settings(settings, data),
        coverage=str(attributor.coverage),
        footer=f"Made by whence {whence.__version__} with torch {torch.__version__}, Python {platform.python_version()}. "
        "One file without scripts or requests: mail it or archive it as it is.",
    )
    return findings, attributor


def _misread(recipe: Recipe, scores: Scores | None) -> list[Misread]:
    """Collect each query's reading and the training rows that speak most strongly for it and against it."""
    if scores is None:
        return []
    readings, _ = predict(recipe.model, recipe.queries)
    return [
        Misread(
            row=row,
            reading=reading,
            proponents=[(index, score) for index, score in scores.top(query, NEIGHBOURS) if score > 0],
            opponents=[(index, score) for index, score in scores.bottom(query, NEIGHBOURS) if score < 0],
        )
        for query, (row, reading) in enumerate(zip(recipe.queries, readings.tolist(), strict=True))
    ]


def _settings(settings: DigitsSettings, data: DigitsData) -> list[tuple[str, str]]:
    """Return what a reader needs to know to repeat the run."""
    return [
        ("Data", "handwritten digits of scikit-learn, 8 × 8"),
        ("Training and test rows", f"{len(data.train):,} and {len(data.test):,}"),
        ("Flipped labels", f"{int(data.flipped.sum()):,} ({settings.flipped_share:.0%})"),
        ("Network", "2 convolutions, 2 linear layers"),
        ("Training", f"{settings.epochs} epochs, AdamW, one cycle"),
        ("Highest learning rate, weight decay", f"{settings.learning_rate:g}, {settings.weight_decay:g}"),
        ("Curvature", "EKFAC, labels drawn from the network"),
        ("Damping", "0.1 × each layer's mean eigenvalue"),
        ("Measurement", "cross-entropy of the true label"),
        ("Seed", str(settings.seed)),
    ]


def _result(findings: DigitsFindings, report: Path) -> DemoResult:
    ours, loss = findings.by_self_influence, findings.by_loss
    return DemoResult(
        recall_at_10=ours.at(0.1),
        recall_at_20=ours.at(0.2),
        loss_recall_at_10=loss.at(0.1),
        loss_recall_at_20=loss.at(0.2),
        train=findings.rows,
        flipped=findings.wrong,
        misread=len(findings.misread),
        report=report,
    )
