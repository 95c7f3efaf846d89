"""Charts as SVG that is part of the page: real text in the page's own type, colours that follow light and dark.

The same numbers give the same bytes: no date, and ids from a fixed salt.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from whence.report.page import require_extra

# Stand-ins in matplotlib's output for the page's own colours, which differ by scheme.
_INK, _MUTED, _LINE, _ACCENT, _SOFT = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent", _SOFT: "--soft"}
_STYLES: dict[str, dict[str, Any]] = {
    "main": {"color": _ACCENT, "linewidth": 2.2, "zorder": 5},
    "rival": {"color": _INK, "linewidth": 1.4, "linestyle": (0, (4, 2)), "zorder": 4},
    "chance": {"color": _MUTED, "linewidth": 1.2, "linestyle": (0, (1, 2)), "zorder": 3},
    "limit": {"color": _LINE, "linewidth": 4, "zorder": 2},
}
_SIZE_IN = (5.4, 3.7)
_FONT_PT = 10.5
_LONGEST = 40


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line `y [point]` over `x [point]`, drawn as the main finding, a rival, chance, or the limit of what can be."""

    name: str
    x: Tensor
    y: Tensor
    style: Literal["main", "rival", "chance", "limit"]


def share_curves(
    curves: Sequence[Curve], *, x_label: str, y_label: str, description: str, x_end: float = 1.0, guides: Sequence[float] = ()
) -> str:
    """Draw shares against shares, in per cent, up to `x_end`, with upright lines at `guides`.

    Args:
        description: what the chart shows, for readers who do not see it.
    """
    with _Drawing(description) as (figure, axes):
        for guide in guides:
            axes.axvline(guide, color=_LINE, linewidth=1, zorder=1)
        for curve in curves:
            # The points past the end would be cut off by the frame anyway; left out, they weigh nothing in the file.
            shown = curve.x <= x_end + 1e-9
            axes.plot(curve.x[shown].tolist(), curve.y[shown].tolist(), label=_plain(curve.name), **_STYLES[curve.style])
        axes.set(xlim=(0, x_end), ylim=(0, 1.03), xlabel=_plain(x_label), ylabel=_plain(y_label))
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.62), **_LEGEND)
        return _svg(figure, description)


def strip(marked: Tensor, *, description: str) -> str:
    """Draw rows in their order as one strip from left to right, with a line for each row that is marked, bool `[row]`.

    Args:
        description: what the drawing shows, for readers who do not see it.
    """
    # Neighbours become one shape; the browser would show a seam between two.
    edges = torch.cat([torch.zeros(1), marked.float(), torch.zeros(1)]).diff()
    starts, ends = (edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist()
    path = "".join(f"M{start} 0H{end}V1H{start}z" for start, end in zip(starts, ends, strict=True))
    return (
        f'<svg viewBox="0 0 {max(len(marked), 1)} 1" preserveAspectRatio="none" role="img" aria-label="{html.escape(description)}">'
        f'<path d="{path}"/></svg>'
    )


def log_histogram(groups: Sequence[tuple[str, Tensor]], *, x_label: str, y_label: str, description: str, bins: int = 36) -> str:
    """Draw how often positive numbers occur, on a logarithmic axis, one group of rows upon the other.

    Args:
        groups: name and numbers `[row]`; the last group has the accent colour. Numbers that are not positive are left out.
        description: what the chart shows, for readers who do not see it.
        bins: number of bars.
    """
    kept = [(name, values[values > 0].double()) for name, values in groups]
    values = torch.cat([part for _, part in kept])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    edges = torch.logspace(math.log10(low), math.log10(max(high, low * 1.01)), bins + 1, dtype=torch.float64)
    # Rounding of the first and last edge must not lose the numbers they were made from.
    edges[0], edges[-1] = min(low, float(edges[0])), max(high, float(edges[-1]))
    widths = edges.diff().tolist()
    with _Drawing(description) as (figure, axes):
        base = torch.zeros(bins, dtype=torch.float64)
        for (name, part), colour in zip(kept, [_SOFT] * (len(kept) - 1) + [_ACCENT], strict=True):
            counts = torch.histogram(part, edges).hist
            axes.bar(edges[:-1].tolist(), counts.tolist(), widths, base.tolist(), align="edge", color=colour, label=_plain(name))
            base += counts
        axes.set(xscale="log", xlabel=_plain(x_label), ylabel=_plain(y_label))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(kept), columnspacing=1.6, **_LEGEND)
        return _svg(figure, description)


_LEGEND = {"frameon": False, "handlelength": 1.8, "labelspacing": 0.35, "borderaxespad": 0.2, "labelcolor": _INK}


def _plain(text: str) -> str:
    """Return text that can be drawn: without lone surrogates and control characters, and short enough to leave room for a chart."""
    drawable = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "?", text)
    return drawable if len(drawable) <= _LONGEST else f"{drawable[: _LONGEST - 1]}…"


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.0f}%"


class _Drawing:
    """A figure in the page's style; nothing of matplotlib's global state is changed."""

    def __init__(self, description: str) -> None:
        self.matplotlib: Any = require_extra("matplotlib")
        self.settings = self.matplotlib.rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": _plain(description),
                "text.parse_math": False,
                "font.size": _FONT_PT,
                "axes.edgecolor": _LINE,
                "axes.labelcolor": _MUTED,
                "xtick.color": _MUTED,
                "ytick.color": _MUTED,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "ytick.major.size": 0,
                "xtick.major.size": 3,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "grid.color": _LINE,
                "grid.linewidth": 0.7,
                "axes.axisbelow": True,
                "legend.fontsize": _FONT_PT,
                "axes.labelpad": 7,
            }
        )

    def __enter__(self) -> tuple[Any, Any]:
        self.settings.__enter__()
        # Not pyplot: it keeps figures and picks a window system.
        figure = require_extra("matplotlib.figure").Figure(figsize=_SIZE_IN, layout="constrained")
        return figure, figure.add_subplot()

    def __exit__(self, *error: object) -> None:
        self.settings.__exit__(*error)


def _svg(figure: Any, description: str) -> str:
    """Return the figure as an `<svg>` element for use within HTML."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The text is set in the reader's fonts; matplotlib's own only measures it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    box = re.search(r'viewBox="([\d. ]+)"', drawn)
    body = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index(">", drawn.index("<svg")) + 1 :], flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = body.replace("xlink:href", "href")
    view = box.group(1) if box else "0 0 400 300"
    return f'<svg viewBox="{view}" role="img" aria-label="{html.escape(description)}">{body.strip()}'
