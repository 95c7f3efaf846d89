"""One self-contained HTML page about a run: what it is made of, and how it is written.

A page is a headline, some key figures and sections; each kind of section is a dataclass here and a macro of the same
name in `templates/sections.html`. All text is escaped. The page has no script, asks for nothing from any network (a
content security policy holds a browser to that) and follows the reader's light or dark colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from whence.errors import ConfigError
from whence.runtime.packages import need
from whence.storage.run import write_bytes_atomic


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is part of the page: a `data:image/` URI, what it shows, and whether it is ink on paper."""

    source: str
    alt: str
    ink: bool = False

    def __post_init__(self) -> None:
        if not self.source.startswith("data:image/"):
            raise ConfigError(f"a picture's source is {self.source[:60]!r}; a page is one file, so give a data:image/... URI.")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row of a data set as a reader meets it: a picture or a text, its label, and what is known about it.

    Attributes:
        label: in words, such as `"labelled 3"`.
        picture, text: the row itself; either may be missing.
        likely: the label it probably should have, if that is another one.
        rank: its place in a ranking, from 1.
        score: as text, with its sign.
        mark: what sets it apart, such as `"flipped"`; shown in the accent colour.
        note: a quieter remark.
    """

    label: str
    picture: Picture | None = None
    text: str | None = None
    likely: str | None = None
    rank: int | None = None
    score: str | None = None
    mark: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number and what it counts."""

    value: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Strips:
    """Rows in several orders, from first to last, with some of them marked: `(name, drawing)` by `plots.strip`."""

    caption: str
    strips: Sequence[tuple[str, str]]
    ticks: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page, with a heading, its entry in the page's index and a lead in plain words, by paragraphs."""

    kind: ClassVar[str]
    title: str
    short: str
    lead: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Gallery(Section):
    """Ranked examples; those in `more` are folded away under `more_label`."""

    kind: ClassVar[str] = "gallery"
    examples: Sequence[Example]
    more: Sequence[Example] = ()
    more_label: str = "More"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One query with the training rows that speak most strongly for it and against it."""

    query: Example
    proponents: Sequence[Example]
    opponents: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Cases(Section):
    """Queries with their proponents and opponents."""

    kind: ClassVar[str] = "cases"
    cases: Sequence[Case]
    proponents_label: str = "Proponents"
    opponents_label: str = "Opponents"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing made by `whence.report.plots`, with a caption."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose first column is text and whose others are right-aligned; the last row may be a total."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence(Section):
    """Charts side by side, and tables below them."""

    kind: ClassVar[str] = "evidence"
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Terms(Section):
    """Terms and what they mean; or settings and their values."""

    kind: ClassVar[str] = "terms"
    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        kicker: what kind of page this is, in a few words.
        title: what was found, as a headline.
        summary: the same in a few plain sentences, by paragraphs.
        strips: the finding at a glance.
        figures: the numbers to remember.
        footer: what made the page.
    """

    kicker: str
    title: str
    summary: Sequence[str]
    strips: Strips | None = None
    figures: Sequence[KeyFigure]
    sections: Sequence[Section]
    footer: str


def require_extra(name: str) -> ModuleType:
    """Import a module that the extra `report` brings.

    Raises:
        ConfigError: it is not installed.
    """
    return need(name, "a report needs", "report")


def render(page: Page) -> str:
    """Return the page as HTML.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    return str(templates().get_template("page.html").render(page=page, anchors=_anchors(page.sections)))


def templates() -> Any:
    """Return jinja2's environment of the templates here; everything they print is escaped.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    jinja2: Any = require_extra("jinja2")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Return an id for each section, of its short title; no two are the same."""
    anchors: list[str] = []
    for section in sections:
        base = anchor = re.sub(r"[^a-z0-9]+", "-", section.short.lower()).strip("-") or "section"
        number = 2
        while anchor in anchors:
            anchor, number = f"{base}-{number}", number + 1
        anchors.append(anchor)
    return anchors


def write_page(page: Page, path: Path) -> None:
    """Write the page so that `path` holds either its old or its new content, whenever the process is killed.

    Raises:
        ConfigError: jinja2 is not installed. StorageError: the file cannot be written.
    """
    content = render(page).encode("utf-8", "replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, content)
