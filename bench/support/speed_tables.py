"""The tables of the speed comparison, and which of its targets are missed."""

from __future__ import annotations

from typing import Any

from support.common import median, print_table

MIN_PEARSON = 0.9999


def print_times(results: dict[str, Any]) -> None:
    """Print the times of all lengths that are in the results."""
    rows = []
    for tokens, parts in sorted(results["tokens"].items(), key=lambda item: int(item[0])):
        for stage, part in parts.get("times", {}).items():
            seconds, share, target = part["median_seconds"], part["share_of_gemm"], part["target"]
            alone = seconds.get("peer, one query batch")
            row = [f"{tokens} tokens, {stage}", f"{seconds['ours']:.2f}", f"{seconds['ours, stages']:.2f}", f"{seconds['peer']:.2f}"]
            row += [f"{alone:.2f}" if alone else "", f"{part['ratio']:.2f}", f"{target}" if target else "", f"{min(part['pearson']):.7f}"]
            rows.append([*row, f"{part['gflop']['ours']:.0f}", f"{share['ours']:.0%}", f"{share['peer']:.0%}"])
    columns = ["stage", "ours s", "of it stage", "peer s", "peer 1 batch", "ratio", "target", "Pearson", "our GFLOP", "of GEMM", "peer's"]
    print_table("Medians of wall-clock seconds", columns, rows)


def print_memory(results: dict[str, Any]) -> None:
    """Print the peaks of all lengths that are in the results."""
    rows = []
    for tokens, parts in sorted(results["tokens"].items(), key=lambda item: int(item[0])):
        for stage, part in parts.get("memory", {}).items():
            cells = [f"{median(part[side][kind]):.0f}" for kind in ("above_model_mib", "peak_mib") for side in ("ours", "peer")]
            rows.append([f"{tokens} tokens, {stage}", *cells])
    columns = ["stage", "ours above model", "peer above model", "ours in all", "peer in all"]
    print_table("Peak resident memory in MiB, median over fresh processes", columns, rows)


def missed(results: dict[str, Any]) -> list[str]:
    """Return a line for every target that the results miss."""
    lines = []
    for tokens, parts in results["tokens"].items():
        for stage, part in parts.get("times", {}).items():
            if part["target"] and part["ratio"] < part["target"]:
                lines.append(f"{tokens} tokens, {stage}: {part['ratio']:.2f} times faster, the target is {part['target']}")
            if min(part["pearson"]) < MIN_PEARSON:
                lines.append(f"{tokens} tokens, {stage}: results differ, Pearson {min(part['pearson']):.7f}")
        for stage, part in parts.get("memory", {}).items():
            ours, peer = (median(part[side]["above_model_mib"]) for side in ("ours", "peer"))
            if ours > peer:
                lines.append(f"{tokens} tokens, {stage}: {ours:.0f} MiB above the model, the peer {peer:.0f}")
    return lines
