"""What a query of the command line asks about: queries of the recipe, texts, training rows, or rows of a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whence.cli.listing import text_of
from whence.errors import ConfigError, DataError

if TYPE_CHECKING:
    from whence.cli.options import AskOptions
    from whence.recipes.base import Recipe

Line = tuple[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row to ask about.

    Attributes:
        row: as the model takes it; None for several as one.
        text: what people read of it.
        head: what it is called in lists.
        number: its number among the recipe's queries, if it is one.
        place: where else it comes from, as JSON: a training row, or a line of a file.
    """

    row: Any
    text: str | None
    head: str
    number: int | None = None
    place: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the name, and where it comes from."""
        return {"head": self.head, **(self.place or {})}


def check_one_kind(ask: AskOptions) -> None:
    """Check that one kind of question is asked.

    Raises:
        ConfigError: there are two.
    """
    kinds = {"--query": ask.query, "--text": ask.text, "--rows": ask.rows, "--file": ask.file, "--class": ask.class_}
    given = [name for name, value in kinds.items() if value]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} were both given; ask about one kind at a time.")


def read_lines(path: Path) -> list[Line]:
    """Return the objects of a file of JSON lines, each with the number of its line, from 1; empty lines are left out.

    Raises:
        ConfigError: there is no such file. DataError: a line is no object, or there is none.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f'--file {path}: {what}. Give a file of JSON lines, such as {{"text": "..."}}.')
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}. Save it again in UTF-8.") from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at signs that JSON may hold
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}. Write one object per line.") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}, line {number} holds {line.strip()[:40]!r}; write one object per line, such as {{"text": "..."}}.')
        found.append((number, row))
    if not found:
        raise DataError(f'{path} has no lines. Write one object per line, such as {{"text": "..."}}.')
    return found


def questions(found: Recipe, ask: AskOptions, lines: list[Line] | None) -> list[Question]:
    """Return the rows to ask about; `lines` are those of `--file`.

    Raises:
        ConfigError: a number or class does not exist, or the recipe cannot make such rows. DataError: a row cannot be used.
    """
    if ask.text:
        if found.ask is None:
            raise ConfigError(f"--text: recipe {found.name} does not say how a text becomes a row. Ask about its own queries with --query.")
        return [Question(row=row, text=text_of(found, row), head="query") for row in map(found.ask, ask.text)]
    if lines is not None:
        return [_of_line(found, ask.file, number, raw) for number, raw in lines]
    if ask.rows:
        _check_numbers("--rows", ask.rows, len(found.train), "training rows")
        return [
            Question(row=row, text=text_of(found, row), head=f"training row {number}", place={"row": number})
            for number, row in ((number, found.train[number]) for number in ask.rows)
        ]
    numbers = ask.query or ([0] if ask.class_ is None else _of_class(found, ask.class_))
    _check_numbers("--query", numbers, len(found.queries), "queries")
    rows = [(number, found.queries[number]) for number in numbers]
    return [Question(row=row, text=text_of(found, row), head=f"query {number}", number=number) for number, row in rows]


def as_one(found: Recipe, ask: AskOptions, asked: list[Question]) -> Question:
    """Return what several questions are called as one."""
    of = f" of class {ask.class_}" if ask.class_ is not None else ""
    names = ", ".join(question.head for question in asked[:5]) + (", ..." if len(asked) > 5 else "")
    return Question(
        row=None,
        text=names,
        head=f"{len(asked)} {'queries' if len(asked) > 1 else 'query'}{of} together",
        place={"together": [one.head for one in asked]},
    )


def _check_numbers(option: str, numbers: list[int], count: int, what: str) -> None:
    if (most := max(numbers)) >= count:
        raise ConfigError(f"{option} {most}: there are {count} {what}, numbered from 0.")


def _of_line(found: Recipe, path: Path | None, number: int, raw: dict[str, Any]) -> Question:
    """Return the question of a line: a text alone, or a raw row."""
    place = f"{path}, line {number}"
    try:
        if list(raw) == ["text"] and found.ask is not None:
            if not isinstance(raw["text"], str):
                raise DataError(f"the column 'text' holds {raw['text']!r}; give a text.")
            row = found.ask(raw["text"])
        elif found.encode is not None:
            row = found.encode(raw)
        else:
            raise ConfigError(f"recipe {found.name} does not say how a raw row becomes a row. Ask about its own queries with --query.")
    except (ConfigError, DataError) as error:
        raise type(error)(f"{place}: {error}") from None
    return Question(row=row, text=text_of(found, row), head=f"line {number}", place={"line": number})


def _of_class(found: Recipe, name: str) -> list[int]:
    """Return the numbers of the queries of a class."""
    from whence.recipes.base import class_names

    if found.query_classes is None:
        raise ConfigError(f"--class {name}: the queries of recipe {found.name} have no classes. Ask about some of them with --query.")
    names, known = class_names(found), sorted(set(found.query_classes.tolist()))
    number = next((number for number, other in names.items() if other == name), int(name) if name.isdecimal() else None)
    if number not in known:
        have = ", ".join(f"{one} ({names[one]})" if one in names and names[one] != str(one) else str(one) for one in known)
        raise ConfigError(f"--class {name}: there is no query of that class; the queries are of the classes {have}.")
    return [place for place, label in enumerate(found.query_classes.tolist()) if label == number]
