"""What the verb query can be asked, beside the recipe's own queries, and how it answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import whence
from commands import done, refused
from finetuned import Place, opened
from whence.cli import tokens
from whence.evaluate import embeddings
from whence.index.index import Index
from whence.scores.tokens import TokenScores

MINE = "recipe.py:tiny"
CLASSES = """

def classified():
    recipe = tiny()
    recipe.classes = torch.tensor([row[1] for row in recipe.train])
    recipe.query_classes = torch.tensor([row[1] for row in recipe.queries])
    recipe.raw = [{"source": "odd" if place % 2 else "even", "place": place, "list": [1]} for place in range(23)]
    recipe.ask = lambda text: (torch.tensor([float(part) for part in text.split(",")]), 1)
    return recipe
"""
CLASSIFIED = "recipe.py:classified"


@pytest.fixture
def indexed(run: Any, here: Path) -> Path:
    with (here / "recipe.py").open("a", encoding="utf-8") as file:
        file.write(CLASSES)
    done(run, "fit", CLASSIFIED)
    done(run, "index", CLASSIFIED, "--keep", "1", "--projection", "none", "--dtype", "float32")
    done(run, "score", CLASSIFIED)
    return here


def scores(here: Path) -> whence.Scores:
    return whence.Scores.load(here / "runs/tiny/scores/ekfac")


def asked(run: Any, *options: str, recipe: str = CLASSIFIED) -> list[dict[str, Any]]:
    return done(run, "query", recipe, *options, "--json").data["queries"]


def test_training_rows_can_be_asked_about(run: Any, indexed: Path) -> None:
    entries = asked(run, "--rows", "17,3", "--k", "2")
    assert [(entry["row"], entry["query"], entry["head"]) for entry in entries] == [
        (17, None, "training row 17"),
        (3, None, "training row 3"),
    ]
    assert all(entry["text"].startswith("class ") for entry in entries)
    assert entries[0]["proponents"][0]["train"] == 17, "a row has trained most on itself"
    assert done(run, "query", CLASSIFIED, "--rows", "17").out.startswith("training row 17: class")


def test_a_class_and_queries_together(run: Any, indexed: Path) -> None:
    found = scores(indexed)
    recipe_classes = [int(entry["text"][-1]) for entry in asked(run, "--query", "0,1,2,3,4,5,6")]
    ones = [place for place, label in enumerate(recipe_classes) if label == 0]
    entries = asked(run, "--class", "0", "--k", "3")
    assert [entry["query"] for entry in entries] == ones
    (entry,) = asked(run, "--class", "0", "--together", "--k", "3", "--rescore", "1")
    mean = found.values[ones].mean(0)
    assert [row["train"] for row in entry["proponents"]] == mean.argsort(descending=True)[:3].tolist()
    assert [row["score"] for row in entry["proponents"]] == pytest.approx(mean.sort(descending=True)[0][:3].tolist(), rel=1e-4)
    assert entry["agreement"]["queries"] == len(ones)
    assert -1 <= entry["agreement"]["correlation"] <= 1
    assert entry["together"] == [f"query {place}" for place in ones]
    told = done(run, "query", CLASSIFIED, "--query", "0,1", "--together").out
    assert told.startswith("2 queries together: query 0, query 1\n  mean correlation between them ")


def test_groups_are_by_label_column_or_cluster(run: Any, indexed: Path) -> None:
    found = scores(indexed).by_group([place % 2 for place in range(23)])
    (entry,) = asked(run, "--query", "2", "--by", "source", "--bottom")
    wanted = {"even": found.sums[2, 0].item(), "odd": found.sums[2, 1].item()}
    assert {one["group"]: one["sum"] for one in entry["largest"]} == pytest.approx(wanted, rel=1e-4)
    assert [one["group"] for one in entry["lowest"]] == [one["group"] for one in entry["largest"]][::-1]
    (entry,) = asked(run, "--query", "0,1", "--by", "label", "--together")
    assert {one["group"] for one in entry["largest"]} == {"0", "1"}
    (entry,) = asked(run, "--by", "cluster:3")
    assert sum(one["rows"] for one in entry["largest"]) == 23
    assert {one["text"] for one in entry["largest"]} <= {"class 0", "class 1"}
    told = done(run, "query", CLASSIFIED, "--by", "source").out
    assert told.startswith("query 0: class")
    assert "largest sums" in told


def test_texts_of_a_file_are_asked_about(run: Any, indexed: Path) -> None:
    (indexed / "queries.jsonl").write_text('{"text": "1,2,3,4"}\n\n{"text": "0,-1,0,1"}\n', encoding="utf-8")
    entries = asked(run, "--file", "queries.jsonl", "--k", "1")
    assert [(entry["line"], entry["head"]) for entry in entries] == [(1, "line 1"), (3, "line 3")]
    assert entries == [
        {**entry, "head": mine["head"], "line": mine["line"]}
        for entry, mine in zip(asked(run, "--text", "1,2,3,4", "--text", "0,-1,0,1", "--k", "1"), entries, strict=True)
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "1,2,3,4"}\n{"text": ', "queries.jsonl, line 2 is not valid JSON"),
        ('{"text": "1,2,3,4"}\n["1,2"]', "queries.jsonl, line 2 holds '[\"1,2\"]'; write one object per line"),
        ("[" * 200_000, "queries.jsonl, line 1 is not valid JSON"),
        ("\n", "queries.jsonl has no lines"),
        ('{"text": 3}', "queries.jsonl, line 1: the column 'text' holds 3; give a text."),
        ('{"other": 3}', "queries.jsonl, line 1: recipe tiny does not say how a raw row becomes a row"),
    ],
)
def test_files_that_cannot_be_asked_about(run: Any, indexed: Path, content: str, message: str) -> None:
    (indexed / "queries.jsonl").write_text(content, encoding="utf-8")
    assert message in refused(run, "query", CLASSIFIED, "--file", "queries.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "23"], "--rows 23: there are 23 training rows, numbered from 0"),
        (["--class", "7"], "--class 7: there is no query of that class; the queries are of the classes 0, 1."),
        (["--class", "good"], "there is no query of that class"),
        (
            ["--by", "author"],
            "the training rows of recipe tiny have no such column; choose label, source, place, list, cluster:20.",
        ),
        (["--by", "cluster:24"], "--by cluster:24: there are 23 training rows"),
        (["--tokens"], "no layer's positions are the tokens"),
    ],
)
def test_questions_without_an_answer(run: Any, indexed: Path, arguments: list[str], message: str) -> None:
    assert message in refused(run, "query", CLASSIFIED, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "1", "--class", "1"], "--rows and --class were both given"),
        (["--file", "none.jsonl"], "--file none.jsonl: there is no such file"),
        (["--file", "."], "--file .: it is a folder. Give a file of JSON lines"),
        (["--by", "label", "--rescore", "1"], "--rescore 1.0: --by adds up the index's own scores of all rows; leave one out."),
        (["--by", "label", "--nprobe", "2"], "--nprobe 2: --by adds up"),
        (["--nprobe", "2", "--together"], "--nprobe 2: --together takes the scores of all rows"),
        (["--batch-size", "4"], "--batch-size 4: query chooses its batches by itself; leave it out."),
        (["--by", "cluster:1"], "--by cluster:1: give the number of clusters, 2 or more"),
        (["--by", "label", "--tokens"], "leave one out"),
    ],
)
def test_what_can_be_known_without_the_model_is_said_before_it_is_opened(run: Any, arguments: list[str], message: str) -> None:
    assert message in refused(run, "query", "recipe.py:interrupted", *arguments)


def test_too_many_clusters_are_refused_ahead_of_the_embeddings(run: Any, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*arguments: Any, **options: Any) -> None:
        raise AssertionError("all rows went through the model")

    monkeypatch.setattr(embeddings, "embeddings", computed)
    assert "--by cluster:24: there are 23 training rows; give no more" in refused(run, "query", CLASSIFIED, "--by", "cluster:24")


def test_own_scores_may_be_asked_for_by_group(run: Any, indexed: Path) -> None:
    assert asked(run, "--by", "source", "--rescore", "0") == asked(run, "--by", "source")


def test_tokens_of_many_queries_are_marked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    parts = torch.randn(2, 5, 7, 4, generator=torch.Generator().manual_seed(1))
    calls = []

    class Explained:
        def explain(self, rows: list[int], ids: list[int]) -> TokenScores:
            calls.append((rows, ids))
            some = [tensor[rows][:, ids] for tensor in (values, *parts)]
            return TokenScores(**dict(zip(("values", "rows", "queries"), some, strict=True)))

        def row(self, example: int) -> int:
            return example

    found = SimpleNamespace(tokens=None)
    entries: list[dict[str, Any]] = [{"proponents": [{"train": query}, {"train": query + 2}]} for query in range(5)]
    monkeypatch.setattr(tokens, "QUERIES", 2)
    tokens.mark_tokens(found, Explained(), list(range(5)), entries, together=False)  # type: ignore[arg-type]
    assert calls == [([0, 1], [0, 2, 1, 3]), ([2, 3], [2, 4, 3, 5]), ([4], [4, 6])]
    whole = TokenScores(values=values, rows=parts[0], queries=parts[1])
    for query, entry in enumerate(entries):
        for row in entry["proponents"]:
            for side, name in (("train", "rows"), ("query", "queries")):
                wanted = whole.strongest(query, row["train"], side=name)  # type: ignore[arg-type]
                assert [(one["token"], one["part"]) for one in row["tokens"][side]] == wanted


def test_a_recipe_without_classes_has_none_to_ask_about(run: Any) -> None:
    done(run, "fit", MINE)
    done(run, "index", MINE, "--keep", "1")
    assert "the queries of recipe tiny have no classes" in refused(run, "query", MINE, "--class", "1")
    assert "choose cluster:20." in refused(run, "query", MINE, "--by", "label")


@pytest.mark.usefixtures("offline_and_quick")
@pytest.mark.parametrize("name", ["sst2", "wikitext"])
def test_tokens_are_marked_on_both_sides(run: Any, place: Place, name: str) -> None:
    pytest.importorskip("transformers")
    made = done(run, "index", *place.options(name), "--json").data
    options = ["--text", "the film is good and the plot too", "--tokens", "--k", "2", "--bottom"]
    (entry,) = done(run, "query", *place.options(name), *options, "--json").data["queries"]
    recipe = opened(name, place.models / name)
    attributor = whence.Attributor(recipe.model, recipe.task, run_dir=Path(made["index"]).parents[1], collate=recipe.collate, device="cpu")
    index = Index(attributor, made["index"], train=recipe.train)
    assert recipe.ask is not None
    assert recipe.tokens is not None
    row = recipe.ask("the film is good and the plot too")
    listed = [*entry["proponents"], *entry["opponents"]]
    right = index.explain([row], [one["train"] for one in listed])
    for number, one in enumerate(listed):
        for side, key, texts in (("train", "rows", recipe.tokens(recipe.train[one["train"]])), ("query", "queries", recipe.tokens(row))):
            strongest = right.strongest(0, number, side=key)  # type: ignore[arg-type]
            assert [token["token"] for token in one["tokens"][side]] == [token for token, _ in strongest]
            assert [token["part"] for token in one["tokens"][side]] == pytest.approx([part for _, part in strongest], rel=1e-4)
            assert [token["text"] for token in one["tokens"][side]] == [texts[token].strip() for token, _ in strongest]
    told = done(run, "query", *place.options(name), *options).out
    assert told.count("because of: ") == told.count(" | in the query: ") == 4
    (entry,) = done(run, "query", *place.options(name), "--query", "0,1", "--together", "--tokens", "--json").data["queries"]
    assert set(entry["proponents"][0]["tokens"]) == {"train"}


@pytest.mark.usefixtures("offline_and_quick")
def test_rows_of_a_file_have_the_columns_of_the_data(run: Any, place: Place, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = place.options("sst2")
    done(run, "index", *options)
    rows = [{"sentence": "the film is good", "label": 0}, {"sentence": "the film is good"}, {"text": "the film is good"}]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    entries = done(run, "query", *options, "--file", tmp_path / "queries.jsonl", "--json").data["queries"]
    assert "label: 0" in entries[0]["text"]
    assert entries[1]["text"] == entries[2]["text"]
    wrong = {
        '{"words": "good"}': "line 2: the row has no 'sentence'; it has words. Give sentence, and label",
        '{"sentence": "good", "label": 5}': "line 2: the row has the label 5; the model's 2 classes are 0 to 1",
    }
    for line, message in wrong.items():
        (tmp_path / "queries.jsonl").write_text(f'{{"text": "good"}}\n{line}', encoding="utf-8")
        assert message in refused(run, "query", *options, "--file", tmp_path / "queries.jsonl")


@pytest.mark.usefixtures("offline_and_quick")
def test_rows_of_several_texts_may_come_from_a_file(run: Any, place: Place, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done(run, "index", *place.options("swag"))
    raw = {
        "sent1": "See the film.",
        "sent2": "It",
        **{f"ending{number}": f"is {word}" for number, word in enumerate(("good", "bad", "fine", "dull"))},
    }
    for label in ({"label": 2}, {}):
        (tmp_path / "queries.jsonl").write_text(json.dumps({**raw, **label}), encoding="utf-8")
        (entry,) = done(run, "query", *place.options("swag"), "--file", tmp_path / "queries.jsonl", "--json").data["queries"]
        assert "See the film." in entry["text"]
    (tmp_path / "queries.jsonl").write_text('{"sent2": "It", "label": 1}', encoding="utf-8")
    assert "line 1: the row has the columns sent2, label" in refused(
        run, "query", *place.options("swag"), "--file", tmp_path / "queries.jsonl"
    )


@pytest.mark.usefixtures("offline_and_quick")
def test_classes_are_named_as_the_model_names_them(run: Any, place: Place) -> None:
    pytest.importorskip("transformers")
    options = place.options("sst2")
    done(run, "index", *options)
    (by_name,) = done(run, "query", *options, "--class", "positive", "--together", "--json").data["queries"]
    (by_number,) = done(run, "query", *options, "--class", "1", "--together", "--json").data["queries"]
    assert by_name["together"] == by_number["together"]
    groups = done(run, "query", *options, "--by", "label", "--json").data["queries"][0]["largest"]
    assert {one["group"] for one in groups} == {"negative", "positive"}, "though the data have a column label"
