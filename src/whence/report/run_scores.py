"""The scores of a run folder, cut down to what a page shows of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whence.report.noise import CHANCE, Noise, noise_level
from whence.report.rows import MOST_TOKENS, Shelf
from whence.scores.matrix import Scores

BINS, LAYERS, SHADES = 60, 12, 9
_SOLVERS = {"cg": "conjugate gradients", "exact": "exact inverse"}
LARGEST = 6_000_000
"""Characters of data after which no further query is taken in."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How much of scores is shown: the `k` strongest rows a side, of at most `most` queries, or of those chosen."""

    k: int = 10
    most: int = 200
    chosen: Sequence[int] | None = None


def number(value: float) -> str:
    """Return a score as text, with its sign and three digits."""
    size = abs(value)
    if value == 0:
        return "0"
    return f"{value:+.2e}" if size < 1e-3 or size >= 1e5 else f"{value:+,.{max(0, 2 - math.floor(math.log10(size)))}f}"


def scores_view(name: str, scores: Scores, shelf: Shelf, shown: Shown, *, queries_known: bool, largest: float = LARGEST) -> dict[str, Any]:
    """Return what the page shows of one folder of scores, as JSON; rows go to the shelf.

    Every number is text already, so that page and script need not agree on how to write one.

    Args:
        name: of the folder.
        scores: with training rows of the shelf's source.
        shelf: where the rows are put.
        shown: how much is shown.
        queries_known: whether the queries are those of the shelf's source.
        largest: size of the shelf past which no further query is taken in; there is one query in any case.
    """
    places = _places(scores, shown)
    view = _View(scores=scores, shelf=shelf, k=shown.k, queries_known=queries_known)
    queries: list[dict[str, Any]] = []
    for place in places:
        if queries and shelf.size > largest:
            break
        queries.append(view.query(place))
        shelf.size += 60 * shown.k
    found = len(scores.values)
    return {
        "name": name,
        "about": about(scores.settings),
        "effect": effect(scores.settings),
        "queries": queries,
        "rows": scores.values.shape[1],
        "left": found - len(queries),
        "found": found,
    }


def explain_reading(view: dict[str, Any], shelf: Shelf) -> None:
    """Name the two sides of each query by its label, and say where to look if the model itself gives another one."""
    for query in view["queries"]:
        row = shelf.rows["queries"].get(query["row"], {}) if query["known"] else {}
        label, says = row.get("label"), row.get("says")
        query["heads"] = ["For it", "Against it"] if label is None else [f"Towards “{label}”", f"Away from “{label}”"]
        if says is not None and says != label:
            query["verdict"] += f" The model says “{says}”: look at what pushed it away from “{label}”."


def about(settings: Mapping[str, Any]) -> str:
    """Say in a few words how scores of these settings were made."""
    solver = next((words for key, words in _SOLVERS.items() if any(key in str(name).split("-") for name in settings)), None)
    strategy = str(settings.get("strategy", "unknown"))
    kind = "gradients alone" if strategy == "identity" else f"{strategy.upper() if 'fac' in strategy else strategy} curvature"
    normal = {"cosine": "cosine", "relatif": "RelatIF (by the row's own norm)"}.get(str(settings.get("normalize")))
    run = settings.get("over run")
    parts = [kind, solver, normal, f"mean over {run['snapshots']} snapshots of the training" if run else None]
    return ", ".join(part for part in parts if part)


def effect(settings: Mapping[str, Any]) -> str:
    """Say what a positive score lowers, by the measurement in the settings of scores."""
    measure = str(settings.get("task options", {}).get("measure", "")).strip("'")
    return {"margin": "the odds against the query's label", "log_odds": "the odds against the query's tokens"}.get(
        measure, "the query's loss"
    )


def _places(scores: Scores, shown: Shown) -> list[int]:
    if scores.settings.get("aggregate") == "queries":
        return [0]  # one sum, whichever queries it is of
    rows = scores.query_rows or list(range(len(scores.values)))
    chosen = rows if shown.chosen is None else [row for row in shown.chosen if row in rows]
    return [rows.index(row) for row in chosen][: shown.most]


@dataclass(frozen=True, kw_only=True)
class _View:
    scores: Scores
    shelf: Shelf
    k: int
    queries_known: bool

    def query(self, place: int) -> dict[str, Any]:
        """Return one query: its strongest rows on both sides, its histogram, its noise, and its layers."""
        values = self.scores.values[place]
        summed = self.scores.settings.get("aggregate") == "queries"
        row = place if self.scores.query_rows is None else self.scores.query_rows[place]
        known = self.queries_known and not summed
        if known:
            self.shelf.put("queries", row)
        noise = noise_level(values)
        largest = max(float(values.abs().max()), 1e-30)
        order = torch.sort(values, descending=True, stable=True).indices
        last = torch.sort(values, stable=True).indices
        sides = [
            [int(column) for column in order[: self.k] if values[column] > 0],
            [int(column) for column in last[: self.k] if values[column] < 0],
        ]
        heats = self._heats(place, sides)
        return {
            "row": row,
            "known": known,
            "title": "The sum of all queries" if summed else f"Query {row}",
            "sides": [[self._hit(column, float(values[column]), largest, noise, heats) for column in side] for side in sides],
            "verdict": _verdict(noise, len(values)),
            "histogram": histogram(values, noise),
            "layers": self._layers(place),
        }

    def _hit(self, column: int, value: float, largest: float, noise: Noise | None, heats: dict[int, list[int]]) -> dict[str, Any]:
        row = column if self.scores.train_rows is None else self.scores.train_rows[column]
        self.shelf.put("train", row, tokens=column in heats)
        hit: dict[str, Any] = {"row": row, "score": number(value), "width": max(1, round(100 * abs(value) / largest))}
        if noise is not None and noise.low <= value <= noise.high:
            hit["quiet"] = 1
        return hit | ({"heat": heats[column]} if column in heats else {})

    def _heats(self, place: int, sides: list[list[int]]) -> dict[int, list[int]]:
        """Return the shades of each shown row's tokens."""
        tokens = self.scores.per_token
        if tokens is None or tokens.shape[2] == 0 or self.shelf.source.tokens is None:
            return {}
        columns = [column for side in sides for column in side]
        found = shades([tokens[place, column, :MOST_TOKENS] for column in columns])
        return dict(zip(columns, found, strict=True)) if found else {}

    def _layers(self, place: int) -> list[list[Any]]:
        """Return `[name, share, width]` of the layers with the largest shares, and of all others together."""
        sizes = {name: float(values[place].double().abs().sum()) for name, values in self.scores.per_layer.items()}
        whole = sum(sizes.values())
        if not whole:
            return []
        ranked = sorted(sizes.items(), key=lambda item: -item[1])
        # One layer left over is named as well.
        shown, rest = (ranked, []) if len(ranked) == LAYERS + 1 else (ranked[:LAYERS], ranked[LAYERS:])
        if rest:
            shown.append((f"{len(rest)} other layers", sum(size for _, size in rest)))
        most = max(size for _, size in shown)
        return [[name, f"{100 * size / whole:.1f}%", round(100 * size / most)] for name, size in shown]


def shades(parts: Sequence[Tensor]) -> list[list[int]]:
    """Return tokens' parts of a score as shades from -SHADES to SHADES, by their root; none if all parts are zero.

    The strongest token of all rows has the strongest shade; without the root, one such token leaves all others pale.
    """
    largest = max([float(part.abs().max()) for part in parts if len(part)], default=0.0)
    if largest == 0:
        return []
    return [(SHADES * part.sign() * (part.double().abs() / largest).sqrt()).round().int().tolist() for part in parts]


def _verdict(noise: Noise | None, rows: int) -> str:
    if noise is None:
        return f"{rows:,} training rows were scored. Their scores are no bulk with a few exceptions, so that no noise level can be told."
    total = noise.above + noise.below
    if total == 0:
        return f"None of {rows:,} training rows stands out from the spread of all scores; read the lists as its two ends."
    rest = "stands" if total == 1 else "stand"
    return (
        f"{total:,} of {rows:,} training rows {rest} out from the noise: {noise.above:,} for, {noise.below:,} against "
        f"(scores above {number(noise.high)} or below {number(noise.low)})."
    )


def histogram(values: Tensor, noise: Noise | None) -> dict[str, Any]:
    """Return the histogram of scores, drawn on 1000 x 100: bars by the logarithm of their count, and where zero and noise end.

    The bins are of one width from the lowest to the highest score.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 1, high + 1
    counts = torch.histc(values.double(), bins=BINS, min=low, max=high)
    heights = (counts.add(1).log() / counts.max().add(1).log() * 100).round().int().tolist()

    def across(value: float) -> int:
        return min(1000, max(0, round(1000 * (value - low) / (high - low))))

    limits = [] if noise is None else [across(noise.low), across(noise.high)]
    zero = across(0.0) if low <= 0 <= high else None
    return {"bars": heights, "low": number(low), "high": number(high), "most": f"{int(counts.max()):,}", "zero": zero, "noise": limits}


NOISE = (
    f"Noise level: if scores of rows that do not matter were spread normally, as the bulk of this query's scores is (median and median "
    f"absolute deviation), all of them would stay within it in {1 - CHANCE:.0%} of cases, corrected for the number of rows (Bonferroni). "
    "Real scores have heavier tails, so it is a rule of thumb and no test."
)
