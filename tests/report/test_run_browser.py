"""The page about a run folder in a real browser: what its script shows, and what it does not let run."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import case_run
from case_run import HOSTILE
from whence.report.run import run_report

pytest.importorskip("jinja2")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]


def dom(page: Path, fragment: str = "") -> str:
    """Return the document as it is after its script has run."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=3000",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", f"{page.as_uri()}{fragment}"], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


class Shape(HTMLParser):
    """The elements and words of a piece of a page, without the space between them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[object] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append((tag, sorted((name.lower(), value) for name, value in attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.parts.append(" ".join(data.split()))


def view_of(page: str) -> str:
    found = re.search(r'<div id="view">(.*?)</div>\s*<noscript>', page, flags=re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = case_run.recipe()
    folder = case_run.run_of(found, tmp_path_factory.mktemp("runs") / "mine")
    out = folder.parent / "page.html"
    run_report(folder, out, recipe=found)
    return out


def test_the_script_shows_what_the_markup_shows(page: Path) -> None:
    live, written = dom(page), page.read_text(encoding="utf-8")
    assert '<html lang="en" class="live">' in live
    assert 'id="controls" class="controls" aria-label="What is shown">' in live, "the controls are there with a script only"
    assert Shape(view_of(live)).parts == Shape(view_of(written)).parts


def test_the_address_chooses_query_rows_and_order(page: Path) -> None:
    data = case_run.data_of(page.read_text(encoding="utf-8"))
    query = data["scores"][0]["queries"][2]
    label = next(row["label"] for row in data["rows"]["train"].values())
    live = dom(page, f"#query=2&label={label.replace(' ', '+')}&order=row")
    view = view_of(live)
    assert "sample number 2<" in view
    assert query["verdict"].split("(")[0] in view
    for side, hits in zip(view.split('class="side ')[1:], query["sides"], strict=True):
        found = re.findall(r'<li class="[^"]*" data-place="\d+" data-row="(\d+)" data-label="([^"]*)"( hidden="")?>', side)
        assert [int(row) for row, _, _ in found] == sorted(hit["row"] for hit in hits)
        assert all(bool(hidden) == (other != label) for _, other, hidden in found)
    assert re.search(r'id="count" role="status">\d+ of \d+ rows shown<', live)
    nothing = dom(page, "#query=99&text=no+such+word")
    assert "sample number 0<" in view_of(nothing), "a query that is not there is the first"
    assert re.search(r">0 of \d+ rows shown<", nothing)


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    found = case_run.recipe(HOSTILE.replace("/", "|"))
    folder = case_run.run_of(found, tmp_path / "run")
    run_report(folder, tmp_path / "page.html", recipe=found, notice=HOSTILE)
    for fragment in ("", "#query=1&text=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E"):
        live = dom(tmp_path / "page.html", fragment)
        assert "<title>What made mine say this</title>" in live
        assert "<img" not in live
        assert live.count("<script") == 2
        assert "onerror=" in view_of(live)
