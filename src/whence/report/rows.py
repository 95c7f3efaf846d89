"""Rows as a page shows them: text, label, picture and tokens, from wherever the rows are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from whence.evaluate.embeddings import only_looking
from whence.recipes.base import Recipe, class_names
from whence.report.pictures import picture
from whence.runtime.batches import to_device
from whence.tasks import Classification, MultipleChoice, SequenceClassification

Side = Literal["train", "queries"]
LONGEST_TEXT, MOST_TOKENS = 1500, 160
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Where rows are, and how they are shown; what is None is left out.

    Attributes:
        train, queries: rows with `__len__` and `__getitem__`.
        describe: text about a row.
        tokens: text of each token of a row.
        picture: image of a row, as `whence.report.pictures.picture` takes it.
        classes, query_classes: class of every row.
        names: of the classes.
        flipped: which training labels were made wrong on purpose.
        read: the classes that the model itself gives to rows.
    """

    train: Any = None
    queries: Any = None
    describe: Callable[[Any], str] | None = None
    tokens: Callable[[Any], Sequence[str]] | None = None
    picture: Callable[[Any], Tensor] | None = None
    classes: Tensor | None = None
    query_classes: Tensor | None = None
    names: Mapping[int, str] | None = None
    flipped: Tensor | None = None
    read: Callable[[list[Any]], list[int]] | None = None

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> RowSource:
        """Return the rows of a recipe."""
        return cls(
            train=recipe.train,
            queries=recipe.queries,
            describe=recipe.describe,
            tokens=recipe.tokens,
            picture=recipe.picture,
            classes=recipe.classes,
            query_classes=recipe.query_classes,
            names=class_names(recipe),
            flipped=recipe.flipped,
            read=_reader(recipe),
        )


def _reader(recipe: Recipe) -> Callable[[list[Any]], list[int]] | None:
    """Return what asks a classifier for the classes of rows; None for other models."""
    outputs = classifier(recipe)
    return None if outputs is None else lambda rows: outputs(rows).argmax(-1).tolist()


def classifier(recipe: Recipe) -> Callable[[list[Any]], Tensor] | None:
    """Return what gives a classifier's logits of rows, `[row, class]` on the CPU; None for other models."""
    task = recipe.task
    if recipe.classes is None or not isinstance(task, Classification | SequenceClassification | MultipleChoice):
        return None
    collate = recipe.collate or torch.utils.data.default_collate

    def outputs(rows: list[Any]) -> Tensor:
        found: list[Tensor] = []
        device = next(recipe.model.parameters()).device  # now: an attributor may have moved the model
        with only_looking(recipe.model, device):
            for start in range(0, len(rows), _BATCH):
                batch = to_device(collate(rows[start : start + _BATCH]), device)
                found.append(task.output(recipe.model, batch).cpu())
        return torch.cat(found)

    return outputs


class Shelf:
    """The rows that a page shows, each once, as JSON.

    A row is `{"text", "cut", "label", "flipped", "says", "picture", "tokens"}`, of which only what there is is given.
    """

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.rows: dict[Side, dict[int, dict[str, Any]]] = {"train": {}, "queries": {}}
        self.size = 0

    def put(self, side: Side, index: int, *, tokens: bool = False) -> dict[str, Any]:
        """Return a row, taking it in if it is new; `tokens`: with its tokens."""
        shown, rows = self.rows[side], getattr(self.source, side)
        if index not in shown:
            shown[index] = {} if rows is None else self._told(side, index, rows[index])
            self.size += sum(len(str(value)) + 12 for value in shown[index].values())
        row = shown[index]
        if tokens and rows is not None and self.source.tokens is not None and "tokens" not in row:
            found = token_texts(self.source, rows[index])
            if found:  # rows of several sequences have no one list of tokens
                row["tokens"] = found
                self.size += sum(len(token) + 3 for token in found)
        return row

    def ask_the_model(self) -> bool:
        """Add what the model itself says of the rows taken in so far; whether it can be asked."""
        read = self.source.read
        if read is None:
            return False
        for side, shown in self.rows.items():
            rows = getattr(self.source, side)
            missing = [index for index, row in shown.items() if rows is not None and "says" not in row]
            for index, number in zip(missing, read([rows[index] for index in missing]) if missing else [], strict=True):
                shown[index]["says"] = class_name(self.source, number)
        return True

    def _told(self, side: Side, index: int, row: Any) -> dict[str, Any]:
        source = self.source
        classes = source.classes if side == "train" else source.query_classes
        told = shown_row(source, row, None if classes is None else class_name(source, int(classes[index])))
        if side == "train" and source.flipped is not None and bool(source.flipped[index]):
            told["flipped"] = True
        return told


def shown_row(source: RowSource, row: Any, label: str | None = None) -> dict[str, Any]:
    """Return what a page shows of a row, whether it is of a data set or not: `"text"`, `"cut"`, `"label"`, `"picture"`."""
    told: dict[str, Any] = {} if label is None else {"label": label}
    if source.picture is not None:
        told["picture"] = picture(source.picture(row), alt="", ink=True).source
    text = re.sub(r"\s*\n", "\n", _text(source, row, label) or "")
    if text:
        told["text"] = text[:LONGEST_TEXT]
        if len(text) > LONGEST_TEXT:
            told["cut"] = True
    return told


def class_name(source: RowSource, number: int) -> str:
    """Return the name of a class, else its number."""
    return (source.names or {}).get(number, str(number))


def token_texts(source: RowSource, row: Any, most: int = MOST_TOKENS) -> list[str]:
    """Return the text of a row's first tokens, without empty lines; none if tokens have no texts."""
    return [] if source.tokens is None else _without_empty_lines([str(token) for token in source.tokens(row)][:most])


def _text(source: RowSource, row: Any, label: str | None) -> str | None:
    if source.describe is None:
        found = row.get("text") if isinstance(row, Mapping) else row
        return found if isinstance(found, str) else None
    text = str(source.describe(row)).strip()
    return text if label is None else _without_label(text, label)


def _without_empty_lines(tokens: list[str]) -> list[str]:
    """Return tokens of which none starts a new line on an empty one; their number stays."""
    kept, empty = [], True
    for token in tokens:
        token = re.sub(r"\s*\n", "\n", token)
        token = token.lstrip("\n") if empty else token
        empty = token.endswith("\n") or (empty and not token.strip())
        kept.append(token)
    return kept


def _without_label(text: str, label: str) -> str:
    """Return the text of a row without its label, which stands beside it, and without the name of a column that is left alone."""
    if text == f"labelled {label}":
        return ""
    lines = text.split("\n")
    if len(lines) > 1 and re.fullmatch(rf"[\w ]+: (\S+ \({re.escape(label)}\)|{re.escape(label)})", lines[-1]):
        lines.pop()
        if len(lines) == 1:
            return re.sub(r"^\w+: ", "", lines[0])
    return "\n".join(lines)
