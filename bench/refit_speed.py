"""How long do thousands of refits take in projected space, and do they come to the point that one at a time comes to?

    python bench/refit_speed.py

Made-up gradients whose dimensions fall off in size, as projected gradients do, and outputs that the refit moves by about as much as
they differ. 10,000 subsets of half of 100 groups, 2,000 rows, k = 400: the goal is a minute on 2 processors, with a relative error
of `w` of 1e-3 at most beside the exact solver. `OMP_NUM_THREADS=1` is best: blocks of subsets then share the processors.
Exits with 1 if the goal is missed. Writes results/refit_speed.json.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
from support.common import environment, print_table, write_results

from whence.refit.linear import Linearised
from whence.refit.solve import RefitOptions, refit, refit_groups
from whence.refit.subsets import fixed_share, groups_of

SUBSETS, GROUPS, ROWS, K = 10_000, 100, 2000, 400
CHECKED = 5
GOAL_S, GOAL_ERROR = 60.0, 1e-3


def rows(count: int, k: int) -> Linearised:
    generator = torch.Generator().manual_seed(0)
    return Linearised(
        outputs=2 * torch.randn(count, generator=generator) + 0.5,
        gradients=3 * torch.logspace(0, -1.5, k) * torch.randn(count, k, generator=generator),
        example=torch.arange(count),
        weights=torch.ones(count),
        examples=count,
    )


def timed(ridge: float, steps: int | None) -> dict[str, Any]:
    linear, groups = rows(ROWS, K), groups_of([row % GROUPS for row in range(ROWS)])
    subsets = fixed_share(groups, count=SUBSETS)
    options = RefitOptions(ridge=ridge, steps=steps)
    wall, processor = time.perf_counter(), time.process_time()
    found = refit_groups(linear, groups.numbers, subsets.members, options)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    exact = refit(linear, subsets.example_masks()[:CHECKED], RefitOptions(ridge=ridge, steps=steps, tolerance=1e-10))
    errors = (found.w[:CHECKED] - exact.w).norm(dim=1) / exact.w.norm(dim=1)
    moves = found.w[:CHECKED] @ linear.gradients.double().T
    return {
        "ridge": ridge,
        "steps": steps,
        "wall_s": wall,
        "processor_s": processor,
        "mean_steps": float(found.steps.double().mean()),
        "converged": float(found.converged.double().mean()),
        "outputs_moved_by": float(moves.std()),
        "relative_error": float(errors.max()),
    }


def main() -> int:
    entries = [timed(100.0, None), timed(10.0, None), timed(10.0, 1)]
    names = ["ridge", "steps", "wall_s", "processor_s", "mean_steps", "outputs_moved_by", "relative_error"]
    print_table(
        f"{SUBSETS:,} subsets of {GROUPS} groups, {ROWS:,} rows, k = {K}",
        names,
        [["until converged" if entry[name] is None else f"{entry[name]:.3g}" for name in names] for entry in entries],
    )
    sizes = {"subsets": SUBSETS, "groups": GROUPS, "rows": ROWS, "k": K, "threads": os.environ.get("OMP_NUM_THREADS")}
    write_results("refit_speed", {"environment": environment(), "sizes": sizes, "runs": entries})
    missed = [entry for entry in entries if entry["wall_s"] > GOAL_S or entry["relative_error"] > GOAL_ERROR]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
