"""What removing rows did, as a picture: one line per order over the number of rows removed, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from whence.evaluate.removal import BASE, Counterfactual
from whence.report.page import require_extra
from whence.report.picture_files import ACCENT, LINE, MUTED, picture_file, plain

_Panel = Literal["flipped", "rise", "perplexity"]
_LABELS: dict[_Panel, str] = {
    "flipped": "queries flipped",
    "rise": "mean rise of the measurement",
    "perplexity": "perplexity of the queries",
}
# The first order is the one to look at. Markers tell lines apart for readers who see few colours; being one fewer than the
# colours, they also do when colours come round again.
_COLOURS = (ACCENT, "#1f5f8b", "#3c8a5f", "#8a5fa8", "#c79a2b", "#4d4a45", "#6fa8c9", "#b56b8f")
_MARKERS = "os^DvPX"


def counterfactual_picture(path: Path, result: Counterfactual, *, title: str = "Rows removed, trained again") -> None:
    """Draw how far removal hurt: share flipped and mean rise with mode `"each"`, else perplexity or, without tokens, mean rise.

    The random order, the last one, is dotted and grey. Bars are 95% intervals; lines are set a little apart so that they show.

    Args:
        path: ends in `.png` or `.svg`.
        result: of `whence.evaluate.counterfactual.counterfactual`.
        title: above the picture.

    Raises:
        ConfigError: the file is of another kind, or matplotlib is not installed. StorageError: it cannot be written.
    """
    panels: list[_Panel] = ["flipped", "rise"] if result.mode == "each" else ["rise" if result.tokens is None else "perplexity"]
    with picture_file(path, title, size=(4.6 * len(panels) + 0.8, 4.2)) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, each in zip(panels, axes, strict=True):
            _draw(each, result, panel)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(panels)))


def _draw(axes: Any, result: Counterfactual, panel: _Panel) -> None:
    start = getattr(result.effect(BASE, 0), panel).value
    axes.axhline(start, color=LINE, linewidth=1, zorder=1)
    apart = 0.012 * result.removed[-1]
    last = len(result.methods) - 1
    for number, method in enumerate(result.methods):
        found = [getattr(result.effect(method, count), panel) for count in result.removed]
        values = [start, *(estimate.value for estimate in found)]
        # What has no interval has NaN ends, and nothing is drawn for it.
        below = [0.0, *(estimate.value - estimate.low for estimate in found)]
        above = [0.0, *(estimate.high - estimate.value for estimate in found)]
        places = [0.0, *(count + (number - last / 2) * apart for count in result.removed)]
        chance = number == last
        axes.errorbar(
            places,
            values,
            # A mean can lie a little outside of the middle of its bootstrap samples.
            yerr=[[max(end, 0.0) for end in ends] for ends in (below, above)],
            label=plain(method),
            color=MUTED if chance else _COLOURS[number % len(_COLOURS)],
            marker="." if chance else _MARKERS[number % len(_MARKERS)],
            linestyle=(0, (1, 2)) if chance else "-",
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2,
            zorder=3 if chance else 4,
        )
    axes.set(xlabel="training rows removed", ylabel=_LABELS[panel])
    axes.set_xticks([0, *result.removed])
    if panel == "flipped":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(require_extra("matplotlib.ticker").PercentFormatter(1, 0))
