"""The served page in a real browser: typing, reading, opening a row, filtering, and text that means mischief."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import finetuned
from browser import CHROMIUM, Browser
from case_run import HOSTILE
from case_serve import answers_of, readable, served

pytest.importorskip("uvicorn")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")]

READY = "document.readyState == 'complete' && !document.getElementById('ask').hidden"
ANSWERED = "document.getElementById('status').textContent.startsWith('Answered in ')"
ROWS = "[...document.querySelectorAll('#view .hit')].filter((item) => !item.hidden).map((item) => Number(item.dataset.row))"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile", width=390, height=844) as found:
        yield found


def test_a_text_is_typed_and_its_answer_filtered(browser: Browser, tmp_path: Path) -> None:
    answers, _ = answers_of(readable(), tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until(READY)
        browser.type("#text", "what is it")
        browser.press("Enter", 13, control=True)
        browser.until(ANSWERED)
        assert "what is it" in browser.run("document.querySelector('.ask .text').textContent")
        assert "from 30 rows. Scores are exact" in browser.run("document.getElementById('status').textContent")
        rows = browser.run(ROWS)
        assert len(rows) == len(browser.run("[...document.querySelectorAll('#view .score')].map((one) => one.textContent)"))
        browser.type("#filter", f"number {rows[2]}")
        wanted = [row for row in rows if f"number {row}".startswith(f"number {rows[2]}")]
        assert browser.until(ROWS) == wanted
        assert browser.run("document.getElementById('count').textContent") == f"{len(wanted)} of {len(rows)} rows shown"
        assert browser.run("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"
        assert browser.complaints() == []
        assert {address.split("?")[0] for address in browser.requested()} <= {
            f"{url}{path}" for path in ("", "style.css", "script.js", "api/index", "api/query", "api/queries")
        } | {"data:,"}


def test_an_own_query_is_chosen_with_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    found = readable()
    found.ask = None
    answers, _ = answers_of(found, tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until("document.querySelectorAll('#queries button').length == 4 && !document.querySelector('.waiting')")
        assert browser.run("document.getElementById('text').hidden && document.getElementById('go').hidden")
        browser.run("document.querySelector('#queries li:nth-child(3) button').focus()")
        browser.press("Enter", 13, text="\r")
        browser.until(ANSWERED)
        assert browser.run("document.querySelector('.ask strong').textContent") == "Query 2"
        assert browser.run("document.activeElement.id") == "own-title", "the keyboard goes on from where it was"
        assert browser.run("document.querySelector('#queries button[aria-pressed=true]').dataset.query") == "2"


def test_an_error_is_one_message_on_the_page(browser: Browser, tmp_path: Path) -> None:
    answers, _ = answers_of(readable(), tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until(READY)
        browser.run("document.getElementById('text').removeAttribute('maxlength')")
        browser.type("#text", "a" * 20_001)
        browser.click("#go")
        browser.until("!document.getElementById('error').hidden")
        assert "20,000 are taken at most" in browser.run("document.getElementById('error').textContent")
        assert browser.run("document.getElementById('answer').hidden")
    browser.click("#go")
    assert "does not answer" in browser.until("document.getElementById('error').textContent.includes('Does it') && document.body.innerText")


def test_an_answer_that_is_no_json_is_told_by_its_status(browser: Browser, tmp_path: Path) -> None:
    answers, _ = answers_of(readable(), tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until(READY)
        browser.run("window.fetch = async () => new Response('Service Unavailable', {status: 503})")
        browser.type("#text", "what is it")
        browser.click("#go")
        browser.until("!document.getElementById('error').hidden")
        assert browser.run("document.getElementById('error').textContent").startswith("whence serve answers with 503 and no reason.")


def test_hostile_text_is_shown_and_does_nothing(browser: Browser, tmp_path: Path) -> None:
    answers, _ = answers_of(readable(HOSTILE.replace("/", "|")), tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until(READY)
        browser.type("#text", HOSTILE.replace("\ud800", ""))
        browser.click("#go")
        browser.until(ANSWERED)
        browser.run("document.getElementById('own').open = true")
        browser.until("document.querySelectorAll('#queries button').length == 4")
        assert "onerror=" in browser.run("document.querySelector('.ask .text').textContent")
        assert "onerror=" in browser.run("document.querySelector('#view .hit').textContent")
        assert browser.run("document.querySelectorAll('main img, main script, iframe').length") == 0
        assert browser.run("document.scripts.length") == 1
        assert browser.run("document.title") == "What made mine say this?"
        assert browser.complaints() == []
        # What the policy is for: a script that came in after all would not run.
        browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = \"hit\"'}))")
        assert browser.run("document.title") == "What made mine say this?"
        assert any("Content Security Policy" in text for text in browser.complaints())


def test_tokens_are_marked_on_both_sides(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    finetuned.offline_and_quick(monkeypatch)
    found = finetuned.trained("wikitext", finetuned.write_data(tmp_path / "data"), tmp_path / "model", snapshots=0)
    answers, _ = answers_of(found, tmp_path / "run")
    with served(answers) as url:
        browser.open(url)
        browser.until(READY)
        browser.type("#text", "the film is")
        browser.click("#go-on")
        browser.until(ANSWERED)
        assert "Only what it went on with is measured" in browser.run("document.querySelector('.verdict').textContent")
        assert browser.run("document.querySelector('.ask .given').textContent") == "the film is"
        row = browser.run(ROWS)[0]
        browser.click("#view .mark-tokens")
        browser.until(f"document.getElementById('status').textContent.startsWith('Tokens marked: row {row},')")
        marked = "document.querySelectorAll('{} [class^=p], {} [class^=n]').length"
        for place in ("#view .hit.marked .text", "#asked .text"):
            assert browser.run(marked.replace("{}", place)) > 0
        assert browser.run("document.querySelectorAll('#view .hit:not(.marked) .text span').length") == 0
        browser.click("#view .mark-tokens")
        browser.until("document.getElementById('status').textContent == 'Marks removed.'")
        assert browser.run("document.querySelectorAll('#view .text span').length") == 0
        assert browser.complaints() == []
