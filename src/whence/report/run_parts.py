"""What a run folder holds beside scores, as a page shows it: self-influence, rows that are alike, evaluations, how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whence.report.alike import alike_groups
from whence.report.page import Table
from whence.report.rows import Shelf
from whence.report.run_scores import number
from whence.runtime.progress import Stages

LOOKED_AT = 0.05


def self_influence_view(name: str, values: Tensor, rows: Sequence[int] | None, settings: Mapping[str, Any], shelf: Shelf, most: int) -> Any:
    """Return the rows with the largest self-influence, as JSON; rows go to the shelf.

    Args:
        name: of the folder.
        values: `[row]`.
        rows: their indices in the training set; None: all in order.
        settings: what they were computed with.
        shelf: where the rows are put.
        most: how many rows are shown.
    """
    order = torch.sort(values, descending=True, stable=True).indices.tolist()
    indices = list(range(len(values))) if rows is None else list(rows)
    largest = max(float(values.abs().max()), 1e-30)
    hits = []
    for column in order[:most]:
        value = float(values[column])
        shelf.put("train", indices[column])
        hits.append({"row": indices[column], "score": number(value), "width": max(1, round(100 * abs(value) / largest))})
    strategy = str(settings.get("strategy", "unknown"))
    what = "norm of the gradient" if strategy == "identity" else f"{strategy.upper() if 'fac' in strategy else strategy} curvature"
    return {"name": name, "about": what, "rows": len(values), "hits": hits, "found": _found(values, indices, order, shelf)}


def _found(values: Tensor, indices: list[int], order: list[int], shelf: Shelf) -> str | None:
    """Say how many of the labels that were made wrong on purpose come first; None: none were."""
    flipped = shelf.source.flipped
    if flipped is None or not flipped[indices].any():
        return None
    wrong = [bool(flipped[indices[column]]) for column in order]
    parts = [f"{sum(wrong[: round(share * len(values))]):,} among the first {share:.0%}" for share in (0.05, 0.1, 0.2)]
    return f"Of {sum(wrong):,} labels made wrong on purpose there are {', '.join(parts)}."


def suspects(view: Mapping[str, Any], shelf: Shelf) -> list[dict[str, Any]]:
    """Return the first rows by self-influence that the model itself would label otherwise."""
    return [hit for hit in view["hits"] if "says" in (row := shelf.rows["train"][hit["row"]]) and row["says"] != row.get("label")]


def alike_view(shelf: Shelf, most: int = 30) -> list[dict[str, Any]]:
    """Return groups of shown rows that are alike, queries among them, and whether their labels differ."""
    members: list[tuple[str, int]] = [(side, index) for side, shown in shelf.rows.items() for index in sorted(shown)]
    rows = [shelf.rows[side][index] for side, index in members]  # type: ignore[index]
    # The same label below different pictures makes no copies.
    found = alike_groups([None if "picture" in row else row.get("text") for row in rows])
    views = []
    for group in found[:most]:
        labels = {rows[place].get("label") for place in group}
        views.append({"members": [members[place] for place in group], "differ": len(labels) > 1})
    return views


def stage_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of stages of all records together, and their total.

    Records of one process count their stages from its start, so that the last one holds those before it.
    """
    kept: list[Mapping[str, Any]] = []
    for record in records:
        if kept and kept[-1].get("command") == record.get("command") and _includes(_stages(record), _stages(kept[-1])):
            kept.pop()
        kept.append(record)
    sums: dict[str, tuple[float, int]] = {}
    for record in kept:
        for stage in _stages(record):
            seconds, calls = sums.get(str(stage["name"]), (0.0, 0))
            sums[str(stage["name"])] = (seconds + float(stage["total_s"]), calls + int(stage["calls"]))
    stages = Stages.from_json([{"name": name, "total_s": total, "calls": calls} for name, (total, calls) in sums.items()]).rows()
    table = [[one.name, f"{one.mean_s:.3g}", f"{one.calls:,}", f"{one.total_s:.3g}", f"{100 * one.share:.1f}"] for one in stages]
    total, calls = sum(one.total_s for one in stages), sum(one.calls for one in stages)
    return [*table, ["Total", "", f"{calls:,}", f"{total:.3g}", "100.0"]] if table else []


def _stages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = record.get("stages") or []
    return [stage for stage in found if isinstance(stage, Mapping) and stage.keys() >= {"name", "calls", "total_s"}]


def _includes(later: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> bool:
    seconds = {stage["name"]: stage["total_s"] for stage in later}
    return all(seconds.get(stage["name"], -1) >= stage["total_s"] for stage in earlier)


def history(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return what was done in a run folder, a line per record."""
    rows = [
        [str(one.get("time", ""))[:19].replace("T", " "), str(one.get("call", "")), _command(str(one.get("command", "")))]
        for one in records
    ]
    return Table(caption="What was done (UTC)", columns=["Time", "What", "Command"], rows=rows)


def _command(command: str) -> str:
    """Return a command without the folders of its program, which mean nothing on another machine."""
    try:
        program, *arguments = shlex.split(command)
    except ValueError:
        return command
    name = Path(program).name
    return shlex.join(["whence" if name == "__main__.py" and Path(program).parent.name == "whence" else name, *arguments])


def settings_table(stores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return what scores and self-influence were computed with, a column for each folder."""
    shown = {name: _settings(settings) for name, settings in stores.items()}
    names = list(dict.fromkeys(key for settings in shown.values() for key in settings))
    return Table(
        caption="Settings",
        columns=["Setting", *shown],
        rows=[[name, *(settings.get(name, "") for settings in shown.values())] for name in names],
    )


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    told: dict[str, str] = {}
    for name, value in settings.items():
        if name in ("format", "query rows", "train rows"):
            continue
        if name == "layers" and isinstance(value, Mapping):
            told["attributed layers"] = f"{len(value):,}"
        elif name in ("model", "train", "queries", "task") and isinstance(value, str):
            told[f"{name} (fingerprint)"] = value[:12]
        elif isinstance(value, Mapping):
            told |= {f"{name}: {key}": str(part)[:60] for key, part in value.items() if not _is_hash(part)}
        else:
            told[name] = str(value)[:60]
    return told


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value)


def coverage_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last record's coverage: share of the trained parameters as text, and what was left out by its reason."""
    kept = [record.get("coverage") for record in reversed(records)]
    found = next((one for one in kept if isinstance(one, Mapping) and "share" in one), None)
    if found is None:
        return None
    reasons: dict[str, list[str]] = {}
    for name, reason in found.get("left_out", []):
        reasons.setdefault(str(reason), []).append(str(name))
    return {"share": f"{100 * float(found['share']):.1f}%", "left_out": list(reasons.items())}
