"""What is left of scores in an index, at equal bytes per row?

    python bench/finetune_models.py --data DATA --encoder ENCODER --out checkpoints
    python bench/index_fidelity.py glue checkpoints/sst2 --work runs/index_fidelity --name sst2

Fits EKFAC, scores every query and row exactly, then makes indexes with every projection, type and size, and compares: Spearman's
correlation per query, mean and least, before any exact scoring; recall@10, the share of the ten best rows by exact scores that
are among the ten best by the index, among the 2.5% best, which `Index.query` scores exactly at this end by default, and among
the 5% best. Damping is a tenth of each layer's mean eigenvalue, the measurement the recipe's. Bytes per row are those of the
shards on disk, everything counted.
Writes results/index_fidelity_NAME.json.
"""

from __future__ import annotations

import argparse
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from torch import Tensor

from whence.attributor import Attributor
from whence.index.fidelity import fidelity, recall
from whence.index.search import candidates
from whence.recipes.base import load_recipe

PLANS = ("factors:auto", "factors:int8", "factors:int4", "pca:int8", "pca:int4", "kronecker:int8", "sjlt:int8")
KEEPS = ("1/1024", "1/256", "1/64", "1/16", "1/8")
BEST, RESCORED = 10, 0.05
RECALLS = ("recall", "recall_half", "recall_rescored")


def measured(attributor: Attributor, train: Any, queries: Any, exact: Tensor, plan: str, keep: str) -> dict[str, Any]:
    """Make one index, ask it, and delete it."""
    projection, dtype = plan.split(":")
    start = time.perf_counter()
    index = attributor.index(train, projection=projection, dtype=dtype, keep=float(Fraction(keep)), name="fidelity", overwrite=True)
    written = time.perf_counter() - start
    start = time.perf_counter()
    found = index.scores(queries)
    asked = time.perf_counter() - start
    near, rows = fidelity(found, exact), exact.shape[1]
    result = {
        "projection": projection,
        "dtype": dtype,
        "keep": keep,
        "bytes_per_row": index.row_bytes,
        "spearman": near.spearman,
        "least": near.least,
        "recall": near.recall,
        "recall_half": recall(found, exact, BEST, candidates(rows, BEST, RESCORED)),
        "recall_rescored": recall(found, exact, BEST, max(BEST, round(RESCORED * rows))),
        "write_s": written,
        "scores_s": asked,
    }
    shutil.rmtree(index.folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["glue", "swag", "wikitext", "stdlib"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--keeps", nargs="*", default=list(KEEPS))
    parser.add_argument("--plans", nargs="*", default=list(PLANS), help="projection:dtype")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    attributor = Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=options.work, collate=recipe.collate, progress=False)
    attributor.fit(recipe.train)
    queries = [recipe.queries[number] for number in range(min(options.queries, len(recipe.queries)))]
    exact = attributor.scores(queries, recipe.train).values
    results = []
    for plan in options.plans:
        for keep in options.keeps:
            results.append(measured(attributor, recipe.train, queries, exact, plan, keep))
            print(results[-1], flush=True)
    shown = [
        [f"{r['projection']}, {r['dtype']}", r["keep"], f"{r['bytes_per_row'] / 1024:.1f}"]
        + [f"{r[key]:.3f}" for key in ("spearman", "least", *RECALLS)]
        for r in results
    ]
    heads = ["rows", "keep", "KiB per row", "Spearman", "least", "recall@10", "of 2.5%", "of 5%"]
    print_table(f"{len(recipe.train)} rows, {len(queries)} queries", heads, shown)
    numbers = sum(attributor.coverage.tracked.values())
    settings = {"train": len(recipe.train), "queries": len(queries), "parameters": numbers, "damping": "0.1 of each layer's mean"}
    write_results(f"index_fidelity_{options.name}", {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
