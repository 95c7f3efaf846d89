"""What both comparisons share: the environment they ran in, agreement of two score matrices, tables, result files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor

RESULTS = Path(__file__).parent.parent / "results"
PACKAGES = ("torch", "transformers", "numpy", "kronfluence", "accelerate", "whence")


def environment() -> dict[str, Any]:
    """Return what a reader needs to place a figure: versions, processor, threads, date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": next((line.strip(" -") for line in torch.__config__.show().splitlines() if "Math Kernel" in line), "?"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or "unknown"
    return f"{name}, family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else name


def pearson(ours: Tensor, peer: Tensor) -> float:
    """Return Pearson's correlation over all entries, in float64."""
    x, y = (values.double().flatten() - values.double().mean() for values in (ours, peer))
    return float((x @ y) / (x.norm() * y.norm()))


def spearman_rows(ours: Tensor, peer: Tensor) -> list[float]:
    """Return Spearman's correlation of each row `[train]` of two `[query, train]` matrices."""
    ranks = [torch.from_numpy(rankdata(values.double().numpy(), axis=-1)) for values in (ours, peer)]
    return [pearson(x, y) for x, y in zip(*ranks, strict=True)]


def relative_error(values: Tensor, truth: Tensor) -> float:
    """Return `|values - truth| / |truth|` in the Euclidean norm over all entries."""
    return float((values.double() - truth.double()).norm() / truth.double().norm())


def agreement(ours: Tensor, peer: Tensor) -> dict[str, float]:
    """Compare two score matrices `[query, train]` (or vectors `[train]`).

    `max_difference` is the largest difference as a share of the peer's largest score; `norm_difference` the
    relative difference in norm; `spearman_min` the worst query's rank correlation.
    """
    ours, peer = torch.atleast_2d(ours), torch.atleast_2d(peer)
    if ours.shape != peer.shape:
        raise ValueError(f"scores of different shapes: ours {tuple(ours.shape)}, the peer's {tuple(peer.shape)}")
    return {
        "pearson": pearson(ours, peer),
        "max_difference": float((ours - peer).abs().max() / peer.abs().max()),
        "norm_difference": relative_error(ours, peer),
        "spearman_min": min(spearman_rows(ours, peer)),
    }


def median(samples: Sequence[float]) -> float:
    """Return the median of the samples."""
    return statistics.median(samples)


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write `results/NAME.json`, whole or not at all, and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    return path


def read_results(name: str) -> dict[str, Any]:
    """Return `results/NAME.json`, or an empty mapping if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    # A fixed width keeps the tables whole in files and logs.
    Console(width=140).print(table)
