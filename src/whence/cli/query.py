"""The verb query: one call of an index, and the printing of what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from whence.cli import output
from whence.cli.groups import check_by, group_entry, group_lines, groups_by
from whence.cli.listing import query_entry, query_lines
from whence.cli.opening import Flat, IndexName, IndexRecipe, open_index
from whence.cli.options import AskOptions, DataOptions, ListOptions, RunOptions
from whence.cli.questions import Question, as_one, check_one_kind, questions, read_lines
from whence.cli.tokens import mark_tokens
from whence.cli.values import Share, Switch, Whole
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.index.answer import Answer
    from whence.index.index import Index
    from whence.recipes.base import Recipe

RESCORE = 0.05


def query(
    source: IndexName,
    /,
    *,
    ask: Annotated[AskOptions, Flat] = AskOptions(),  # noqa: B008  (read only; the parser makes a new one per call)
    by: str | None = None,
    tokens: Switch = False,
    recipe: IndexRecipe = None,
    strategy: str | None = None,
    name: str | None = None,
    over_run: Switch = False,
    rescore: Share | None = None,
    nprobe: Whole | None = None,
    listing: Annotated[ListOptions, Flat] = ListOptions(),  # noqa: B008
    data: Annotated[DataOptions, Flat] = DataOptions(),  # noqa: B008
    run: Annotated[RunOptions, Flat] = RunOptions(),  # noqa: B008
) -> None:
    """Ask an index which training rows a behaviour comes from.

    Args:
        by: Add up groups of rows instead, and say how far from chance (z): label, a column of the data, or cluster:20 for 20 clusters.
        tokens: Mark under each row the tokens that its score comes from most, and those of the query.
        strategy: The index to ask, by its name or the strategy's. Default: ekfac; with --over-run identity.
        name: Folder of the index in the run folder, if it was given one.
        over_run: Ask the index that whence index --over-run made, of all snapshots of the training.
        rescore: Share of the rows, half at either end by the index, that are scored exactly; 0: the index's own scores. Default: 0.05.
        nprobe: Lists that are read where whence index --faiss made an approximate index; 0 reads all rows. Default: one in 16.
    """
    from whence.scores.request import check_name

    check_name(name)
    check_one_kind(ask)
    check_by(by, tokens=tokens, rescore=rescore, nprobe=nprobe)
    _check_unused(ask, run, nprobe)
    lines = None if ask.file is None else read_lines(ask.file)
    attributor, found, index = open_index(source, run, data, recipe=recipe, strategy=strategy, name=name, over_run=over_run)
    asked = questions(found, ask, lines)
    rows = [question.row for question in asked]
    heads = [as_one(found, ask, asked)] if ask.together else asked
    shown: dict[str, Any] = {"recipe": found.name, "index": str(index.folder)}
    if by is not None:
        made = groups_by(found, attributor, by, run.seed)
        groups = index.by_group(rows, [made.names[place] for place in index.places()], together=ask.together)
        entries = [group_entry(head, groups, number, made, listing) for number, head in enumerate(heads)]
        shown |= {"by": by, "exact": False, "queries": entries}
        told = [line for entry in entries for line in group_lines(entry)]
    else:
        answer = index.query(rows, k=listing.k, rescore=RESCORE if rescore is None else rescore, together=ask.together, nprobe=nprobe)
        entries = _entries(found, index, answer, heads, listing)
        if tokens:
            mark_tokens(found, index, rows, entries, together=ask.together)
        shown |= {"exact": answer.exact, "queries": entries}
        told = [line for entry in entries for line in query_lines(entry)]
    output.data(told, shown, as_json=run.json)
    output.stage_table(attributor.stages)


def _check_unused(ask: AskOptions, run: RunOptions, nprobe: int | None) -> None:
    """Refuse options that would change nothing."""
    if run.batch_size != "auto":
        raise ConfigError(f"--batch-size {run.batch_size}: query chooses its batches by itself; leave it out.")
    if nprobe and ask.together:
        raise ConfigError(f"--nprobe {nprobe}: --together takes the scores of all rows; leave one out.")


def _entries(found: Recipe, index: Index, answer: Answer, heads: list[Question], listing: ListOptions) -> list[dict[str, Any]]:
    entries = []
    for place, head in enumerate(heads):
        sides = {"proponents": answer.top(place)} | ({"opponents": answer.bottom(place)} if listing.bottom else {})
        entry = query_entry(found, head.number, head.text, sides, index.row)
        entries.append({**head.to_json(), **entry})
    if answer.agreement is not None:
        entries[0]["agreement"] = {
            "queries": answer.agreement.queries,
            "correlation": answer.agreement.correlation,
            "common": [{"train": row, "share": share} for row, share in answer.agreement.common],
        }
    return entries
