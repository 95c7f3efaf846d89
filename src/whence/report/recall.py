"""Recall curves of wrong labels as a picture file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from whence.evaluate.mislabeled import RecallCurve
from whence.report.picture_files import ACCENT, INK, MUTED, picture_file, plain

_STYLES = ((ACCENT, "-"), (INK, "--"), (INK, ":"), (MUTED, "-."), (MUTED, ":"))


def recall_picture(path: Path, curves: Mapping[str, RecallCurve], *, title: str = "Wrong labels found") -> None:
    """Draw the share of wrong labels found over the share of rows looked at, a line per ranking.

    Raises:
        ConfigError: the file is neither `.png` nor `.svg`, or matplotlib is not installed.
    """
    with picture_file(path, title) as figure:
        axes = figure.add_subplot()
        for number, (name, curve) in enumerate(curves.items()):
            colour, dashes = _STYLES[number % len(_STYLES)]
            axes.plot(curve.fractions.tolist(), curve.recalls.tolist(), color=colour, linestyle=dashes, label=plain(name))
        axes.set(xlabel="share of the rows looked at", ylabel="share of the wrong labels found", xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="lower right")
