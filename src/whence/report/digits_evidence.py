"""The second half of the digits page: how far the ranking is to be trusted, how to read the page, and how it was run."""

from __future__ import annotations

from whence.report.digits_findings import DigitsFindings, percent
from whence.report.page import Chart, Evidence, Section, Table, Terms
from whence.report.plots import Curve, log_histogram, share_curves

_TABLE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_CURVE_END = 0.3
_MEMORISING = (
    "The network was stopped before it learned the wrong labels by heart, which is where loss is at its best. Trained for twice as "
    "long or more, it gives worse rankings of both kinds, and self-influence is then ahead (docs/log.md has the figures)."
)


def evidence(findings: DigitsFindings) -> Section:
    """Compare the ranking with loss and chance."""
    flipped = findings.data.flipped
    histogram = log_histogram(
        [("label is right", findings.self_influence[~flipped]), ("label was flipped", findings.self_influence[flipped])],
        x_label="Self-influence (logarithmic)",
        y_label="Training rows",
        description="How often each self-influence occurs: small for most rows with a right label, large for flipped ones.",
    )
    return Evidence(
        title="How far to trust the ranking",
        short="Evidence",
        lead=[verdict(findings), _MEMORISING],
        charts=[
            Chart(title="Wrong labels found", svg=_recall_chart(findings), caption="The upright lines stand at 10% and 20% of the rows."),
            Chart(title="Self-influence of right and wrong labels", svg=histogram, caption="Where the colours meet, a person must look."),
        ],
        tables=[_recall_table(findings)],
    )


def verdict(findings: DigitsFindings) -> str:
    """Say plainly which ranking wins."""
    ours, loss = findings.found(findings.by_self_influence), findings.found(findings.by_loss)
    counts = (
        f"In the first {findings.checked:,} rows, self-influence finds {ours} of the {findings.wrong} wrong labels "
        f"and plain loss finds {loss}."
    )
    cannot = "What it cannot tell is which rows led to a given mistake, as below."
    if loss > ours:
        return f"{counts} Loss wins here, and it costs one forward pass. {cannot}"
    if loss == ours:
        return f"{counts} A draw, and loss costs one forward pass. {cannot}"
    return f"{counts} Self-influence wins here, by little: with other seeds loss often does, at the cost of one forward pass."


def _recall_chart(findings: DigitsFindings) -> str:
    ours, loss = findings.by_self_influence, findings.by_loss
    share = findings.wrong / findings.rows
    return share_curves(
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
        description=f"Share of wrong labels found against share of rows checked: in the first 10%, {percent(ours.at(0.1))} by "
        f"self-influence, {percent(loss.at(0.1))} by loss and 10% in random order. The table below has more of the numbers.",
    )


def _recall_table(findings: DigitsFindings) -> Table:
    ours, loss = findings.by_self_influence, findings.by_loss
    rows = []
    for part in _TABLE_SHARES:
        checked = int(part * findings.rows + 1e-9)
        shares = (ours.at(part), loss.at(part), checked / findings.rows)
        rows.append([percent(part), f"{checked:,}", *(f"{100 * share:.1f}%" for share in shares)])
    columns = ["Checked", "Rows", "Self-influence", "Loss", "Random order"]
    return Table(caption="Wrong labels found, in numbers", columns=columns, rows=rows)


def how_to_read(findings: DigitsFindings) -> Section:
    """Explain the words and the sign of scores."""
    return Terms(
        title="How to read this page",
        short="How to read",
        entries=[
            (
                "Score and sign",
                "score = ⟨ gradient of the test digit's loss, (H + damping)⁻¹ gradient of the training row's loss ⟩, where H is the "
                "average curvature of the training loss. Positive: training on the row pushed the test digit's loss down; it helped. "
                "Negative: it harmed.",
            ),
            (
                "Size of a score",
                f"To first order, training again without the row changes the loss by score / {findings.rows:,}. For a network this "
                "flexible that is far too much, since other rows take over: read scores as an order of importance. Trained again "
                "without the six strongest opponents, networks of two seeds read 14 of 29 misread digits rightly; without six "
                "random rows, 5 (docs/log.md).",
            ),
            (
                "Self-influence",
                "The score of a row for its own loss; never negative. Large where a row's label disagrees with everything else the "
                "network learned, so wrong labels come first, and rare or odd rows with them.",
            ),
            ("Likely label", "The network's own reading of the row. Where it agrees with the given label, no other one is suggested."),
            ("Flipped", "The label was replaced by a random other one before training. Scores never use this; it serves to check them."),
            (
                "Limits",
                "One small network and one seed. Scores are a first-order estimate around the trained network, with an approximate "
                "curvature, and speak for the parameters named under “The run”.",
            ),
        ],
    )


def the_run(findings: DigitsFindings) -> Section:
    """Tell coverage, time and settings."""
    total = sum(stage.total_s for stage in findings.stages)
    stages = [[s.name, f"{s.mean_s:.3f}", str(s.calls), f"{s.total_s:.2f}", f"{100 * s.share:.1f}"] for s in findings.stages]
    stages.append(["Total", "", str(sum(s.calls for s in findings.stages)), f"{total:.2f}", "100.0"])
    fitted = any(stage.name.startswith("Fit") for stage in findings.stages)
    resumed = [] if fitted else ["Stages missing here were finished by an earlier run and read back from its folder."]
    return Evidence(
        title="The run",
        short="The run",
        lead=[*findings.coverage.split("\n"), *resumed],
        tables=[
            Table(caption="Stages", columns=["Stage", "Mean (s)", "Calls", "Total (s)", "Share (%)"], rows=stages, total=True),
            Table(caption="Settings", columns=["Setting", "Value"], rows=[list(entry) for entry in findings.settings]),
        ],
    )
