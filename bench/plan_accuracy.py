"""How far is `whence plan` from what then happens, in time and in memory?

    python bench/plan_accuracy.py                    all three models, about 5 minutes on 2 cores
    python bench/plan_accuracy.py --case digits --no-write

A network for handwritten digits, a BERT-like encoder and a GPT-2-like model with random weights: EKFAC fit with labels drawn from
the model, scores of all queries, self-influence. The plan and the calls run in processes of their own, one after the other. Memory
is the peak resident size of the process above what it held without the model before the first call, on Linux stage by stage.

Writes results/plan_accuracy.json, prints predicted over measured; exits with 1 if a total is off by more than 30%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from support.memory import MIB, peak_bytes
from support.models import Case, cross_entropy, encoder_loss, encoder_margin, next_token_loss, pad, sentences

from whence.runtime.progress import Stages

WITHIN = 0.3
RESET = Path("/proc/self/clear_refs")


def digits() -> Case:
    """The network of the recipe, 1,200 training rows and 60 queries."""
    from whence.recipes.digits import build_network, load_data

    data = load_data()
    rows, queries = ([(row.image, row.label) for row in part] for part in (data.train, data.test[:60]))
    return Case(name="digits", model=build_network(), train=rows, queries=queries, layers=[], loss=cross_entropy, measurement=cross_entropy)


def encoder() -> Case:
    """BERT, 4 layers, 256 wide, 400 rows of 32 to 64 tokens, 40 queries."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, num_labels=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Case(
        name="encoder", model=BertForSequenceClassification(config).eval(), layers=[], collate=pad,
        loss=encoder_loss, measurement=encoder_margin,
        train=sentences(400, (32, 64), 1000, 2, seed=1), queries=sentences(40, (32, 64), 1000, 2, seed=2),
    )  # fmt: skip


def decoder() -> Case:
    """GPT-2, 2 layers, 256 wide, 160 rows of 128 tokens, 16 queries."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=256, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(
        name="decoder", model=GPT2LMHeadModel(config).eval(), layers=[], collate=pad, loss=next_token_loss, measurement=next_token_loss,
        train=sentences(160, (128, 128), 1000, None, seed=3), queries=sentences(16, (128, 128), 1000, None, seed=4),
    )  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {"digits": digits, "encoder": encoder, "decoder": decoder}


class WatchedStages(Stages):
    """Notes the peak of each stage, together with what came between it and the stage before."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with super().stage(name):
            yield
        self.peaks[name] = peak_bytes()
        reset()

    def rest(self) -> None:
        """Add what came after the last stage to it."""
        last = next(reversed(self.peaks))
        self.peaks[last] = max(self.peaks[last], peak_bytes())
        reset()


def reset() -> bool:
    """Start the process's peak anew from what it holds now; False where the system cannot."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def attributor_of(case: Case) -> Any:
    """Open a case: all layers with a handler, in a temporary run folder."""
    from support.ours import task_of

    import whence

    return whence.Attributor(case.model, task_of(case), collate=case.collate, device="cpu", progress=False)


def predicted(name: str, batch: int) -> dict[str, Any]:
    """Plan the case."""
    from whence.plan.predict import make_plan

    case = CASES[name]()
    plan = make_plan(attributor_of(case), case.train, case.queries, empirical=True, batch_size=batch, query_batch_size=batch)
    stages = {stage.name: {"seconds": stage.seconds, "peak": stage.peak_bytes, "flops": stage.flops} for stage in plan.stages}
    return {"stages": stages, "calibration_s": plan.calibration_s, "disk": dict(plan.disk_bytes)}


def measured(name: str, batch: int) -> dict[str, Any]:
    """Run the case; peaks are above what the process held before, without the model."""
    from whence.plan.state import model_bytes

    case = CASES[name]()
    warm_up()
    reset()
    # Making the model has loaded libraries that are no part of a run; its own bytes are.
    before = peak_bytes() - model_bytes(case.model)
    attributor, watched = attributor_of(case), WatchedStages()
    attributor.stages = watched
    sizes = {"batch_size": batch}
    start = time.perf_counter()
    attributor.fit(case.train, empirical=True, **sizes)
    watched.rest()
    attributor.scores(case.queries, case.train, query_batch_size=batch, **sizes)
    watched.rest()
    attributor.self_influence(case.train, **sizes)
    watched.rest()
    seconds = {row.name: row.total_s for row in watched.rows()}
    stages = {stage: {"seconds": seconds[stage], "peak": watched.peaks[stage] - before} for stage in watched.peaks}
    files = {kind: sum(p.stat().st_size for p in attributor.run.sub(kind).rglob("*.safetensors")) for kind in FOLDERS}
    return {"stages": stages, "wall_s": time.perf_counter() - start, "disk": files}


FOLDERS = ("factors", "scores", "self_influence")


def warm_up() -> None:
    """Load the libraries behind products, convolutions and eigendecompositions: they are no part of a run's memory."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 8))
    network(torch.randn(4, 1, 8, 8)).square().sum().backward()
    torch.linalg.eigh(torch.eye(16, dtype=torch.float64))


def in_fresh_process(worker: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side of one case in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of its standard error.
    """
    settings = ["--case", name, "--batch", str(options.batch), "--threads", str(options.threads)]
    done = subprocess.run([sys.executable, sys.argv[0], "--worker", worker, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{worker} of {name} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(plan: dict[str, Any], real: dict[str, Any]) -> dict[str, Any]:
    """Return predicted over measured, by stage and for the total: seconds add up, the peak is the largest.

    A stage's ratio of peaks is that of the largest so far: a process keeps most of what an earlier stage has freed, so a
    smaller stage after a larger one has no measured peak of its own.
    """
    so_far = {"planned": 0.0, "measured": 0.0}
    ratios = {}
    for name, stage in real["stages"].items():
        so_far = {"planned": max(so_far["planned"], plan["stages"][name]["peak"]), "measured": max(so_far["measured"], stage["peak"])}
        seconds = plan["stages"][name]["seconds"] / stage["seconds"]
        ratios[name] = {"seconds": seconds, "peak_so_far": so_far["planned"] / so_far["measured"]}
    sums = [sum(stage["seconds"] for stage in side["stages"].values()) for side in (plan, real)]
    disk = sum(plan["disk"].values()) / sum(real["disk"].values())
    return {"stages": ratios, "total": {"seconds": sums[0] / sums[1], "peak": so_far["planned"] / so_far["measured"], "disk": disk}}


def show(name: str, result: dict[str, Any]) -> None:
    """Print a case's table."""
    plan, real, ratio = result["predicted"], result["measured"], result["ratio"]
    rows = []
    for stage, r in ratio["stages"].items():
        p, m = plan["stages"][stage], real["stages"][stage]
        seconds = (f"{p['seconds']:.3g}", f"{m['seconds']:.3g}", f"{r['seconds']:.2f}")
        rows.append((stage, *seconds, f"{p['peak'] / MIB:.0f}", f"{m['peak'] / MIB:.0f}", f"{r['peak_so_far']:.2f}"))
    total = ratio["total"]
    rows.append(("Total", "", "", f"{total['seconds']:.2f}", "", "", f"{total['peak']:.2f}"))
    columns = ("stage", "planned s", "measured s", "ratio", "planned MiB", "measured MiB", "ratio so far")
    print_table(f"{name}: rehearsal {plan['calibration_s']:.1f} s, disk {total['disk']:.2f}", columns, rows)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", type=int, default=32, help="rows per batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="only print; leave the results file as it is")
    parser.add_argument("--worker", choices=["predicted", "measured"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.worker:
        work = predicted if options.worker == "predicted" else measured
        print(json.dumps(work(options.case[0], options.batch)))
        return 0
    results: dict[str, Any] = {"environment": environment() | {"threads": options.threads}, "batch": options.batch, "cases": {}}
    for name in options.case:
        sides = {worker: in_fresh_process(worker, name, options) for worker in ("predicted", "measured")}
        results["cases"][name] = {**sides, "ratio": compare(sides["predicted"], sides["measured"])}
        show(name, results["cases"][name])
    if not options.no_write:
        write_results("plan_accuracy", results)
    totals = {name: case["ratio"]["total"] for name, case in results["cases"].items()}
    off = [
        f"{name} {key} {total[key]:.2f}" for name, total in totals.items() for key in ("seconds", "peak") if abs(total[key] - 1) > WITHIN
    ]
    print(f"off by more than {WITHIN:.0%}: {', '.join(off)}" if off else f"all totals within {WITHIN:.0%}")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
