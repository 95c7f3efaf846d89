"""Pictures as files of their own, PNG or SVG, in the page's light colours: a file cannot follow its reader's scheme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whence.errors import ConfigError
from whence.report.page import require_extra
from whence.storage.run import write_bytes_atomic

# The first colours of templates/style.css.
PAPER, INK, MUTED, LINE, ACCENT = "#faf9f6", "#1c1b19", "#605d57", "#dfdbd2", "#b03a10"
_LONGEST = 80
_FORMATS: dict[str, dict[str, Any]] = {
    # Without dates and versions, the same numbers give the same bytes.
    ".svg": {"metadata": {"Date": None, "Creator": None, "Format": None, "Type": None}},
    ".png": {"dpi": 200, "metadata": {"Software": None}},
}


def check_picture(path: Path | None) -> None:
    """Check before long work that a picture can be drawn into a file; None: none is asked for.

    Raises:
        ConfigError: the file is neither `.png` nor `.svg`, its folder does not exist, or matplotlib is not installed.
    """
    if path is None:
        return
    _check_form(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent} to draw into. Make it, or give another name.")
    require_extra("matplotlib.figure")


@contextmanager
def picture_file(path: Path, title: str, *, size: tuple[float, float] = (5.4, 4.4)) -> Iterator[Any]:
    """Give an empty matplotlib figure of `size` inches; write it to `path`, atomically, when the body has drawn on it.

    Nothing of matplotlib's global state is changed.

    Raises:
        ConfigError: the file is neither `.png` nor `.svg`, or matplotlib is not installed. StorageError: it cannot be written.
    """
    _check_form(path)
    matplotlib = require_extra("matplotlib")
    # Not pyplot: it keeps figures and picks a window system.
    figures = require_extra("matplotlib.figure")
    buffer = io.BytesIO()
    with matplotlib.rc_context(_style(title)), warnings.catch_warnings():
        # The fonts here need not have every sign of a name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = figures.Figure(figsize=size, layout="constrained")
        figure.suptitle(plain(title), x=0.01, horizontalalignment="left", wrap=True)
        yield figure
        figure.savefig(buffer, format=path.suffix[1:], **_FORMATS[path.suffix])
    write_bytes_atomic(path, buffer.getvalue())


def _check_form(path: Path) -> None:
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{path.name!r} is no picture that can be drawn; give a name that ends in .png or .svg.")


def plain(text: str) -> str:
    """Return text that can be drawn: without lone surrogates and control characters, and short enough for a line or two."""
    drawable = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "?", text)
    return drawable if len(drawable) <= _LONGEST else f"{drawable[: _LONGEST - 1]}…"


def _style(title: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": plain(title),
        "text.parse_math": False,
        "text.color": INK,
        "font.size": 10.5,
        "figure.facecolor": PAPER,
        "figure.titlesize": 10.5,
        "savefig.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED,
        "axes.labelpad": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
