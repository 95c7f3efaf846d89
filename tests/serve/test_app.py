"""The routes of a served index: what they answer, and what they refuse."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import finetuned
import whence
from case_run import HOSTILE
from case_serve import answers_of, readable, working
from whence.errors import ConfigError, DataError, MismatchError, StorageError
from whence.report.run_scores import number
from whence.serve import app, guard
from whence.serve.answers import Answers, Question
from whence.serve.desk import WAITING, Desk, StoppedError

pytest.importorskip("starlette")
from starlette.testclient import TestClient

HOME = "http://127.0.0.1:8017"


def client_of(answers: Answers, desk: Desk, **options: Any) -> TestClient:
    return TestClient(app.make_app(answers, desk, **options), base_url=HOME)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, whence.Attributor]:
    return answers_of(readable(), tmp_path_factory.mktemp("run"))


@pytest.fixture
def client(made: tuple[Answers, whence.Attributor]) -> Iterator[TestClient]:
    with working() as desk:
        yield client_of(made[0], desk)


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    told = response.json()
    assert list(told) == ["error"]
    return str(told["error"])


# ----------------------------------------------------------------------------------------------- answers


def test_an_answer_has_the_scores_that_scores_have(client: TestClient, made: tuple[Answers, whence.Attributor]) -> None:
    answers, attributor = made
    found = answers.recipe
    assert found.ask is not None
    asked = [*found.queries, found.ask("a text")]
    scores = attributor.scores(asked, found.train)
    for place, body in enumerate([*({"query": query} for query in range(4)), {"text": "a text"}]):
        told = client.post("/api/query", json={**body, "k": 7}).json()
        for side, ranked in zip(told["sides"], (scores.top(place, 7), scores.bottom(place, 7)), strict=True):
            expected = [(row, value) for row, value in ranked if (value > 0) == (side is told["sides"][0]) and value != 0]
            assert [hit["row"] for hit in side] == [row for row, _ in expected]
            assert [hit["value"] for hit in side] == pytest.approx([value for _, value in expected], rel=1e-4)
            assert [hit["text"] for hit in side] == [f"sample number {row}" for row, _ in expected]
            assert all(hit["score"] == number(hit["value"]) and (hit["width"] >= 0) == (hit["value"] > 0) for hit in side)
            assert all(hit.get("flipped", False) == (hit["row"] == 3) for hit in side)
        assert told["exact"] is True
        assert max(abs(hit["width"]) for side in told["sides"] for hit in side) == 100
    assert client.post("/api/query", json={"query": 0, "exact": False}).json()["exact"] is False


def test_what_a_classifier_reads_is_told_with_its_probability(client: TestClient, made: tuple[Answers, whence.Attributor]) -> None:
    found = made[0].recipe
    assert found.ask is not None
    inputs, label, _ = found.ask("what is it")
    expected = found.model(inputs).softmax(-1).sort(descending=True).values.tolist()
    asked = client.post("/api/query", json={"text": "what is it"}).json()["asked"]
    assert asked["text"] == "what is it"
    assert asked["says"] == asked["label"] == f"{'yes' if label else 'no'} sample"
    assert [share for _, share, _ in asked["reading"]] == [f"{value:.1%}" for value in expected]


def test_the_own_queries_are_listed_in_parts(client: TestClient) -> None:
    told = client.get("/api/queries?first=2").json()
    assert told["count"] == 4
    assert [(query["query"], query["text"]) for query in told["queries"]] == [(2, "sample number 2"), (3, "sample number 3")]
    assert client.get("/api/queries?first=9").json()["queries"] == []
    assert "whole number" in error_of(client.get("/api/queries?first=-1"), 400)


def test_the_page_says_what_the_index_is_of(client: TestClient, made: tuple[Answers, whence.Attributor]) -> None:
    told = client.get("/api/index").json()
    facts = dict(told["facts"])
    assert facts["Training rows"] == "30"
    assert facts["Bytes per row"].startswith(f"{made[0].index.row_bytes:,.0f}, ")
    assert facts["Damping"] == "0.1 of each layer's mean eigenvalue"
    assert facts["Curvature"] == "EKFAC curvature"
    assert facts["Attributed"] == "44 parameters in 2 layers"
    assert (told["text"], told["generates"], told["tokens"], told["rescore"]) == (True, False, False, "5%")


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "either a text or the number"),
        ({"text": "a", "query": 1}, "either a text or the number"),
        ({"text": "  "}, "the text is empty"),
        ({"text": "a" * 20_001}, "20,001 characters; 20,000"),
        ({"text": 3}, "text is of the wrong type"),
        ({"query": True}, "query is of the wrong type"),
        ({"query": 4}, "there are 4 queries"),
        ({"query": -1}, "there are 4 queries"),
        ({"query": 0, "k": 0}, "1 to 100"),
        ({"query": 0, "k": 101}, "1 to 100"),
        ({"query": 0, "k": None}, "1 to 100"),
        ({"text": "a", "generate": True}, "generates nothing"),
        ({"query": 0, "generate": True}, "generate goes on with a text"),
        ({"query": 0, "rescore": 1}, "'rescore' is not known"),
    ],
)
def test_questions_that_cannot_be_asked(client: TestClient, body: dict[str, Any], text: str) -> None:
    assert text in error_of(client.post("/api/query", json=body), 400)


def test_tokens_that_are_not_there(client: TestClient) -> None:
    assert "no longer kept" in error_of(client.post("/api/tokens", json={"answer": 10**6, "row": 0}), 400)
    assert "row must be a whole number" in error_of(client.post("/api/tokens", json={"answer": 1}), 400)
    answer = client.post("/api/query", json={"query": 0}).json()["answer"]
    assert "what the tokens of a row are" in error_of(client.post("/api/tokens", json={"answer": answer, "row": 0}), 400)


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"", 400), (b"[1]", 400), (b"{", 400), (b"[" * 100_000, 400), (b'{"text": "\xff"}', 400), (b" " * (app.MOST_BYTES + 1), 413)],
)
def test_bodies_that_are_no_questions(client: TestClient, content: bytes, status: int) -> None:
    assert "the body" in error_of(client.post("/api/query", content=content, headers={"Content-Type": "application/json"}), status)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8017", "127.0.0.1.evil.example", "192.168.0.7", "", "a@127.0.0.1", "[::1"])
def test_other_names_of_this_machine_are_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/script.js", "/api/index", "/api/queries"):
        assert "none of this machine's" in error_of(client.get(path, headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:8017", "127.8.9.1"])
def test_loopback_by_any_name_and_port_is_taken(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_an_open_address_takes_addresses_but_no_foreign_names() -> None:
    assert guard.host_allowed("192.168.0.7:8017", "0.0.0.0")
    assert guard.host_allowed("box.example", "box.example")
    assert not guard.host_allowed("evil.example", "0.0.0.0")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8018"},
        {"Origin": "http://127.0.0.1:8017.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_pages_may_not_ask(client: TestClient, headers: dict[str, str]) -> None:
    for path in ("/api/query", "/api/tokens"):
        assert "another page" in error_of(client.post(path, json={"query": 0}, headers=headers), 403)
    for path in ("/api/index", "/api/queries?first=0"):
        assert "another page" in error_of(client.get(path, headers=headers), 403)
    assert client.get("/", headers=headers).status_code == 200, "a link to the page may be followed"
    assert client.post("/api/query", json={"query": 0}, headers={"Origin": HOME, "Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a_form_may_not_ask(client: TestClient, kind: str) -> None:
    body = json.dumps({"query": 0}).encode()
    assert "application/json" in error_of(client.post("/api/query", content=body, headers={"Content-Type": kind}), 415)


def test_questions_are_not_asked_by_get(client: TestClient) -> None:
    response = client.get("/api/query")
    assert error_of(response, 405) == "GET is not for this address."
    assert response.headers["allow"] == "POST"
    assert error_of(client.get("/api/nothing"), 404) == "there is nothing at this address."


def test_every_answer_keeps_the_browser_to_this_page(client: TestClient) -> None:
    refused = client.get("/", headers={"Host": "evil.example"})
    for response in (client.get("/"), client.get("/script.js"), client.get("/api/index"), client.get("/nothing"), refused):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_the_page_asks_for_nothing_from_elsewhere(client: TestClient) -> None:
    page, script, style = (client.get(path).text for path in ("/", "/script.js", "/style.css"))
    assert "<style" not in page
    assert "onclick" not in page
    for text in (page, style, script.replace("http://www.w3.org/2000/svg", "")):
        assert "http" not in text.replace("http-equiv", "")
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in script


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    answers, _ = answers_of(readable(HOSTILE.replace("/", "|")), tmp_path)
    with working() as desk:
        client = client_of(answers, desk)
        body, kind = json.dumps({"text": HOSTILE}), {"Content-Type": "application/json"}
        for response in (client.get("/api/index"), client.get("/api/queries"), client.post("/api/query", content=body, headers=kind)):
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            assert not set("<>&") & set(response.text)
        assert response.json()["asked"]["text"] == HOSTILE.replace("\ud800", "?")


def test_what_is_unexpected_is_told_to_the_terminal_alone(
    client: TestClient, made: tuple[Answers, whence.Attributor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(made[0].index, "query", fails)
    assert error_of(client.post("/api/query", json={"query": 0}), 500) == app.UNEXPECTED
    assert "a secret path" in caplog.text
    monkeypatch.undo()
    assert client.post("/api/query", json={"query": 0}).status_code == 200


def test_files_of_the_server_are_told_to_the_terminal_alone(
    client: TestClient, made: tuple[Answers, whence.Attributor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(error: Exception) -> Any:
        def query(*_: Any, **__: Any) -> None:
            raise error

        return query

    for kind in (StorageError, MismatchError):
        monkeypatch.setattr(made[0].index, "query", fails(kind("a secret path")))
        assert error_of(client.post("/api/query", json={"query": 0}), 500) == app.UNEXPECTED
    assert caplog.text.count("Error: a secret path") == 2
    monkeypatch.setattr(made[0].index, "query", fails(DataError("that text is of no use")))
    assert error_of(client.post("/api/query", json={"query": 0}), 400) == "that text is of no use"


def test_a_question_about_one_query_reads_no_others(made: tuple[Answers, whence.Attributor]) -> None:
    read: list[int] = []

    class Rows(list[Any]):
        def __getitem__(self, place: Any) -> Any:
            read.append(place)
            return super().__getitem__(place)

    found = readable()
    found.model, found.queries = made[0].recipe.model, Rows(found.queries)
    told = Answers(found, made[0].index).query(Question(query=1, exact=False))["asked"]
    assert set(read) == {1}
    assert (told["query"], told["text"]) == (1, "sample number 1")
    assert told["says"] == told["reading"][0][0]


def test_answers_of_another_server_are_not_known(made: tuple[Answers, whence.Attributor]) -> None:
    first, second = (Answers(made[0].recipe, made[0].index) for _ in range(2))
    told = [one.query(Question(query=0, exact=False))["answer"] for one in (first, second)]
    assert told[0] != told[1]
    with pytest.raises(ConfigError, match="no longer kept"):
        second.tokens(told[0], 0)


def test_rows_on_each_side_are_not_cut_down_silently(made: tuple[Answers, whence.Attributor]) -> None:
    with pytest.raises(ConfigError, match="k=500: rows on each side are 1 to 100"):
        Answers(made[0].recipe, made[0].index, k=500)


@pytest.mark.parametrize(
    ("given", "said", "shown"), [("a " * 800, "THE END", "…" + ("a " * 800)[-1500:]), ("Q:\n\n  A", "\n\nB", "Q:\n\n  A")]
)
def test_what_a_model_was_given_and_went_on_with_are_apart(
    made: tuple[Answers, whence.Attributor], given: str, said: str, shown: str
) -> None:
    found = readable()
    found.model = made[0].recipe.model
    found.generate = lambda text: {0: torch.ones(4), 1: 1, 2: text + said, "text": text + said, "continuation": said}
    asked = Answers(found, made[0].index).query(Question(text=given, generate=True, exact=False))["asked"]
    assert (asked["given"], asked["continuation"]) == (shown, said)


def test_too_many_questions_are_sent_away(made: tuple[Answers, whence.Attributor]) -> None:
    desk = Desk()

    async def many() -> None:
        waiting = [asyncio.ensure_future(desk.ask(lambda: 1)) for _ in range(WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(queue.Full):
            await desk.ask(lambda: 2)
        waiting.pop().cancel()
        await asyncio.sleep(0.05)
        waiting.append(asyncio.ensure_future(desk.ask(lambda: 3)))  # the place is free again
        await asyncio.sleep(0.05)
        response = await asyncio.to_thread(client_of(made[0], desk).post, "/api/query", json={"query": 0})
        assert "ask again" in error_of(response, 503)
        desk.close()
        assert all(isinstance(one, StoppedError) for one in await asyncio.gather(*waiting, return_exceptions=True))

    asyncio.run(many())


def test_answers_are_kept_for_a_while_only(made: tuple[Answers, whence.Attributor]) -> None:
    answers = made[0]
    first = answers.query(Question(query=0, exact=False))["answer"]
    for _ in range(40):
        answers.query(Question(query=0, exact=False, k=1))
    with pytest.raises(ConfigError, match="no longer kept"):
        answers.tokens(first, 0)


# ----------------------------------------------------------------------------------------------- a language model


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, whence.Attributor]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        finetuned.offline_and_quick(patch)
        found = finetuned.trained("wikitext", finetuned.write_data(folder / "data"), folder / "model", snapshots=0)
        return answers_of(found, folder / "run")


def test_tokens_of_both_sides_sum_to_the_score(language: tuple[Answers, whence.Attributor]) -> None:
    answers, attributor = language
    with working() as desk:
        client = client_of(answers, desk)
        told = client.post("/api/query", json={"text": "the film is good and the plot too", "k": 3}).json()
        hit = next(hit for side in told["sides"] for hit in side)
        marks = client.post("/api/tokens", json={"answer": told["answer"], "row": hit["row"]}).json()
    assert marks["score"] == hit["score"]
    assert answers.recipe.ask is not None
    asked = answers.recipe.ask("the film is good and the plot too")
    found = attributor.token_scores([asked], [answers.recipe.train[hit["row"]]])
    for name, parts in (("query", found.queries[0, 0]), ("row", found.rows[0, 0])):
        assert len(marks[name]["tokens"]) == len(marks[name]["heat"])
        heat = marks[name]["heat"]
        assert max(map(abs, heat)) == 9
        strongest = parts[: len(heat)].abs().argmax()
        assert heat[int(strongest)] == 9 * parts[strongest].sign()
    assert "".join(marks["query"]["tokens"]).strip() == told["asked"]["text"]


def test_only_what_the_model_goes_on_with_is_measured(language: tuple[Answers, whence.Attributor]) -> None:
    answers, _ = language
    recipe = answers.recipe
    assert recipe.generate is not None
    assert recipe.ask is not None
    assert recipe.collate is not None
    told = answers.query(Question(text="the film is", generate=True, k=2))
    asked = told["asked"]
    assert asked["text"] == f"the film is{asked['continuation']}"
    row, begun = recipe.generate("the film is"), len(recipe.ask("the film is")["input_ids"])
    assert row["input_ids"][begun:] == row["labels"][begun:]
    assert set(row["labels"][:begun]) == {-100}
    assert len(row["input_ids"]) <= 16, "the longest block that the model was trained on"
    with torch.no_grad():
        whole, prefix, measured = (
            float(recipe.task.measurement(recipe.model, recipe.collate([one])))
            for one in ({"input_ids": row["input_ids"]}, {"input_ids": row["input_ids"][:begun]}, row)
        )
    assert measured == pytest.approx(whole - prefix, rel=1e-4)
    with pytest.raises(whence.errors.DataError, match="0 tokens"):
        recipe.generate("")
