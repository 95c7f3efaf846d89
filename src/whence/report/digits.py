"""The page about the handwritten digits: what was found, in the words of `whence.report.page`."""

from __future__ import annotations

import torch

from whence.recipes.digits import Digit, with_article
from whence.report.digits_evidence import evidence, how_to_read, the_run
from whence.report.digits_findings import DigitsFindings, Misread, count, is_flipped, percent, signed
from whence.report.page import Case, Cases, Example, Gallery, KeyFigure, Page, Picture, Section, Strips
from whence.report.pictures import picture
from whence.report.plots import strip

SHOWN = 40


def digits_page(findings: DigitsFindings) -> Page:
    """Compose the page."""
    sections = [
        _suspects(findings),
        _errors(findings),
        evidence(findings),
        _misread(findings),
        how_to_read(findings),
        the_run(findings),
    ]
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
        f"{findings.wrong:,} of {findings.rows:,} training digits were given a wrong label on purpose, and a small network was "
        "trained on all of them. Then whence measured how hard each row pulls on its own loss: its self-influence. Wrong labels "
        "pull hardest, so that is the order in which to check the rows."
    )
    if opponents is None:
        return [first, f"The network reads all {len(findings.data.test):,} test digits rightly, so there is no mistake to explain."]
    second = (
        f"The network misreads {len(findings.misread)} of {len(findings.data.test):,} digits it never saw. Of the training rows "
        f"that pushed it hardest towards these mistakes, {percent(opponents)} carry one of the wrong labels."
    )
    return [first, second]


def _strips(findings: DigitsFindings) -> Strips:
    flipped, rows = findings.data.flipped, f"The {findings.rows:,} training rows"
    orders = [
        ("by self-influence", torch.tensor(findings.order)),
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
        KeyFigure(value=percent(ours.at(0.1)), label="of the wrong labels in the first 10% by self-influence"),
        KeyFigure(value=percent(ours.at(0.2)), label="in the first 20% by self-influence"),
        KeyFigure(value=percent(loss.at(0.1)), label="in the first 10% when ranked by plain loss"),
        KeyFigure(value=f"{len(findings.misread)} of {len(findings.data.test):,}", label="test digits misread by the network"),
    ]
    if opponents is not None:
        share = percent(findings.wrong / findings.rows)
        figures.append(KeyFigure(value=percent(opponents), label=f"of their strongest opponents mislabelled, as are {share} of all rows"))
    return figures


def _suspects(findings: DigitsFindings) -> Section:
    order = findings.order[: findings.checked]
    examples = [_suspect(findings, rank, row) for rank, row in enumerate(order, start=1)]
    flipped = [row for row in order if is_flipped(findings.data.train[row])]
    right = sum(int(findings.readings[row]) == findings.data.train[row].truth for row in flipped)
    return Gallery(
        title="Suspected label errors",
        short="Suspects",
        lead=[
            f"The training rows with the largest self-influence, the first {len(order):,} of {findings.rows:,}. The likely label is "
            f"what the network itself reads; for {right} of the {len(flipped)} flipped labels here it is the original one.",
            "Only a demo knows which labels were flipped: those are underlined in colour.",
        ],
        examples=examples[:SHOWN],
        more=examples[SHOWN:],
        more_label=f"Show ranks {SHOWN + 1} to {len(order)}",
    )


def _errors(findings: DigitsFindings) -> Section | None:
    """Show right labels that come too early and wrong ones that come too late."""
    ranked = list(enumerate(findings.order, start=1))
    early = [(rank, row) for rank, row in ranked[: findings.checked] if not is_flipped(findings.data.train[row])]
    late = [(rank, row) for rank, row in ranked[findings.checked :] if is_flipped(findings.data.train[row])]
    if not early and not late:
        return None
    return Gallery(
        title="Where the ranking errs",
        short="Where it errs",
        lead=[
            f"Among the first {findings.checked:,} rows, {count(len(early), 'has its right label', 'have their right label')}; "
            f"{count(len(late), 'wrong label comes', 'wrong labels come')} later. The number is the rank of each."
        ],
        examples=[_suspect(findings, rank, row) for rank, row in early + late],
    )


def _misread(findings: DigitsFindings) -> Section | None:
    against, towards = findings.flipped_share("opponents"), findings.flipped_share("proponents")
    if against is None or towards is None:
        return None
    share = percent(findings.wrong / findings.rows)
    return Cases(
        title="Why the network misreads these digits",
        short="Misread digits",
        lead=[
            "Each test digit that the network reads wrongly, with the training rows that moved it most. A proponent (positive score) "
            "lowered the loss of the true label; an opponent (negative score) raised it, and so pushed the network towards its "
            "mistake. Below each picture stand its label and its score.",
            f"Flipped labels are {share} of the training rows, but {percent(against)} of the opponents shown. They are also "
            f"{percent(towards)} of the proponents: a wrong label has a large gradient, which moves many digits one way or the other.",
        ],
        proponents_label="Proponents: helped",
        opponents_label="Opponents: harmed",
        cases=[_case(findings, misread) for misread in findings.misread],
    )


def _case(findings: DigitsFindings, misread: Misread) -> Case:
    row = misread.row
    image = _picture(row, f"Test digit: {with_article(row.truth)}, read as {misread.reading}")
    return Case(
        query=Example(label=f"Read as {misread.reading}", note=f"It is {with_article(row.truth)}.", picture=image),
        proponents=[_scored(findings, index, score) for index, score in misread.proponents],
        opponents=[_scored(findings, index, score) for index, score in misread.opponents],
    )


def _suspect(findings: DigitsFindings, rank: int, index: int) -> Example:
    row, reading = findings.data.train[index], int(findings.readings[index])
    shown = f", is {row.truth}" if is_flipped(row) and reading != row.truth else ""
    return Example(
        rank=rank,
        picture=_picture(row, _training_alt(index, row)),
        label=f"Labelled {row.label}",
        likely=f"likely {reading}" if reading != row.label else "network agrees",
        mark=f"flipped{shown}" if is_flipped(row) else None,
        note="label is right",
    )


def _scored(findings: DigitsFindings, index: int, score: float) -> Example:
    row = findings.data.train[index]
    return Example(
        label=str(row.label),
        picture=_picture(row, _training_alt(index, row)),
        score=signed(score),
        mark="flipped" if is_flipped(row) else None,
    )


def _training_alt(index: int, row: Digit) -> str:
    return f"Training row {index}, labelled {row.label}{f', flipped from {row.truth}' if is_flipped(row) else ''}"


def _picture(row: Digit, alt: str) -> Picture:
    return picture(row.image, alt=alt, ink=True)
