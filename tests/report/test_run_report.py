"""The page about a run folder: what stands on it, and that no text of the data can run there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import case_run
import whence
from case_run import HOSTILE, Elements, data_of
from whence.errors import ConfigError
from whence.report.alike import alike_groups
from whence.report.noise import noise_level
from whence.report.run import run_report
from whence.report.run_scores import Shown, histogram, number
from whence.storage.run import RunFolder

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, whence.Recipe]:
    found = case_run.recipe()
    return case_run.run_of(found, tmp_path_factory.mktemp("runs") / "mine"), found


def page_of(folder: Path, out: Path, **options: Any) -> str:
    run_report(folder, out, **options)
    return out.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- content


def test_the_first_query_stands_there_without_a_script(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    page = page_of(folder, tmp_path / "page.html", recipe=found)
    scores = whence.Scores.load(folder / "scores" / "kfac")
    view = re.search(r'<div id="view">(.*?)<noscript>', page, flags=re.DOTALL)
    assert view
    assert "sample number 0" in view[1]
    ranked = [row for row, value in scores.top(0, 10) if value > 0] + [row for row, value in scores.bottom(0, 10) if value < 0]
    assert [int(row) for row in re.findall(r'data-row="(\d+)"', view[1])] == ranked
    for row in ranked:
        assert f"sample number {row}<" in view[1]
    assert view[1].count('<rect class="bin"') == 60
    assert "Share of each layer" in view[1]
    assert f"Scores of all {len(found.train)} rows" in view[1]


def test_every_query_is_embedded_with_its_strongest_rows(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    data = data_of(page_of(folder, tmp_path / "page.html", recipe=found, shown=Shown(k=3)))
    scores = whence.Scores.load(folder / "scores" / "kfac")
    (view,) = data["scores"]
    assert [query["row"] for query in view["queries"]] == list(range(len(found.queries)))
    for place, query in enumerate(view["queries"]):
        for side, ranked in zip(query["sides"], (scores.top(place, 3), scores.bottom(place, 3)), strict=True):
            assert [(hit["row"], hit["score"]) for hit in side] == [(row, number(value)) for row, value in ranked]
        assert {name for name, _, _ in query["layers"]} == {"first", "last"}
        row = data["rows"]["queries"][str(query["row"])]
        assert row["text"] == f"sample number {place}"
        assert query["heads"][0] == f"Towards “{row['label']}”"
    shown = {hit["row"] for query in view["queries"] for side in query["sides"] for hit in side}
    assert shown <= {int(row) for row in data["rows"]["train"]}
    assert data["rows"]["train"]["3"].get("flipped", True) is True


def test_what_the_model_says_is_what_it_says(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    data = data_of(page_of(folder, tmp_path / "page.html", recipe=found))
    with torch.no_grad():
        says = found.model(torch.stack([row[0] for row in found.queries])).argmax(1).tolist()
    named = found.model.config.id2label
    assert [row["says"] for row in data["rows"]["queries"].values()] == [named[number] for number in says]
    wrong = [place for place, (row, number) in enumerate(zip(found.queries, says, strict=True)) if row[1] != number]
    told = [query["row"] for query in data["scores"][0]["queries"] if "The model says" in query["verdict"]]
    assert told == wrong


def test_self_influence_coverage_stages_and_settings(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    page = page_of(folder, tmp_path / "page.html", recipe=found)
    assert "100.0% of the trained parameters are attributed." in page
    for text in (
        "Rows that pull hardest on themselves",
        "Of 1 labels made wrong on purpose",
        "KFAC curvature",
        "Pairwise scores",
        "damping",
    ):
        assert text in page, text
    stages = page.split("<caption>Stages</caption>")[1].split("</table>")[0]
    assert stages.count("Pairwise scores") == 1, "the records of one process are not added up"
    headings = [tag for tag, _ in Elements(page).tags if tag in ("h1", "h2", "h3", "main", "header", "footer", "nav")]
    assert headings.count("h1") == headings.count("main") == headings.count("nav") == 1


def test_rows_from_python_and_no_rows_at_all(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    page = page_of(folder, tmp_path / "a.html", train=found.train, queries=found.queries, describe=lambda row: f"told {row[2]}")
    assert "told sample number 0" in page
    numbers = page_of(folder, tmp_path / "b.html", notice="Rows are numbers.")
    assert "Rows are numbers." in numbers
    assert "sample number" not in numbers
    assert data_of(numbers)["scores"][0]["known"] is False
    assert re.findall(r'data-row="(\d+)"', numbers) == re.findall(r'data-row="(\d+)"', page)


def test_other_rows_than_were_scored_are_not_passed_off_as_them(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, _ = plain
    made = run_report(folder, tmp_path / "page.html", recipe=case_run.recipe("other"))
    page = made.path.read_text(encoding="utf-8")
    assert "other number" not in page
    assert any("made from other training rows than those at hand" in notice for notice in made.notices)


def test_chosen_queries_and_limits_are_told(tmp_path: Path) -> None:
    found = case_run.recipe(queries=12)
    folder = case_run.run_of(found, tmp_path / "mine")
    page = page_of(folder, tmp_path / "a.html", recipe=found, shown=Shown(most=5))
    assert len(data_of(page)["scores"][0]["queries"]) == 5
    assert "5 of 12 queries are on this page" in page
    page = page_of(folder, tmp_path / "b.html", recipe=found, shown=Shown(chosen=[7, 2]))
    assert [query["row"] for query in data_of(page)["scores"][0]["queries"]] == [7, 2]


def test_a_large_run_stays_a_small_page(tmp_path: Path) -> None:
    """Long texts and many queries: the page says what it leaves out instead of growing."""
    values = torch.randn(400, 20_000, generator=torch.Generator().manual_seed(0))
    whence.Scores(values=values).save(tmp_path / "run" / "scores" / "mine")
    train = [f"{place} " + "word " * 2000 for place in range(20_000)]
    made = run_report(tmp_path / "run", tmp_path / "page.html", train=train, queries=[f"query {place}" for place in range(400)])
    assert made.size < 12_000_000
    assert "of 400 queries are on this page" in made.path.read_text(encoding="utf-8")


def test_scores_by_token_mark_the_tokens(tmp_path: Path) -> None:
    values = torch.tensor([[3.0, -2.0]])
    tokens = torch.tensor([[[2.0, 0.0, 1.0], [-2.0, 0.0, 0.0]]])
    whence.Scores(values=values, per_token=tokens).save(tmp_path / "run" / "scores" / "mine")
    train = ["good old film", "bad film"]
    page = page_of(
        tmp_path / "run", tmp_path / "page.html", train=train, queries=["a film"], tokens=lambda text: re.findall(r"\s*\w+", text)
    )
    assert '<p class="text"><span class="p9">good</span> old<span class="p6"> film</span></p>' in page
    assert '<span class="n9">bad</span> film' in page


def test_evaluations_that_lie_in_the_folder_are_shown(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    (folder / "evaluations").mkdir(exist_ok=True)
    methods = {
        "kfac": {"lds": 0.5, "interval": [0.4, 0.6], "minus_first": None},
        HOSTILE: {"lds": 0.1, "interval": None, "minus_first": None},
    }
    kept = {"recipe": "mine", "subsets": 7, "repeats": 2, "queries": 4, "reliability": None, "ceiling": 0.9, "methods": methods}
    (folder / "evaluations" / "lds.json").write_text(json.dumps(kept), encoding="utf-8")
    (folder / "evaluations" / "odd.json").write_text('{"methods": 3}', encoding="utf-8")
    page = page_of(folder, tmp_path / "page.html", recipe=found)
    assert "Linear datamodeling score (lds): 7 subsets × 2 retrains, ceiling 0.900" in page
    assert "0.400 to 0.600" in page
    assert "(odd)" not in page
    (folder / "evaluations" / "lds.json").unlink()


def test_what_cannot_be_shown_is_told(plain: tuple[Path, whence.Recipe], tmp_path: Path) -> None:
    folder, found = plain
    with pytest.raises(ConfigError, match=r"nowhere is no run folder: there is neither run\.json nor scores\."):
        run_report(tmp_path / "nowhere", tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"give a recipe, or train, queries and describe"):
        run_report(folder, tmp_path / "page.html", recipe=found, train=found.train)
    with pytest.raises(ConfigError, match=r"query 9 was not scored; the scored ones are 0, 1, 2, 3\."):
        run_report(folder, tmp_path / "page.html", shown=Shown(chosen=[1, 9]))
    whence.Scores(values=torch.ones(2, 1), settings={"aggregate": "rows"}).save(tmp_path / "run" / "scores" / "sum")
    made = run_report(tmp_path / "run", tmp_path / "page.html")
    assert made.notices == ("Scores sum are left out: they are sums over training rows.",)
    summed = whence.Scores(values=torch.ones(1, 3), query_rows=[3, 5], settings={"aggregate": "queries"})
    summed.save(tmp_path / "summed" / "scores" / "sum")
    assert "The sum of all queries" in page_of(tmp_path / "summed", tmp_path / "page.html")
    odd = {"call": "fit", "stages": [3, {"name": "x"}], "coverage": {"left_out": []}}
    RunFolder(tmp_path / "bare").record(odd)
    assert "There are no scores by row in this run folder yet." in page_of(tmp_path / "bare", tmp_path / "page.html")


# ---------------------------------------------------------------------------------------------- safety


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page where every text is hostile: rows, labels, layers, folders, records, evaluations and notices."""
    found = case_run.recipe(HOSTILE.replace("/", "|"))
    text = HOSTILE
    found.describe = lambda row: f"{text} {row[2]}"
    folder = tmp_path_factory.mktemp("runs") / HOSTILE.replace("/", "|").encode("utf-8", "replace").decode()
    case_run.run_of(found, folder)
    RunFolder(folder).record({"call": text, "command": f"whence {text}", "stages": [{"name": text, "total_s": 1.0, "calls": 1}]})
    whence.Scores.load(folder / "scores" / "kfac").save(folder / "scores" / "<img src=x>")
    out = folder.parent / "page.html"
    run_report(folder, out, recipe=found, notice=text)
    return out.read_text(encoding="utf-8")


def test_no_text_becomes_markup(hostile: str) -> None:
    elements = Elements(hostile)
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert [tag for tag, _ in elements.tags].count("img") == 0
    for tag, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes, "the policy forbids it"
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), attributes
    assert "onerror" in " ".join(elements.inside["p"]), "it is shown as text"
    assert "{{ 7*7 }}" in " ".join(elements.inside["p"])


def test_data_is_json_without_a_way_out(hostile: str) -> None:
    block = re.search(r'id="data">(.*?)</script>', hostile, flags=re.DOTALL)
    assert block
    assert not set("<>&\u2028\u2029") & set(block[1])
    assert block[1].isascii()
    data = data_of(hostile)
    assert any("</script><img" in row["text"] for row in data["rows"]["train"].values())
    assert any("<img" in name for name, _, _ in data["scores"][0]["queries"][0]["layers"])


def test_the_policy_lets_nothing_else_run(hostile: str) -> None:
    elements = Elements(hostile)
    policy = next(
        found["content"] for tag, found in elements.tags if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": case_run.hash_of(elements.inside["style"][0]),
        "script-src": case_run.hash_of(elements.inside["script"][1]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    script = elements.inside["script"][1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(|XMLHttp|import\(", script)
    assert not re.search(r"url\(|@import", elements.inside["style"][0])


# --------------------------------------------------------------------------------------------- numbers


def test_noise_is_the_spread_of_the_bulk() -> None:
    bulk = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2 + 1
    outliers = torch.tensor([40.0, 30.0, -25.0])
    noise = noise_level(torch.cat([bulk, outliers]))
    assert noise is not None
    assert noise.center == pytest.approx(1, abs=0.1)
    assert noise.level == pytest.approx(2 * 4.42, rel=0.05), "4.42 deviations for 0.05 / (2 * 5003)"
    assert (noise.above, noise.below) == (2, 1)


@pytest.mark.parametrize(
    "scores", [torch.arange(10.0), torch.cat([torch.zeros(60), torch.ones(40)]), torch.cat([torch.randn(60) * 0.01, torch.ones(40)])]
)
def test_no_bulk_no_noise(scores: torch.Tensor) -> None:
    assert noise_level(scores) is None


def test_histogram_counts_every_row() -> None:
    drawn = histogram(torch.tensor([-1.0, 0.0, 0.0, 3.0]), None)
    assert (drawn["low"], drawn["high"], drawn["most"], drawn["zero"], drawn["noise"]) == ("-1.00", "+3.00", "2", 250, [])
    assert sorted(drawn["bars"])[-3:] == [63, 63, 100]
    assert histogram(torch.zeros(3), None)["zero"] == 500


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.5, "+0.500"), (-12.345, "-12.3"), (1234.5, "+1,234"), (1e-5, "+1.00e-05"), (9.999, "+10.00")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_alike_are_copies_and_near_copies() -> None:
    texts = [
        "The film is good, and the cast is too.",
        "the film is good and the cast is too",
        "the film is good and the cast is too long",
        "something else altogether, with no words in common",
        None,
        "short",
        "short",
    ]
    assert alike_groups(texts) == [[0, 1, 2]]
    many = [f"an opening that they all share number {place} and then an end of its own {place * 7}" for place in range(100)]
    assert alike_groups(many) == []


def test_a_table_for_notebooks() -> None:
    scores = whence.Scores(values=torch.tensor([[1.0, -2.0, 3.0]] * 7), settings={"strategy": HOSTILE})
    table = scores._repr_html_()
    Elements(table)
    assert "<img" not in table
    assert "2 (+3), 0 (+1), 1 (-2)" in table
    assert "and 2 more" in table
    assert "no rows to list" in whence.Scores(values=torch.ones(2, 1), settings={"aggregate": "rows"})._repr_html_()
