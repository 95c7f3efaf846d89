"""The results of `whence evaluate` that lie in a run folder, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whence.report.page import Table
from whence.storage.run import read_json

FOLDER = "evaluations"


def evaluation_tables(run_dir: Path) -> list[Table]:
    """Return a table for every JSON file in `evaluations` that a verb of `whence evaluate --json` printed; others are passed over.

    Raises:
        StorageError: a file is no JSON.
    """
    tables = []
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        found = read_json(path)
        table = _table(path.stem, found) if isinstance(found, Mapping) else None
        if table is not None:
            tables.append(table)
    return tables


def _table(name: str, found: Mapping[str, Any]) -> Table | None:
    for key, make in _MAKERS.items():
        if key in found:
            try:
                return make(name, found)
            except (KeyError, TypeError, ValueError, AttributeError):
                return None  # something else that happens to have the key
    return None


def _lds(name: str, found: Mapping[str, Any]) -> Table:
    ceiling = found.get("ceiling")
    head = f"Linear datamodeling score ({name}): {found['subsets']} subsets × {found['repeats']} retrains"
    rows = [[method, f"{one['lds']:.3f}", _interval(one["interval"])] for method, one in found["methods"].items()]
    return Table(
        caption=head + ("" if ceiling is None else f", ceiling {ceiling:.3f}"), columns=["Scores", "LDS", "95% interval"], rows=rows
    )


def _counterfactual(name: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [one["method"], str(one["removed"]), *_estimate(one["rise"]), "" if one["flipped"] is None else f"{one['flipped']['value']:.1%}"]
        for one in found["effects"]
    ]
    return Table(
        caption=f"Training again without the strongest rows ({name})",
        columns=["Scores", "Rows removed", "Rise of the measurement", "95% interval", "Queries that flip"],
        rows=rows,
    )


def _mislabeled(name: str, found: Mapping[str, Any]) -> Table:
    marks = [key for key in next(iter(found["rankings"].values())) if key != "auc"]
    rows = [[kind, f"{one['auc']:.3f}", *(f"{one[mark]:.1%}" for mark in marks)] for kind, one in found["rankings"].items()]
    return Table(
        caption=f"Share of {found['flipped']} wrong labels found ({name})",
        columns=["Ranking", "AUC", *(f"first {mark}" for mark in marks)],
        rows=rows,
    )


def _tail_patch(name: str, found: Mapping[str, Any]) -> Table:
    rows = [[order, *_estimate(one)] for order, one in found["falls"].items()]
    columns = ["Scores", f"Fall after a step on {found['k']} rows", "95% interval"]
    return Table(caption=f"One more step on the strongest rows ({name}): {found['queries']} queries", columns=columns, rows=rows)


def _agreement(name: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [key.capitalize(), f"{found[key]['mean']:.4f}", _interval(found[key]["interval"])] for key in ("spearman", "pearson", "overlap")
    ]
    return Table(caption=f"Agreement of two files of scores ({name})", columns=["Mean over queries", "Value", "95% interval"], rows=rows)


def _duplicates(name: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [kind, f"{one['recall_at_1']['value']:.1%}", f"{one['recall_at_10']['value']:.1%}", f"{one['mean_reciprocal_rank']['value']:.3f}"]
        for kind, one in found["scores"].items()
    ]
    columns = ["Scores", "Itself first", "In the first 10", "Mean reciprocal rank"]
    return Table(caption=f"Training rows that are asked for themselves ({name})", columns=columns, rows=rows)


_MAKERS = {
    "methods": _lds,
    "effects": _counterfactual,
    "rankings": _mislabeled,
    "falls": _tail_patch,
    "spearman": _agreement,
    "scores": _duplicates,
}


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _estimate(one: Mapping[str, Any]) -> list[str]:
    return [f"{one['value']:.4g}", _interval(one["interval"])]
