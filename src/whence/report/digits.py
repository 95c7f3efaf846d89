"""The page about the handwritten digits: what was found, in the words of `whence.report.page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whence.recipes.digits import Digit, DigitsData
from whence.report.page import Case, Cases, Chart, Evidence, Example, Gallery, KeyFigure, Page, Picture, Section, Strips, Table, Terms
from whence.report.pictures import picture
from whence.report.plots import Curve, log_histogram, share_curves, strip
from whence.runtime.progress import StageRow

CHECKED = 0.1
SHOWN = 40
_TABLE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_CURVE_END = 0.3


class Recall(Protocol):
    """Share of wrong labels found against share of rows looked at; see `whence.evaluate.mislabeled.RecallCurve`."""

    fractions: Tensor
    recalls: Tensor

    def at(self, fraction: float) -> float:
        """Return the share found in the first `fraction` of the ranking."""
        ...


@dataclass(frozen=True, kw_only=True)
class Misread:
    """A test digit the network reads wrongly, with `(training row, score)`, strongest first, for and against it."""

    row: Digit
    reading: int
    proponents: Sequence[tuple[int, float]]
    opponents: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class DigitsFindings:
    """All that the page says.

    Attributes:
        data: training and test rows.
        readings: the network's reading of each training row, `[train]`.
        losses: the loss of each training row's given label, `[train]`.
        self_influence: `[train]`.
        by_self_influence, by_loss: how well these rankings find the flipped labels.
        misread: the test digits the network reads wrongly.
        stages: where the time went.
        settings: name and value.
        coverage: which parameters the scores speak for.
        footer: what made the page.
    """

    data: DigitsData
    readings: Tensor
    losses: Tensor
    self_influence: Tensor
    by_self_influence: Recall
    by_loss: Recall
    misread: Sequence[Misread]
    stages: Sequence[StageRow]
    settings: Sequence[tuple[str, str]]
    coverage: str
    footer: str

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.data.train)

    @property
    def wrong(self) -> int:
        """Training rows with a flipped label."""
        return int(self.data.flipped.sum())

    @property
    def checked(self) -> int:
        """Rows in the first tenth of a ranking."""
        return int(CHECKED * self.rows + 1e-9)

    def found(self, recall: Recall) -> int:
        """Return how many flipped labels a ranking has in its first tenth."""
        return round(recall.at(CHECKED) * self.wrong)

    def flipped_share(self, side: str) -> float | None:
        """Return which share of all `"proponents"` or `"opponents"` listed carry a flipped label; None if none are listed."""
        rows = [self.data.train[index] for case in self.misread for index, _ in getattr(case, side)]
        return sum(row.label != row.truth for row in rows) / len(rows) if rows else None


def digits_page(findings: DigitsFindings) -> Page:
    """Compose the page."""
    sections = [_suspects(findings), _errors(findings), _evidence(findings), _misread(findings), _reading(findings), _run(findings)]
    found = findings.found(findings.by_self_influence)
    return Page(
        kicker="whence demo: handwritten digits with wrong labels",
        title=f"Checking {findings.checked:,} of {findings.rows:,} rows finds {found:,} of the {findings.wrong:,} wrong labels",
        summary=_summary(findings),
        strips=_strips(findings),
        figures=_figures(findings),
        sections=[section for section in sections if section is not None],
        footer=findings.footer,
    )


def _summary(findings: DigitsFindings) -> list[str]:
    opponents = findings.flipped_share("opponents")
    first = (
        f"{findings.wrong:,} of {findings.rows:,} training digits were given a wrong label on purpose, and a small network was trained "
        "on all of them. Then whence measured how hard each row pulls on its own loss: its self-influence. Wrong labels pull hardest, "
        "so that is the order in which to check the rows."
    )
    if opponents is None:
        return [first, f"The network reads all {len(findings.data.test):,} test digits rightly, so there is no mistake to explain."]
    second = (
        f"The network misreads {len(findings.misread)} of {len(findings.data.test):,} digits it never saw. Of the training rows that "
        f"pushed it hardest towards these mistakes, {_percent(opponents)} carry one of the wrong labels."
    )
    return [first, second]


def _strips(findings: DigitsFindings) -> Strips:
    flipped, rows = findings.data.flipped, f"The {findings.rows:,} training rows"
    orders = [
        ("by self-influence", torch.tensor(_order(findings))),
        ("by loss", torch.argsort(findings.losses, descending=True, stable=True)),
        ("as they came", torch.arange(findings.rows)),
    ]
    return Strips(
        caption=f"{rows} in the order in which they would be checked, from left to right. Each line in colour is a wrong label.",
        strips=[(name, strip(flipped[order], description=f"{rows} {name}, wrong labels marked")) for name, order in orders],
        ticks=(0.1, 0.2, 0.5),
    )


def _figures(findings: DigitsFindings) -> list[KeyFigure]:
    ours, loss, opponents = findings.by_self_influence, findings.by_loss, findings.flipped_share("opponents")
    figures = [
        KeyFigure(value=_percent(ours.at(0.1)), label="of the wrong labels in the first 10% by self-influence"),
        KeyFigure(value=_percent(ours.at(0.2)), label="in the first 20% by self-influence"),
        KeyFigure(value=_percent(loss.at(0.1)), label="in the first 10% when ranked by plain loss"),
        KeyFigure(value=f"{len(findings.misread)} of {len(findings.data.test):,}", label="test digits misread by the network"),
    ]
    if opponents is not None:
        share = _percent(findings.wrong / findings.rows)
        figures.append(KeyFigure(value=_percent(opponents), label=f"of their strongest opponents mislabelled, as are {share} of all rows"))
    return figures


def _suspects(findings: DigitsFindings) -> Section:
    order = _order(findings)[: findings.checked]
    examples = [_suspect(findings, rank, row) for rank, row in enumerate(order, start=1)]
    flipped = [row for row in order if _flipped(findings.data.train[row])]
    right = sum(int(findings.readings[row]) == findings.data.train[row].truth for row in flipped)
    return Gallery(
        title="Suspected label errors",
        short="Suspects",
        lead=[
            f"The training rows with the largest self-influence, the first {len(order):,} of {findings.rows:,}. The likely label is what the "
            f"network itself reads; for {right} of the {len(flipped)} flipped labels here it is the original one.",
            "Only a demo knows which labels were flipped: those are underlined in colour. The others are labelled rightly, but written unusually.",
        ],
        examples=examples[:SHOWN],
        more=examples[SHOWN:],
        more_label=f"Show ranks {SHOWN + 1} to {len(order)}",
    )


def _errors(findings: DigitsFindings) -> Section | None:
    """Show right labels that come too early and wrong ones that come too late."""
    ranked = list(enumerate(_order(findings), start=1))
    early = [(rank, row) for rank, row in ranked[: findings.checked] if not _flipped(findings.data.train[row])]
    late = [(rank, row) for rank, row in ranked[findings.checked :] if _flipped(findings.data.train[row])]
    if not early and not late:
        return None
    return Gallery(
        title="Where the ranking errs",
        short="Errors",
        lead=[
            f"Among the first {findings.checked:,} rows, {_count(len(early), 'has a right label', 'have a right label')}; "
            f"{_count(len(late), 'wrong label comes', 'wrong labels come')} later. The number is the rank of each."
        ],
        examples=[_suspect(findings, rank, row) for rank, row in early + late],
    )


def _evidence(findings: DigitsFindings) -> Section:
    ours, loss = findings.by_self_influence, findings.by_loss
    share = findings.wrong / findings.rows
    rows = [
        [_percent(part), f"{int(part * findings.rows + 1e-9):,}", *(f"{100 * value:.1f}%" for value in (ours.at(part), loss.at(part), part))]
        for part in _TABLE_SHARES
    ]
    recall = share_curves(
        [
            Curve(name="best possible", x=ours.fractions, y=(ours.fractions / share).clamp(max=1), style="limit"),
            Curve(name="by self-influence", x=ours.fractions, y=ours.recalls, style="main"),
            Curve(name="by loss", x=loss.fractions, y=loss.recalls, style="rival"),
            Curve(name="random order (mean)", x=ours.fractions, y=ours.fractions, style="chance"),
        ],
        x_label="Training rows checked",
        y_label="Wrong labels found",
        x_end=_CURVE_END,
        guides=(0.1, 0.2),
        description=f"Share of wrong labels found against share of rows checked. By self-influence {_percent(ours.at(0.1))} in the first 10%, "
        f"by loss {_percent(loss.at(0.1))}, in random order 10%. The table below has the numbers.",
    )
    flipped = findings.data.flipped
    histogram = log_histogram(
        [("label is right", findings.self_influence[~flipped]), ("label was flipped", findings.self_influence[flipped])],
        x_label="Self-influence (logarithmic)",
        y_label="Training rows",
        description="How often each self-influence occurs: rows with a right label lie mostly at small values, flipped ones at large values.",
    )
    return Evidence(
        title="How far to trust the ranking",
        short="Evidence",
        lead=[_verdict(findings), _MEMORISING],
        charts=[
            Chart(title="Wrong labels found", svg=recall, caption="The upright lines stand at 10% and 20% of the rows."),
            Chart(title="Self-influence of right and wrong labels", svg=histogram, caption="Where the colours overlap, a person must look."),
        ],
        tables=[
            Table(
                caption="Wrong labels found",
                columns=["Checked", "Rows", "Self-influence", "Loss", "Random order"],
                rows=rows,
            )
        ],
    )


_MEMORISING = (
    "The network was stopped before it learned the wrong labels by heart, which is where loss is at its best. Trained for twice as long "
    "or more, it gives worse rankings of both kinds, and self-influence is then ahead (docs/log.md has the figures)."
)


def _verdict(findings: DigitsFindings) -> str:
    """Say plainly which ranking wins."""
    ours, loss = findings.found(findings.by_self_influence), findings.found(findings.by_loss)
    counts = f"In the first {findings.checked:,} rows, self-influence finds {ours} of the {findings.wrong} wrong labels and plain loss finds {loss}."
    if loss > ours:
        return f"{counts} Loss wins here, and it costs one forward pass. What it cannot tell is which rows led to a given mistake, as below."
    if loss == ours:
        return f"{counts} A draw, and loss costs one forward pass. What it cannot tell is which rows led to a given mistake, as below."
    return f"{counts} Self-influence wins here, by little: with other seeds loss often does, at the cost of one forward pass."


def _misread(findings: DigitsFindings) -> Section | None:
    against, towards = findings.flipped_share("opponents"), findings.flipped_share("proponents")
    if against is None or towards is None:
        return None
    share = _percent(findings.wrong / findings.rows)
    return Cases(
        title="Why the network misreads these digits",
        short="Misread digits",
        lead=[
            "Each test digit that the network reads wrongly, with the training rows that moved it most. A proponent (positive score) lowered "
            "the loss of the true label; an opponent (negative score) raised it, and so pushed the network towards its mistake. Below each picture stand its label and its score.",
            f"Flipped labels are {share} of the training rows, but {_percent(against)} of the opponents shown. They are also {_percent(towards)} "
            "of the proponents: a wrong label has a large gradient, which moves many digits one way or the other.",
        ],
        proponents_label="Proponents: helped",
        opponents_label="Opponents: harmed",
        cases=[_case(findings, misread) for misread in findings.misread],
    )


def _case(findings: DigitsFindings, misread: Misread) -> Case:
    row = misread.row
    image = _picture(row, f"Test digit: a {row.truth}, read as {misread.reading}")
    return Case(
        query=Example(label=f"Read as {misread.reading}", note=f"It is a {row.truth}.", picture=image),
        proponents=[_scored(findings, index, score) for index, score in misread.proponents],
        opponents=[_scored(findings, index, score) for index, score in misread.opponents],
    )


def _reading(findings: DigitsFindings) -> Section:
    return Terms(
        title="How to read this page",
        short="How to read",
        entries=[
            (
                "Score and sign",
                "score = ⟨ gradient of the test digit's loss, (H + damping)⁻¹ gradient of the training row's loss ⟩, where H is the average "
                "curvature of the training loss. Positive: training on the row pushed the test digit's loss down; it helped. Negative: it harmed.",
            ),
            (
                "Size of a score",
                f"Removing the row and training again is predicted to change the loss by about score / {findings.rows:,}. Read it as an order "
                "of importance rather than as an exact forecast.",
            ),
            (
                "Self-influence",
                "The score of a row for its own loss; never negative. Large where a row's label disagrees with everything else the network "
                "learned, so wrong labels come first, and rare or odd rows with them.",
            ),
            ("Likely label", "The network's own reading of the row. Where it agrees with the given label, no other label is suggested."),
            ("Flipped", "The label was replaced by a random other one before training. Scores never use this; it serves to check them."),
            (
                "Limits",
                "One small network and one seed. Scores are a first-order estimate around the trained network, with an approximate curvature, "
                "and hold for the parameters named under coverage.",
            ),
        ],
    )


def _run(findings: DigitsFindings) -> Section:
    total = sum(stage.total_s for stage in findings.stages)
    fitted = any(stage.name.startswith("Fit") for stage in findings.stages)
    stages = [[s.name, f"{s.mean_s:.3f}", str(s.calls), f"{s.total_s:.2f}", f"{100 * s.share:.1f}"] for s in findings.stages]
    stages.append(["Total", "", str(sum(s.calls for s in findings.stages)), f"{total:.2f}", "100.0"])
    return Evidence(
        title="The run",
        short="The run",
        lead=[findings.coverage, *([] if fitted else ["Stages missing here were finished by an earlier run and read back from its folder."])],
        tables=[
            Table(caption="Stages", columns=["Stage", "Mean (s)", "Calls", "Total (s)", "Share (%)"], rows=stages, total=True),
            Table(caption="Settings", columns=["Setting", "Value"], rows=[list(entry) for entry in findings.settings]),
        ],
    )


def _suspect(findings: DigitsFindings, rank: int, index: int) -> Example:
    row, reading = findings.data.train[index], int(findings.readings[index])
    shown = f", is {row.truth}" if _flipped(row) and reading != row.truth else ""
    return Example(
        rank=rank,
        picture=_picture(row, f"Training row {index}, labelled {row.label}{', flipped' if _flipped(row) else ''}"),
        label=f"Labelled {row.label}",
        likely=f"likely {reading}" if reading != row.label else "network agrees",
        mark=f"flipped{shown}" if _flipped(row) else None,
        note="label is right",
    )


def _scored(findings: DigitsFindings, index: int, score: float) -> Example:
    row = findings.data.train[index]
    return Example(
        label=str(row.label),
        picture=_picture(row, f"Training row {index}, labelled {row.label}{', flipped' if _flipped(row) else ''}"),
        score=signed(score),
        mark="flipped" if _flipped(row) else None,
    )


def _picture(row: Digit, alt: str) -> Picture:
    return picture(row.image, alt=alt, ink=True)


def _order(findings: DigitsFindings) -> list[int]:
    return torch.argsort(findings.self_influence, descending=True, stable=True).tolist()


def _flipped(row: Digit) -> bool:
    return row.label != row.truth


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def signed(score: float) -> str:
    """Return a score with three digits, its sign and a true minus."""
    digits = f"{abs(score):,.0f}" if abs(score) >= 100 else f"{abs(score):.3g}"
    return f"{'-' if score < 0 else '+'}{digits}".replace("-", "\u2212", 1)
