"""One set of numbers against another, as a picture file that stands by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.errors import DataError
from whence.report.page import require_extra
from whence.report.picture_files import ACCENT, INK, LINE, picture_file, plain

_PALE = "#f0cdbb"
_MOST_DOTS = 2000


def scatter_picture(path: Path, first: Tensor, second: Tensor, *, x_label: str, y_label: str, title: str) -> None:
    """Draw `second` over `first` and write the picture, atomically: dots, or hexagons coloured by how many points they hold.

    Dots that overlap add up to a darker colour; with more than 2,000 points they would hide each other all the same, and
    hexagons (logarithmic colours) are drawn instead.

    Args:
        path: ends in `.png` or `.svg`.
        first, second: `[point]`, along and up.

    Raises:
        ConfigError: the file is of another kind, or matplotlib is not installed.
        DataError: the numbers do not pair up, are not finite, or there are none.
        StorageError: the file cannot be written.
    """
    if first.dim() != 1 or first.shape != second.shape or not len(first):
        raise DataError(
            f"{tuple(first.shape)} and {tuple(second.shape)} numbers make no points; give two vectors of one length, not empty."
        )
    points = torch.stack([first.detach().cpu().double(), second.detach().cpu().double()])
    if not points.isfinite().all():
        wrong = int((~points.isfinite()).any(0).nonzero()[0])
        raise DataError(f"point {wrong} is ({points[0, wrong]}, {points[1, wrong]}) and cannot be drawn. Leave such points out.")
    with picture_file(path, title) as figure:
        axes = figure.add_subplot()
        _draw(figure, axes, points)
        axes.set(xlabel=plain(x_label), ylabel=plain(y_label))


def _draw(figure: Any, axes: Any, points: Tensor) -> None:
    x, y = points.tolist()
    for values, line in ((x, axes.axvline), (y, axes.axhline)):
        if min(values) <= 0 <= max(values):  # elsewhere the line would stretch the axis
            line(0, color=LINE, linewidth=1, zorder=1)
    if len(x) <= _MOST_DOTS:
        axes.scatter(x, y, s=14, color=ACCENT, alpha=max(0.15, min(0.8, 30 / len(x) ** 0.5)), linewidths=0, zorder=2)
        return
    colours = require_extra("matplotlib.colors").LinearSegmentedColormap.from_list("whence", [_PALE, ACCENT, INK])
    cells = axes.hexbin(x, y, gridsize=45, bins="log", mincnt=1, cmap=colours, linewidths=0.2, zorder=2)
    # The formatter of its own writes powers in the language that `text.parse_math` turns off.
    bar = figure.colorbar(cells, ax=axes, label="points", shrink=0.8, format=lambda value, _: f"{value:,.0f}")
    bar.minorticks_off()
    bar.outline.set_visible(False)
