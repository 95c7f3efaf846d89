"""The page is one inert, self-contained file, whatever text it is given."""

from __future__ import annotations

import base64
import itertools
import re
import struct
import sys
import zlib
from html.parser import HTMLParser

import pytest
import torch

from whence.errors import ConfigError, DataError, StorageError
from whence.report import page as p
from whence.report.pictures import picture
from whence.report.plots import Curve, log_histogram, share_curves, strip

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}{% raw %} $\\frac$ &amp; \u202e"
VOID = {"meta", "img", "br", "link"}


class Parsed(HTMLParser):
    """Collects tags with their attributes, and fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def curve(name: str = "ours") -> Curve:
    share = torch.linspace(0, 1, 11)
    return Curve(name=name, x=share, y=share, style="main")


def example(text: str) -> p.Example:
    image = picture(torch.eye(4), alt=text, ink=True)
    return p.Example(label=text, picture=image, text=text, likely=text, rank=1, score=text, mark=text, note=text)


def full_page(text: str) -> p.Page:
    """Use every kind of section and every field, with `text` for all words."""
    svg = share_curves([curve(text)], x_label=text, y_label=text, description=text)
    one = example(text)
    table = p.Table(caption=text, columns=[text, text], rows=[[text, text]], total=True)
    head = {"title": text, "lead": [text]}
    return p.Page(
        kicker=text,
        title=text,
        summary=[text],
        strips=p.Strips(caption=text, strips=[(text, strip(torch.tensor([True, False]), description=text))], ticks=[0.1]),
        figures=[p.KeyFigure(value=text, label=text)],
        sections=[
            p.Gallery(**head, short=text, examples=[one], more=[one], more_label=text),
            p.Cases(
                **head,
                short="cases",
                cases=[p.Case(query=one, proponents=[one], opponents=[one])],
                proponents_label=text,
                opponents_label=text,
            ),
            p.Evidence(**head, short="evidence", charts=[p.Chart(title=text, svg=svg, caption=text)], tables=[table]),
            p.Terms(**head, short="terms", entries=[(text, text)]),
        ],
        footer=text,
    )


def test_hostile_text_is_inert_and_shown_as_it_is():
    harmless, hostile = Parsed(p.render(full_page("word"))), Parsed(p.render(full_page(HOSTILE)))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in hostile.tags] == [sorted(attributes) for _, attributes in harmless.tags]
    assert not any(tag == "script" or any(name.startswith("on") for name in attributes) for tag, attributes in hostile.tags)
    assert sum(HOSTILE in text for text in hostile.text) > 20


def test_text_that_is_no_unicode_can_be_written(tmp_path):
    p.write_page(full_page("lone \ud800 surrogate, \x00 and \x1b"), tmp_path / "report.html")
    assert "lone ? surrogate" in (tmp_path / "report.html").read_text()


def test_the_page_asks_for_nothing_from_outside():
    text = p.render(full_page("word"))
    for _, attributes in Parsed(text).tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), attributes
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "default-src 'none'" in text


def test_links_lead_to_sections_and_ids_of_sections_are_single():
    tags = Parsed(p.render(full_page("two words & more"))).tags
    ids = [attributes["id"] for tag, attributes in tags if tag in ("section", "h2")]
    links = {str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"}
    assert len(ids) == len(set(ids)) == 8
    assert links <= set(ids)


def test_the_page_can_be_read_without_seeing_it():
    tags = Parsed(p.render(full_page("word"))).tags
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "svg")
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels)), "a level of headings is left out"


def test_the_same_page_gives_the_same_bytes():
    assert p.render(full_page("word")) == p.render(full_page("word"))


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    p.write_page(full_page("old"), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(StorageError, match=r"report\.html"):
        p.write_page(full_page("new"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf'needs {name}, .*pip install "whence\[report\]"'):
        p.require_extra(name)


def test_pictures_are_pngs_of_their_pixels():
    source = picture(torch.tensor([[0.0, 1.0, 0.5]]), alt="three pixels").source
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (3, 1)
    length = struct.unpack(">I", data[33:37])[0]
    assert zlib.decompress(data[41 : 41 + length]) == bytes([0, 0, 255, 128])


def test_pictures_in_colour_and_as_ink():
    assert picture(torch.rand(3, 5, 4), alt="colour").source != picture(torch.rand(3, 5, 4), alt="colour").source
    assert picture(torch.zeros(2, 2), alt="paper", ink=True).source == picture(torch.ones(2, 2), alt="white").source


@pytest.mark.parametrize("image", [torch.rand(2, 5, 5), torch.rand(5), torch.full((2, 2), float("nan"))])
def test_pictures_that_cannot_be(image):
    with pytest.raises(DataError, match=r"cannot be shown. Give \[height, width\]"):
        picture(image, alt="nothing")


def test_a_picture_elsewhere_is_refused():
    with pytest.raises(ConfigError, match=r"a page is one file"):
        p.Picture(source="https://example.org/x.png", alt="elsewhere")


def test_neighbours_in_a_strip_are_one_shape():
    drawn = strip(torch.tensor([True, True, False, True]), description="rows")
    assert 'd="M0 0H2V1H0zM3 0H4V1H3z"' in drawn
    assert 'd=""' in strip(torch.zeros(3, dtype=torch.bool), description="none")


def test_charts_have_no_date_and_follow_the_colours_of_the_page():
    drawn = share_curves([curve()], x_label="x", y_label="y", description="d", guides=[0.5])
    assert "var(--accent)" in drawn
    assert not re.search(r"<metadata|<\?xml|DOCTYPE|xlink:|20\d\d-\d\d", drawn)


@pytest.mark.parametrize("values", [[], [3.0], [0.0, -1.0], [1e-30, 1e30], [1.0, 2.0, 2.0, 1000.0]])
def test_a_histogram_counts_every_positive_number(values):
    drawn = log_histogram([("right", torch.tensor(values)), ("wrong", torch.tensor(values))], x_label="x", y_label="y", description="d")
    assert drawn.startswith("<svg")
    assert drawn.endswith("</svg>")


def test_making_charts_changes_nothing_of_matplotlib():
    matplotlib = pytest.importorskip("matplotlib")
    keys = ("font.size", "svg.fonttype", "svg.hashsalt", "text.parse_math", "axes.grid")
    before = [matplotlib.rcParams[key] for key in keys]
    share_curves([curve()], x_label="x", y_label="y", description="d")
    assert [matplotlib.rcParams[key] for key in keys] == before


def test_labels_in_other_scripts_are_drawn_without_a_warning():
    assert "手書き" in share_curves([curve("手書き")], x_label="x", y_label="y", description="d")
