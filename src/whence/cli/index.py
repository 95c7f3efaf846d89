"""The verbs index and query: one library call each, and the printing of what it returns."""

from __future__ import annotations

from typing import Annotated, Any

from whence.cli import output
from whence.cli.listing import query_entry, query_lines, text_of
from whence.cli.opening import Flat, RecipeName, open_recipe, run_folder
from whence.cli.options import DataOptions, IndexOptions, KeepOptions, ListOptions, RunOptions, Strategy, WeightOptions
from whence.cli.values import Numbers, Share, parse_damping, parse_response
from whence.errors import ConfigError


def index(
    recipe: RecipeName,
    /,
    *,
    rows: Annotated[IndexOptions, Flat] = IndexOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    strategy: Strategy = "ekfac",
    weight: Annotated[WeightOptions, Flat] = WeightOptions(),  # noqa: B008
    name: str | None = None,
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[KeepOptions, Flat] = KeepOptions(),  # noqa: B008
) -> None:
    """Keep a small row of every training example, so that new queries need no pass over the training data.

    Args:
        strategy: Form of the curvature; it must be fitted, except identity, which needs no fit.
        name: Folder of the index in the run folder. Default: the strategy's name.
    """
    from whence.scores.request import check_name

    check_name(name)
    damping, response = parse_damping(weight.damping), parse_response(weight.response)
    attributor, found = open_recipe(recipe, run, data)
    made = attributor.index(
        found.train,
        **vars(rows),
        strategy=strategy,
        damping=damping,
        response=response,
        batch_size=run.batch_size,
        name=name,
        overwrite=run.overwrite,
    )
    values = {"recipe": found.name, "index": str(made.folder), "rows": len(made), "bytes_per_row": round(made.row_bytes), **vars(rows)}
    output.data(output.facts(values), values, as_json=run.json)
    output.closing(attributor)


def query(
    recipe: RecipeName,
    /,
    *,
    query: Numbers | None = None,
    text: list[str] | None = None,
    strategy: str = "ekfac",
    name: str | None = None,
    rescore: Share = 0.05,
    listing: Annotated[ListOptions, Flat] = ListOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Ask an index which training rows a behaviour comes from.

    Args:
        query: The recipe's own queries by number, for example 0,3,7. Default, without --text: the first.
        text: A text to ask about instead; may be given several times. A language model is asked for the text itself, a
            classifier for the class that it reads in it.
        strategy: The index to ask, by its name or the strategy's.
        name: Folder of the index in the run folder, if it was given one.
        rescore: Share of the rows, half of it at either end by the index, that are scored exactly; 0 takes the index's own scores.
    """
    from whence.index.index import Index
    from whence.scores.request import check_name

    check_name(name)
    if text and query:
        raise ConfigError("--query and --text were both given; ask about one kind at a time.")
    attributor, found = open_recipe(recipe, run, data)
    folder = run_folder(found, run) / "index" / (name or strategy)
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist: there is no index to ask. Run first: whence index {recipe}, or name one with --name.")
    asked, numbers = _asked(found, query, text)
    index = Index(attributor, folder, train=found.train)
    answer = index.query(asked, k=listing.k, rescore=rescore)
    entries = []
    for place, row in enumerate(asked):
        sides = {"proponents": answer.top(place)} | ({"opponents": answer.bottom(place)} if listing.bottom else {})
        entries.append(query_entry(found, numbers[place], text_of(found, row), sides, index.row))
    lines = [line for entry in entries for line in query_lines(entry)]
    output.data(lines, {"recipe": found.name, "index": str(folder), "exact": answer.exact, "queries": entries}, as_json=run.json)
    output.stage_table(attributor.stages)


def _asked(found: Any, query: list[int] | None, text: list[str] | None) -> tuple[list[Any], list[int | None]]:
    """Return the rows to ask about, and their numbers among the recipe's queries."""
    if text:
        if found.ask is None:
            raise ConfigError(f"--text: recipe {found.name} does not say how a text becomes a row. Ask about its own queries with --query.")
        return [found.ask(one) for one in text], [None] * len(text)
    numbers = query or [0]
    if (most := max(numbers)) >= len(found.queries):
        raise ConfigError(f"--query {most}: there are {len(found.queries)} queries, numbered from 0.")
    return [found.queries[number] for number in numbers], list(numbers)
