"""Do whence and Kronfluence 1.0.1 give the same scores, and who is right where they do not?

    python bench/kronfluence_parity.py

Part 1: four models with random weights, float32, empirical Fisher, damping a tenth of each layer's mean eigenvalue on
both sides. Identity, diagonal and ekfac scores must agree (Pearson above 0.99999); kfac must agree layer by layer up to
a factor, because the peer normalises its eigenvalues per token and whence per example.
Part 2: layers that the peer gets wrong or refuses, both sides against batch-of-one autograd in float64.

Prints two tables, writes results/kronfluence_parity.json, and exits with 1 if whence misses a threshold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support import models
from support.common import agreement, environment, pearson, print_table, relative_error, write_results
from support.defects import DEFECTS, defect_case, truth
from support.models import Case
from support.ours import Ours
from support.peer import Peer
from torch import Tensor

MODELS = {"mlp": models.mlp, "conv": models.conv_net, "bert": models.bert, "gpt2": models.gpt2}
STRATEGIES = ("identity", "diagonal", "kfac", "ekfac")
MIN_PEARSON = 0.99999
MAX_ERROR = 1e-5
# Neither number of rows divides by its batch size, so that last batches are short.
TRAIN, QUERIES, BATCH, QUERY_BATCH = 403, 13, 32, 5


def compare(case: Case, strategy: str) -> dict[str, Any]:
    """Run both libraries on a case; return the agreement of pairwise scores and self-influence."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(case, strategy=strategy, batch=BATCH, folder=Path(folder, "peer"))
        ours = Ours(case, strategy=strategy, batch=BATCH, folder=Path(folder, "ours"))
        peer.fit()
        ours.fit()
        if strategy == "kfac":
            return {"layers": _by_layer(ours, peer)}
        return {
            "pairwise": agreement(_total(ours.pairwise(query_batch=QUERY_BATCH)), _total(peer.pairwise(query_batch=QUERY_BATCH))),
            "self": agreement(_total(ours.self_influence()), _total(peer.self_influence())),
        }


def control(case: Case) -> float:
    """Return the correlation of ekfac scores when only the peer is told about padding: were it 1, part 1 could not fail."""
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(case, strategy="ekfac", batch=BATCH, folder=Path(folder, "peer"))
        ours = Ours(replace(case, mask=None), strategy="ekfac", batch=BATCH, folder=Path(folder, "ours"))
        peer.fit()
        ours.fit()
        return pearson(_total(ours.pairwise(query_batch=QUERY_BATCH)), _total(peer.pairwise(query_batch=QUERY_BATCH)))


def _total(scores: dict[str, Tensor]) -> Tensor:
    (values,) = scores.values()
    return values


def _by_layer(ours: Ours, peer: Peer) -> dict[str, dict[str, float]]:
    """Compare pairwise scores of each layer; `factor` is how many times the peer's score ours is."""
    left = ours.pairwise(query_batch=QUERY_BATCH, per_layer=True)
    right = peer.pairwise(query_batch=QUERY_BATCH, per_layer=True)
    if left.keys() != right.keys():
        raise RuntimeError(f"different layers: {sorted(left.keys() ^ right.keys())}")
    layers = {}
    for name, scores in left.items():
        factor = float((scores.double() * right[name]).sum() / right[name].double().square().sum())
        layers[name] = {**agreement(scores / factor, right[name]), "factor": factor}
    return layers


def passed(result: dict[str, Any]) -> bool:
    """Whether every correlation of a comparison is above the threshold."""
    parts = result["layers"].values() if "layers" in result else (result["pairwise"], result["self"])
    return all(part["pearson"] > MIN_PEARSON for part in parts)


def parity_rows(case: Case, results: dict[str, Any]) -> list[list[str]]:
    """Return the table's rows for one model."""
    rows = []
    for strategy, result in results.items():
        if "layers" in result:
            worst = min(result["layers"].values(), key=lambda part: part["pearson"])
            parts = {f"worst of {len(result['layers'])} layers": worst}
        else:
            parts = {"pairwise": result["pairwise"], "self-influence": result["self"]}
        for what, part in parts.items():
            spearman = f"{part['spearman_min']:.7f}"
            mark = "yes" if part["pearson"] > MIN_PEARSON else "NO"
            rows.append([case.name, strategy, what, f"{part['pearson']:.9f}", f"{part['max_difference']:.1e}", spearman, mark])
    return rows


def run_parity(names: list[str]) -> tuple[dict[str, Any], bool]:
    """Run part 1."""
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name in names:
        torch.manual_seed(0)
        case = MODELS[name](TRAIN, QUERIES)
        results[name] = {"layers": case.layers}
        compared = {}
        for strategy in STRATEGIES:
            start = time.perf_counter()
            compared[strategy] = compare(case, strategy)
            print(f"{case.name}, {strategy}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        results[name]["strategies"] = compared
        rows += parity_rows(case, compared)
        if case.mask is not None:
            results[name]["pearson_without_our_mask"] = without = control(case)
            rows.append([case.name, "ekfac", "control: mask on one side", f"{without:.9f}", "", "", ""])
    columns = ["model", "strategy", "scores", "Pearson", "max diff / max", "worst Spearman", "agrees"]
    print_table(f"whence and Kronfluence, {TRAIN} training rows, {QUERIES} queries", columns, rows)
    return results, all(passed(r) for model in results.values() for r in model["strategies"].values())


def errors(side: Callable[..., Ours | Peer], case: Case) -> dict[str, Any]:
    """Return a library's relative errors for identity scores, or its exception."""
    scores, self_influence = truth(case)
    try:
        with tempfile.TemporaryDirectory() as folder:
            analysis = side(case, strategy="identity", batch=8, folder=Path(folder))
            analysis.fit()
            return {
                "pairwise": relative_error(_total(analysis.pairwise(query_batch=3)), scores),
                "self": relative_error(_total(analysis.self_influence()), self_influence),
            }
    except Exception as error:  # noqa: BLE001  (the exception is the result)
        return {"exception": f"{type(error).__name__}: {error}".splitlines()[0][:120]}


def run_defects() -> tuple[dict[str, Any], bool]:
    """Run part 2."""
    results: dict[str, Any] = {}
    rows = []
    for defect in DEFECTS:
        case = defect_case(defect)
        results[defect.name] = {"whence": errors(Ours, case), "kronfluence": errors(partial(Peer, rewrite=False), case)}
        rows.append(
            [defect.name, *(_cell(results[defect.name][side], part) for side in ("whence", "kronfluence") for part in ("pairwise", "self"))]
        )
    columns = ["layer", "whence pairwise", "whence self", "Kronfluence pairwise", "Kronfluence self"]
    print_table("Relative error to batch-of-one autograd (float64), identity", columns, rows)
    return results, all(max(r["whence"].get(part, 1.0) for part in ("pairwise", "self")) < MAX_ERROR for r in results.values())


def _cell(result: dict[str, Any], part: str) -> str:
    return result["exception"].split(":")[0] if "exception" in result else f"{result[part]:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=[*MODELS, "none"], default=list(MODELS), help="models of part 1")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parity, agrees = run_parity([name for name in options.models if name != "none"])
    defects, right = run_defects()
    results = {
        "environment": environment(),
        "settings": {
            "train": TRAIN, "queries": QUERIES, "batch": BATCH, "query_batch": QUERY_BATCH, "dtype": "float32",
            "fisher": "empirical", "damping": "0.1 of the mean eigenvalue, by layer",
            "thresholds": {"pearson": MIN_PEARSON, "relative_error": MAX_ERROR},
        },
        "parity": parity,
        "defects": defects,
        "passed": agrees and right,
    }  # fmt: skip
    if set(options.models) == set(MODELS):  # a part of a run is no result
        write_results("kronfluence_parity", results)
    print("all thresholds held" if results["passed"] else "A THRESHOLD WAS MISSED")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
