"""One page about a run folder: which training rows made the model say what it says, and everything else that lies there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import whence
from whence.errors import ConfigError, StorageError
from whence.recipes.base import Recipe
from whence.report.alike import SHARED
from whence.report.page import Table, require_extra
from whence.report.rows import RowSource, Shelf
from whence.report.run_evidence import evaluation_tables
from whence.report.run_page import render_run
from whence.report.run_parts import alike_view, coverage_of, history, self_influence_view, settings_table, stage_rows, suspects
from whence.report.run_scores import LARGEST, NOISE, Shown, explain_reading, scores_view
from whence.scores.matrix import Scores
from whence.storage.run import explain_write_errors, fingerprint_rows, read_records, write_bytes_atomic
from whence.storage.shards import ShardStore

SELF_INFLUENCE_ROWS = 60
_FIRST, _LAST = ("over-run", "ekfac"), ("gradient-cosine", "duplicates", "calibration", "segment")  # the last are what checks leave


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A page that was written.

    Attributes:
        path: where.
        size: in bytes.
        scores: names of the scores on it.
        notices: what a reader should know is missing, in sentences.
    """

    path: Path
    size: int
    scores: tuple[str, ...]
    notices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"report": str(self.path), "bytes": self.size, "scores": list(self.scores), "notices": list(self.notices)}


def run_report(
    run_dir: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    train: Any = None,
    queries: Any = None,
    describe: Callable[[Any], str] | None = None,
    tokens: Callable[[Any], Any] | None = None,
    shown: Shown | None = None,
    notice: str | None = None,
) -> RunReport:
    """Write one self-contained HTML page about a run folder.

    Args:
        run_dir: the folder.
        out: the page.
        recipe: whose rows were scored. Without one give `train` and `queries`, or the page shows numbers of rows alone.
        train, queries: the rows that were scored.
        describe: text about a row; without it rows are shown that are text or have a `"text"`.
        tokens: text of each token of a row, to mark them where scores are by token.
        shown: how much of the scores; None: the defaults.
        notice: one more sentence to be shown above everything.

    Raises:
        ConfigError: the extra `report` is not installed, there is no such folder or no run in it, a chosen query was not scored, or
            rows are given twice.
        StorageError: a file is damaged or cannot be written.
    """
    require_extra("jinja2")
    folder, path = Path(run_dir), Path(out)
    if not any((folder / part).exists() for part in ("run.json", "scores", "self_influence")):
        raise ConfigError(
            f"{folder} is no run folder: there is neither run.json nor scores. Give the run_dir of an attributor, or --run-dir."
        )
    if recipe is not None and (train is not None or queries is not None or describe is not None):
        raise ConfigError("give a recipe, or train, queries and describe; a recipe has all of them.")
    source = RowSource(train=train, queries=queries, describe=describe, tokens=tokens) if recipe is None else RowSource.of_recipe(recipe)
    gathered = _Gathered(folder=folder, shelf=Shelf(source), notices=[] if notice is None else [notice])
    content = gathered.html(folder.resolve().name if recipe is None else recipe.name, shown or Shown()).encode("utf-8", "replace")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, content)
    return RunReport(path=path, size=len(content), scores=gathered.names, notices=tuple(gathered.notices))


class _Gathered:
    """What is read from a run folder, on its way to the page."""

    def __init__(self, *, folder: Path, shelf: Shelf, notices: list[str]) -> None:
        self.folder, self.shelf, self.notices = folder, shelf, notices
        self.names: tuple[str, ...] = ()
        self.settings: dict[str, Mapping[str, Any]] = {}
        rows = {"train": shelf.source.train, "queries": shelf.source.queries}
        self._sizes = {side: len(data) for side, data in rows.items() if data is not None}
        self._prints = {side: fingerprint_rows(data) for side, data in rows.items() if data is not None}

    def html(self, name: str, shown: Shown) -> str:
        """Return the page."""
        records = [record for record in read_records(self.folder / "run.json") if isinstance(record, Mapping)]
        scores, own = self._scores(shown), self._self_influence()
        self._tell_unknown([*scores, *own])
        readable = self.shelf.ask_the_model()
        for view in scores:
            explain_reading(view, self.shelf)
        for view in own:
            found = suspects(view, self.shelf) if readable and view["known"] else []
            view["suspects"], view["others"] = found, [hit for hit in view["hits"] if hit not in found]
        stages = stage_rows(records)
        columns = ["Stage", "Mean (s)", "Calls", "Total (s)", "Share (%)"]
        rows = {side: {str(index): row for index, row in sorted(part.items())} for side, part in self.shelf.rows.items()}
        coverage = coverage_of(records)
        page: dict[str, Any] = {
            "title": f"What made {name} say this" if scores else f"Run {name}",
            "notices": self.notices,
            "scores": scores,
            "self_influence": own,
            "alike": alike_view(self.shelf),
            "evaluations": evaluation_tables(self.folder),
            "coverage": coverage,
            "tables": [
                *([Table(caption="Stages", columns=columns, rows=stages, total=True)] if stages else []),
                *([settings_table(self.settings)] if self.settings else []),
            ],
            "history": history(records),
            "rows": rows,
            "noise": NOISE,
            "shared": f"{SHARED:.0%}",
            "footer": f"Made by whence {whence.__version__} with torch {torch.__version__}, Python {platform.python_version()}. "
            "One file that asks for nothing from any network.",
        }
        return render_run(page)

    def _scores(self, shown: Shown) -> list[dict[str, Any]]:
        read = {}
        for folder in sorted(path for path in (self.folder / "scores").glob("*") if (path / "manifest.json").is_file()):
            try:
                found = Scores.load(folder)
            except StorageError as error:
                self.notices.append(f"Scores {folder.name} are left out: {error}")
                continue
            if found.sums_rows:
                self.notices.append(f"Scores {folder.name} are left out: they are sums over training rows.")
            elif found.values.numel():
                read[folder.name] = found
        _check_chosen(shown, read)
        known = {name: self._known(found) for name, found in read.items()}
        order = sorted(read, key=lambda name: (known[name] != (True, True), name in _LAST, name not in _FIRST, name == "ekfac", name))
        views = []
        for place, name in enumerate(order, start=1):
            found, (train, queries) = read[name], known[name]
            shelf = self.shelf if train else Shelf(RowSource())
            view = scores_view(name, found, shelf, shown, queries_known=queries and train, largest=LARGEST * place / len(order))
            if view["queries"]:
                views.append(view | {"known": train, "shown_rows": f"{view['rows']:,}"})
                self.settings[name] = found.settings
        self.names = tuple(view["name"] for view in views)
        return views

    def _known(self, found: Scores) -> tuple[bool, bool]:
        """Whether training rows and queries are those at hand; tells when they should be and are not."""
        summed = found.settings.get("aggregate") == "queries"
        listed = found.query_rows is not None or summed
        sizes = {
            "train": found.trained_rows or found.values.shape[1],
            "queries": self._sizes.get("queries") if listed else len(found.values),
        }
        return self._same("train", sizes["train"], found.settings), self._same("queries", sizes["queries"], found.settings)

    def _same(self, side: str, size: int | None, settings: Mapping[str, Any]) -> bool:
        if side not in self._sizes:
            return False
        return bool(settings[side] == self._prints[side]) if side in settings else size == self._sizes[side]

    def _tell_unknown(self, views: list[dict[str, Any]]) -> None:
        unknown = [view["name"] for view in views if not view["known"]]
        if unknown and "train" in self._sizes:
            names = ", ".join(dict.fromkeys(unknown))
            self.notices.append(f"{names}: made from other training rows than those at hand, so that their rows are numbers alone.")

    def _self_influence(self) -> list[dict[str, Any]]:
        views = []
        for folder in sorted(path for path in (self.folder / "self_influence").glob("*") if (path / "manifest.json").is_file()):
            try:
                store = ShardStore.open(folder, kind="self_influence")
                if not store.complete:
                    raise StorageError(f"{folder}: it is unfinished. Run the command that makes it again; it continues.")
                values = torch.cat([store.read(name)["total"] for name in sorted(store.names)])
            except StorageError as error:
                self.notices.append(f"Self-influence {folder.name} is left out: {error}")
                continue
            known = self._same("train", len(values), store.settings)
            shelf = self.shelf if known else Shelf(RowSource())
            view = self_influence_view(folder.name, values, store.settings.get("train rows"), store.settings, shelf, SELF_INFLUENCE_ROWS)
            views.append(view | {"known": known, "shown_rows": f"{view['rows']:,}"})
            self.settings[f"self-influence {folder.name}"] = store.settings
        views.sort(key=lambda view: (view["about"].startswith("norm"), view["name"] == "mislabeled"))
        # Checks keep under a name of their own what may be there already.
        return [view for place, view in enumerate(views) if view["hits"] not in [other["hits"] for other in views[:place]]]


def _check_chosen(shown: Shown, read: Mapping[str, Scores]) -> None:
    scored = {row for found in read.values() for row in (found.query_rows or range(len(found.values)))}
    missing = [row for row in shown.chosen or () if row not in scored]
    if missing:
        have = (
            f"the scored ones are {', '.join(map(str, sorted(scored)[:20]))}{' ...' if len(scored) > 20 else ''}" if scored else "none was"
        )
        raise ConfigError(f"query {missing[0]} was not scored; {have}.")
