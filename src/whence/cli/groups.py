"""Groups of training rows on the command line: by label, by a column, or by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from whence.cli import output
from whence.cli.listing import head_lines, text_of
from whence.errors import ConfigError

if TYPE_CHECKING:
    from whence.attributor import Attributor
    from whence.cli.options import ListOptions
    from whence.cli.questions import Question
    from whence.recipes.base import Recipe
    from whence.scores.groups import GroupScores

_CLUSTER = "cluster:"
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What group each training row is in; `texts`: of a group, what it is about."""

    names: Sequence[str]
    texts: dict[str, str] = field(default_factory=dict)


def check_by(by: str | None, *, tokens: bool, rescore: float | None, nprobe: int | None) -> None:
    """Check what can be checked of `--by` without a model.

    Raises:
        ConfigError: the number of clusters is none, or what only lists of rows have is asked for too.
    """
    if by is None:
        return
    if tokens:
        raise ConfigError("--tokens marks tokens of rows, and --by lists groups of them; leave one out.")
    for option, given in (("--rescore", rescore), ("--nprobe", nprobe)):
        if given:  # 0 of both is what is done
            raise ConfigError(f"{option} {given}: --by adds up the index's own scores of all rows; leave one out.")
    number = by.removeprefix(_CLUSTER)
    if by.startswith(_CLUSTER) and not (number.isdecimal() and int(number) >= 2):
        raise ConfigError(f"--by {by}: give the number of clusters, 2 or more, for example cluster:20.")


def groups_by(found: Recipe, attributor: Attributor, by: str, seed: int) -> Groups:
    """Return what group each training row of a recipe is in.

    Raises:
        ConfigError: the recipe has no such column, or fewer different rows than clusters.
    """
    if by.startswith(_CLUSTER):
        return _clusters(found, attributor, int(by.removeprefix(_CLUSTER)), seed)
    columns = list(found.raw[0]) if found.raw else []
    if by == "label" and found.classes is not None:  # ahead of a column of that name, which has numbers for names
        from whence.recipes.base import class_names

        names = class_names(found)
        return Groups(names=[names.get(number, str(number)) for number in found.classes.tolist()])
    if by in columns and found.raw is not None:
        return Groups(names=[str(row.get(by)) for row in found.raw])
    known = ", ".join(dict.fromkeys([*(["label"] if found.classes is not None else []), *columns, "cluster:20"]))
    raise ConfigError(f"--by {by}: the training rows of recipe {found.name} have no such column; choose {known}.")


def _clusters(found: Recipe, attributor: Attributor, count: int, seed: int) -> Groups:
    from whence.evaluate.clusters import cluster_rows
    from whence.evaluate.embeddings import embeddings

    if count > len(found.train):
        raise ConfigError(f"--by {_CLUSTER}{count}: there are {len(found.train)} training rows; give no more clusters than that.")
    with attributor.stages.stage("Embeddings"):
        vectors = embeddings(found.model, found.train, collate=found.collate, device=attributor.device, task=found.task)
    with attributor.stages.stage("Clusters"):
        made = cluster_rows(vectors, count, seed=seed)
    texts = {f"cluster {number}": text_of(found, found.train[row]) or f"train {row}" for number, row in enumerate(made.central)}
    return Groups(names=[f"cluster {number}" for number in made.numbers.tolist()], texts=texts)


def group_entry(head: Question, groups: GroupScores, number: int, made: Groups, listing: ListOptions) -> dict[str, Any]:
    """Return a question with the groups at the ends of its list."""
    ends = {"largest": groups.top(number, listing.k)} | ({"lowest": groups.bottom(number, listing.k)} if listing.bottom else {})
    texts = {
        side: [{**entry, **({"text": made.texts[entry["group"]]} if entry["group"] in made.texts else {})} for entry in entries]
        for side, entries in ends.items()
    }
    return {**head.to_json(), "query": head.number, "text": head.text, **texts}


def group_lines(entry: dict[str, Any]) -> list[str]:
    """Return a question's groups as lines."""
    lines = head_lines(entry)
    for side in ("largest", "lowest"):
        if side in entry:
            rows = [
                [
                    f"  {one['group']}",
                    str(one["rows"]),
                    f"{one['sum']:+.4e}",
                    f"{one['mean']:+.4e}",
                    f"{one['z']:+.1f}",
                    *([_short(one["text"])] if "text" in one else []),
                ]
                for one in entry[side]
            ]
            heads = [f"  {side} sums", "rows", "sum", "mean", "z"]
            lines += output.table([*heads, *(["nearest to its centre"] if len(rows[0]) > len(heads) else [])], rows)
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 3]}..."
