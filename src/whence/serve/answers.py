"""From a question to an index to what a page shows, as JSON."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from whence.errors import ConfigError
from whence.index.index import Index
from whence.recipes.base import Recipe
from whence.report.rows import RowSource, Shelf, class_name, classifier, shown_row, token_texts
from whence.report.run_scores import about, effect, number, shades

LONGEST, MOST_ROWS, MOST_TOKENS = 20_000, 100, 2_000
_PAGE, _KEPT, _CLASSES = 48, 32, 5
_LONGEST_GIVEN = 1500


def check_k(k: int) -> None:
    """Refuse a number of rows on each side that no answer has.

    Raises:
        ConfigError: it is not from 1 to 100.
    """
    if not 1 <= k <= MOST_ROWS:
        raise ConfigError(f"k={k}: rows on each side are 1 to {MOST_ROWS}.")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: a text, or one of the recipe's own queries by its number.

    Attributes:
        text: up to 20,000 characters.
        query: a number from 0.
        generate: let a language model go on with the text, and ask about what it says.
        k: rows on each side, 1 to 100.
        exact: score the best by the index exactly.

    Raises:
        ConfigError: a field cannot be used, or there is not one of text and query.
    """

    text: str | None = None
    query: int | None = None
    generate: bool = False
    k: int = 10
    exact: bool = True

    def __post_init__(self) -> None:
        kinds: dict[str, type] = {"text": str, "query": int, "generate": bool, "k": int, "exact": bool}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and type(value) is not kind:
                raise ConfigError(f"{name} is of the wrong type; give a value of type {kind.__name__}.")
        if (self.text is None) == (self.query is None):
            raise ConfigError("give either a text or the number of a query.")
        if self.text is not None and not self.text.strip():
            raise ConfigError("the text is empty. Type something.")
        if self.text is not None and len(self.text) > LONGEST:
            raise ConfigError(f"the text has {len(self.text):,} characters; {LONGEST:,} are taken at most.")
        if self.generate and self.query is not None:
            raise ConfigError("generate goes on with a text, and a query has been given. Give a text, or leave generate out.")
        check_k(self.k or 0)


class Answers:
    """What a page asks of an index. Not for two threads at a time.

    Args:
        recipe: whose rows were indexed.
        index: the index, opened with the recipe's training rows.
        rescore: share of the rows that is scored exactly where that is asked for, as of `Index.query`; 0: it is not offered.
        k: rows on each side by default, 1 to 100.

    Raises:
        ConfigError: k is not from 1 to 100.
    """

    def __init__(self, recipe: Recipe, index: Index, *, rescore: float = 0.05, k: int = 10) -> None:
        self.recipe, self.index, self.rescore, self.k = recipe, index, rescore, k
        check_k(k)
        self._source = RowSource.of_recipe(recipe)
        self._outputs = classifier(recipe)
        self._asked: OrderedDict[int, Any] = OrderedDict()
        self._own: dict[int, dict[str, Any]] = {}
        # A page that was open before a restart must not get another answer's tokens.
        self._count = secrets.randbelow(2**40)

    def about(self) -> dict[str, Any]:
        """Return what the index is of and what can be asked."""
        return {
            "name": self.recipe.name,
            "facts": self._facts(),
            "queries": len(self.recipe.queries),
            "pictures": self.recipe.picture is not None,
            "text": self.recipe.ask is not None,
            "generates": self.recipe.generate is not None,
            "longest": LONGEST,
            "classifier": self._outputs is not None,
            "k": self.k,
            "most": MOST_ROWS,
            "rescore": f"{self.rescore:.2%}".replace(".00%", "%") if self.rescore else None,
            "tokens": self.recipe.tokens is not None,
        }

    def _facts(self) -> list[list[str]]:
        settings, model = self.index.settings, self.recipe.model
        rows, size = settings["rows"], sum(parameter.numel() for parameter in model.parameters())
        tracked = sum(groups * outputs * inputs for groups, outputs, inputs in settings["layers"].values())
        damping = settings["spectrum"]["damping"]
        per = {"layer": "each layer's mean eigenvalue", "model": "the model's mean eigenvalue"}
        whole = f"{damping:g}" if not isinstance(damping, Mapping) else f"{damping['relative']:g} of {per[damping['scope']]}"
        facts = [
            ["Model", f"{type(model).__name__}, {size:,} parameters"],
            ["Index", "/".join(self.index.folder.parts[-3:])],  # the rest says whose machine it is
            ["Training rows", f"{len(self.index):,}"],
            ["Bytes per row", f"{self.index.row_bytes:,.0f}, {self.index.row_bytes / (4 * tracked):.1%} of the gradient in float32"],
            ["Kept of a row", f"{rows['projection']}, {rows['dtype']}"],
            ["Curvature", about(settings)],
            ["Damping", whole],
            ["Attributed", f"{tracked:,} parameters in {len(settings['layers']):,} layers"],
        ]
        response, fidelity = settings["spectrum"].get("response"), self.index.fidelity
        if response:
            facts.append(["Response", f"unrolled, a run of finite length {response['unrolled']['time']:g}"])
        return facts if fidelity is None else [*facts, ["Fidelity", str(fidelity)]]

    def queries(self, first: int) -> dict[str, Any]:
        """Return the recipe's own queries from number `first` on, some of them."""
        wanted = range(first, min(first + _PAGE, len(self.recipe.queries)))
        missing = [place for place in wanted if place not in self._own]
        shelf = Shelf(self._source)
        for place in missing:
            shelf.put("queries", place)
        shelf.ask_the_model()
        self._own |= shelf.rows["queries"]
        return {"queries": [{"query": place, **self._own[place]} for place in wanted], "count": len(self.recipe.queries)}

    def query(self, question: Question) -> dict[str, Any]:
        """Return the rows for and against, what was asked, and how long that took.

        Raises:
            ConfigError, DataError: the question cannot be asked. Others as of `Index.query`.
        """
        begun = time.perf_counter()
        row, shown = self._row(question)
        answer = self.index.query([row], k=question.k, rescore=self.rescore if question.exact else 0)
        sides = [[hit for hit in answer.top() if hit[1] > 0], [hit for hit in answer.bottom() if hit[1] < 0]]
        largest = max([abs(score) for side in sides for _, score in side], default=1.0)
        self._count += 1
        self._asked[self._count] = row
        while len(self._asked) > _KEPT:
            self._asked.popitem(last=False)
        shelf = Shelf(self._source)
        return {
            "answer": self._count,
            "asked": shown,
            "heads": _heads(shown),
            "effect": effect(self.index.settings),
            "sides": [[self._hit(shelf, example, score, largest) for example, score in side] for side in sides],
            "exact": answer.exact,
            "seconds": round(time.perf_counter() - begun, 3),
        }

    def tokens(self, answer: int, example: int) -> dict[str, Any]:
        """Return which tokens of a training row and of what was asked make their score: texts, and shades from -9 to 9.

        Raises:
            ConfigError: the answer is no longer kept, or tokens have no texts. Others as of `Index.explain`.
        """
        if answer not in self._asked:
            raise ConfigError("that answer is no longer kept; ask again.")
        if self.recipe.tokens is None:
            raise ConfigError(f"recipe {self.recipe.name} does not say what the tokens of a row are.")
        asked, trained = self._asked[answer], self.index.row(example)
        if trained is None:
            raise ConfigError(f"row {example} is not among the training rows at hand.")
        found = self.index.explain([asked], [example])
        parts = {"query": (asked, found.queries[0, 0]), "row": (trained, found.rows[0, 0])}
        told: dict[str, Any] = {"score": number(float(found.values[0, 0]))}
        for name, (row, values) in parts.items():
            texts = token_texts(self._source, row, MOST_TOKENS)
            told[name] = {"tokens": texts, "heat": (shades([values[: len(texts)]]) or [[]])[0]}
        return told

    def _row(self, question: Question) -> tuple[Any, dict[str, Any]]:
        """Return the row that is asked about, and what is shown of it."""
        if question.query is not None:
            if question.query >= len(self.recipe.queries) or question.query < 0:
                raise ConfigError(f"query {question.query}: there are {len(self.recipe.queries)} queries, numbered from 0.")
            row = self.recipe.queries[question.query]
            known = self._own.get(question.query) or Shelf(self._source).put("queries", question.query)
            return row, {"title": f"Query {question.query}", "query": question.query, **known, **self._reading(row)}
        make, verb = (self.recipe.generate, "generates nothing") if question.generate else (self.recipe.ask, "does not read texts")
        if make is None:
            raise ConfigError(f"recipe {self.recipe.name} {verb}; ask about one of its own queries.")
        # Tokenizers take no lone surrogates.
        row = make(str(question.text).encode("utf-8", "replace").decode("utf-8"))
        reading = self._reading(row)
        shown = shown_row(self._source, row, reading.get("says")) | reading
        shown["title"] = "The model went on" if question.generate else "Your text"
        if question.generate and isinstance(row, Mapping) and row.get("continuation"):
            shown |= _continued(str(row.get("text", question.text)), str(row["continuation"]))
        return row, shown

    def _reading(self, row: Any) -> dict[str, Any]:
        """Return the class that a classifier gives to a row, and the likeliest ones with their probability."""
        if self._outputs is None:
            return {}
        logits = self._outputs([row])[0].double()
        values, classes = torch.sort(logits.softmax(-1), descending=True, stable=True)
        named = [
            [class_name(self._source, number), f"{value:.1%}", round(100 * value)]
            for number, value in zip(classes.tolist()[:_CLASSES], values.tolist(), strict=False)
        ]
        return {"says": named[0][0], "reading": named}

    def _hit(self, shelf: Shelf, example: int, score: float, largest: float) -> dict[str, Any]:
        place = self.index.place(example)
        row = {} if place is None else shelf.put("train", place)
        return {"row": example, "score": number(score), "value": score, "width": round(100 * score / largest), **row}


def _heads(shown: dict[str, Any]) -> list[str]:
    label = shown.get("label")
    return ["For it", "Against it"] if label is None else [f"Towards “{label}”", f"Away from “{label}”"]


def _continued(whole: str, said: str) -> dict[str, str]:
    """Return what a model was given, its end if it is long, and what it went on with."""
    given = whole.removesuffix(said)
    return {"given": given if len(given) <= _LONGEST_GIVEN else f"…{given[-_LONGEST_GIVEN:]}", "continuation": said}
