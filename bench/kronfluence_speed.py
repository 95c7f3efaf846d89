"""How much faster than Kronfluence 1.0.1 is whence on a CPU, with the same result, and how much memory does each take?

    python bench/kronfluence_speed.py                                 everything, in one run
    python bench/kronfluence_speed.py --tokens 128 --stage self       a piece; results are merged into the file
    python bench/kronfluence_speed.py --tokens 32 --stage self memory

A 6-layer BERT, 384 wide, random weights, float32, all Linear layers, 256 training examples of one length, EKFAC with
empirical Fisher, damping a tenth of each layer's mean eigenvalue, batches of 32, 2 threads. Stages alternate between
the two libraries in one process; what counts is the wall clock of the call a user makes, in medians. The peer goes
through its queries in four batches (and, for comparison, in one). Peak memory: a process of its own for each stage and
side. Scores must agree (Pearson above 0.9999) in the same run.

Writes results/kronfluence_speed.json, prints tables, exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support import flops, memory
from support.common import environment, median, pearson, read_results, write_results
from support.models import Case, speed_bert
from support.speed_tables import missed, print_memory, print_times
from torch import Tensor

EXAMPLES, QUERIES = 256, 64
# Least ratio of the peer's time to ours, by stage and tokens.
TARGETS = {
    "eigenvalues": {128: 2.7, 64: 4.4},
    "self": {128: 4.0, 64: 9.0},
    "pairwise16": {128: 2.2, 64: 2.2},
    "pairwise64": {128: 2.2, 64: 2.2},
}
STAGE_ROWS = {
    "eigenvalues": ("Fit eigenvalues",),
    "self": ("Self-influence",),
    "pairwise16": ("Query gradients", "Pairwise scores"),
    "pairwise64": ("Query gradients", "Pairwise scores"),
}
MEMORY_STAGES = ("fit", "eigenvalues", "self", "pairwise16", "pairwise64")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One length of the comparison: the case and where both sides keep their files."""

    case: Case
    tokens: int
    batch: int
    folder: Path

    def ours(self, folder: str = "ours") -> Any:
        """Open our side."""
        from support.ours import Ours

        return Ours(self.case, strategy="ekfac", batch=self.batch, folder=self.folder / f"{folder}-{self.tokens}")

    def peer(self, folder: str = "peer", *, copy_model: bool = True) -> Any:
        """Open the peer's side."""
        from support.peer import Peer

        folder_ = self.folder / f"{folder}-{self.tokens}"
        return Peer(self.case, strategy="ekfac", batch=self.batch, folder=folder_, copy_model=copy_model)


def action(side: Any, stage: str, *, query_batches: int = 1) -> Callable[[], dict[str, Tensor]]:
    """Return the call that a stage times."""
    if stage == "fit":
        return side.fit
    if stage == "eigenvalues":
        return side.fit_eigenvalues  # compared by value: both sort eigenvectors by eigenvalue
    if stage == "self":
        return side.self_influence
    count = int(stage.removeprefix("pairwise"))
    return lambda: side.pairwise(query_batch=count // query_batches, count=count)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return a call's seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def run_stage(ours: Any, peer: Any, stage: str, repeats: int) -> dict[str, Any]:
    """Time a stage on both sides in turn, each going first every other time; check that the results agree."""
    calls = {"ours": action(ours, stage), "peer": action(peer, stage, query_batches=4)}
    if stage.startswith("pairwise"):
        calls["peer, one query batch"] = action(peer, stage)
    samples: dict[str, list[float]] = {side: [] for side in [*calls, "ours, stages"]}
    correlations: list[float] = []
    for repeat in range(repeats):
        results = {}
        for side in list(calls) if repeat % 2 == 0 else reversed(calls):
            before = ours.stage_seconds()
            seconds, results[side] = timed(calls[side])
            samples[side].append(seconds)
            if side == "ours":
                spent = ours.stage_seconds()
                samples["ours, stages"].append(sum(spent[row] - before.get(row, 0.0) for row in STAGE_ROWS[stage]))
            print(f"{stage}, {side}: {seconds:.2f} s", file=sys.stderr)
        left, right = (results[side] for side in ("ours", "peer"))
        correlations.append(pearson(*(torch.cat([part[name].flatten() for name in sorted(left)]) for part in (left, right))))
    return {"seconds": samples, "pearson": correlations}


def summary(bench: Bench, stage: str, samples: dict[str, Any], rate: float) -> dict[str, Any]:
    """Add medians, ratios and the share of the machine's matrix product rate to a stage's samples."""
    medians = {side: median(values) for side, values in samples["seconds"].items()}
    work = stage_work(bench, stage)
    return {
        **samples,
        "median_seconds": medians,
        "ratio": medians["peer"] / medians["ours"],
        "ratio_stages": medians["peer"] / medians["ours, stages"],
        "target": TARGETS[stage].get(bench.tokens),
        "gflop": {"ours": work.ours / 1e9, "peer": work.peer / 1e9},
        "share_of_gemm": {
            "ours": work.ours / medians["ours, stages"] / rate,
            "peer": work.peer / medians["peer"] / rate,
        },
    }


def stage_work(bench: Bench, stage: str) -> flops.Work:
    """Return the FLOPs of a stage."""
    if stage == "eigenvalues":
        return flops.eigenvalues(bench.case, bench.tokens)
    if stage == "self":
        return flops.self_influence(bench.case, bench.tokens)
    return flops.pairwise(bench.case, bench.tokens, queries=int(stage.removeprefix("pairwise")), passes=4)


def run_times(bench: Bench, stages: list[str], repeats: int) -> dict[str, Any]:
    """Fit both sides where the folder does not hold factors yet, then time the stages."""
    ours, peer = bench.ours(), bench.peer()
    fits = {"ours": timed(ours.fit)[0], "peer": timed(peer.fit)[0]}
    print(f"fits: {fits}", file=sys.stderr)
    rates, results = [flops.gemm_rate()], {}
    for stage in stages:
        samples = run_stage(ours, peer, stage, repeats)
        rates.append(flops.gemm_rate())
        results[stage] = summary(bench, stage, samples, median(rates[-2:]))
        results[stage]["gemm_gflops"] = median(rates[-2:]) / 1e9
    return results


def run_memory(bench: Bench, options: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Measure every stage's peak memory on both sides in turn, each time in a fresh process."""
    results: dict[str, Any] = {}
    for stage in MEMORY_STAGES:
        samples: dict[str, list[dict[str, int]]] = {"ours": [], "peer": []}
        for repeat in range(repeats):
            for side in ("ours", "peer") if repeat % 2 == 0 else ("peer", "ours"):
                arguments = ["--worker", side, "--stage", stage, "--tokens", str(bench.tokens), "--work", str(bench.folder)]
                arguments += [
                    "--examples",
                    str(options.examples),
                    "--batch",
                    str(bench.batch),
                    "--attention",
                    options.attention,
                    "--threads",
                    str(options.threads),
                ]
                samples[side].append(memory.measure(arguments))
                print(f"memory, {stage}, {side}: {samples[side][-1]}", file=sys.stderr)
        results[stage] = {
            side: {
                "peak_mib": [s["peak"] / memory.MIB for s in values],
                "above_model_mib": [(s["peak"] - s["baseline"]) / memory.MIB for s in values],
            }
            for side, values in samples.items()
        }
    return results


def work_memory(bench: Bench, side: str, stage: str) -> None:
    """Be the measured process: one side, one stage. Both sides are imported before the baseline is taken."""

    def prepare() -> Callable[[], object]:
        fresh = f"memory-{side}" if stage == "fit" else side
        analysis = bench.ours(fresh) if side == "ours" else bench.peer(fresh, copy_model=False)
        return action(analysis, stage, query_batches=1 if side == "ours" else 4)

    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
        if stage == "fit":
            bench = Bench(case=bench.case, tokens=bench.tokens, batch=bench.batch, folder=Path(scratch))
        memory.report(prepare)


def merge(results: dict[str, Any], tokens: int, kind: str, parts: dict[str, Any]) -> None:
    """Put one length's stages into the results, in place of those measured before, with their own environment."""
    stored = results["tokens"].setdefault(str(tokens), {}).setdefault(kind, {})
    for stage, part in parts.items():
        stored[stage] = {**part, "environment": environment()}


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = [*TARGETS, "memory"]
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128], help="lengths of the examples")
    parser.add_argument("--stage", nargs="+", choices=[*stages, "fit"], default=stages, help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each stage")
    parser.add_argument("--memory-repeats", type=int, default=1, help="fresh processes for each stage and side")
    parser.add_argument("--batch", type=int, default=32, help="examples in a batch, on both sides")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="training rows; fewer will do for memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa", help="the model's attention, on both sides")
    parser.add_argument("--work", type=Path, help="keep factors here between pieces; default: a temporary folder")
    parser.add_argument("--no-write", action="store_true", help="only print; leave the results file as it is")
    parser.add_argument("--worker", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure what was asked for; the file is written after each length, so that an interrupted run keeps what it has."""
    results = {"tokens": {}} if options.no_write else {"tokens": {}, **read_results("kronfluence_speed")}
    measured: dict[str, Any] = {"tokens": {}}
    for tokens in options.tokens:
        case = speed_bert(tokens=tokens, train=options.examples, queries=QUERIES, attention=options.attention)
        bench = Bench(case=case, tokens=tokens, batch=options.batch, folder=folder)
        times = run_times(bench, [stage for stage in options.stage if stage in TARGETS], options.repeats)
        parts = {"times": times}
        if "memory" in options.stage:
            parts["memory"] = run_memory(bench, options, options.memory_repeats)
        for kind, part in parts.items():
            merge(results, tokens, kind, part)
            merge(measured, tokens, kind, part)
        if not options.no_write:
            results["settings"] = {
                "examples": options.examples, "batch": options.batch, "attention": options.attention, "repeats": options.repeats,
                "model": "BERT, 6 layers, hidden 384, intermediate 1536, 12 heads, vocabulary 1000, random weights",
                "layers": len(case.layers), "dtype": "float32", "fisher": "empirical",
            }  # fmt: skip
            write_results("kronfluence_speed", results)
    return measured


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if options.worker:
            case = speed_bert(tokens=options.tokens[0], train=options.examples, queries=QUERIES, attention=options.attention)
            bench = Bench(case=case, tokens=options.tokens[0], batch=options.batch, folder=folder)
            work_memory(bench, options.worker, options.stage[0])
            return 0
        results = measure(options, folder)
    print_times(results)
    print_memory(results)
    lines = missed(results)
    print("\n".join(f"MISSED {line}" for line in lines) if lines else "all targets held")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
