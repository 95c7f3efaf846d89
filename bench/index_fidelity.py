"""What is left of scores in an index, at equal bytes per row?

    python bench/finetune_models.py --data DATA --encoder ENCODER --out checkpoints
    python bench/index_fidelity.py glue checkpoints/sst2 --work runs/index_fidelity --name sst2

Fits EKFAC, scores every query and row exactly, then makes indexes with every projection, type and size, and compares: Spearman's
correlation per query, mean and least, before any exact scoring; recall@10, the share of the ten best rows by exact scores that
are among the candidates of `Index.query` at this end, the 2.5% best by the index, and so in its answer after exact scoring.
Damping is a tenth of each layer's mean eigenvalue, the measurement the recipe's. Bytes per row are those of the shards on disk,
everything counted.
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
from scipy.stats import spearmanr
from support.common import environment, print_table, write_results
from torch import Tensor

from whence.attributor import Attributor
from whence.index.index import candidates
from whence.recipes.base import load_recipe

PLANS = (("factors", "int8"), ("factors", "int4"), ("factors", "bfloat16"), ("pca", "int8"), ("pca", "int4"), ("kronecker", "int8"), ("sjlt", "int8"))
KEEPS = ("1/1024", "1/256", "1/64", "1/16", "1/8")
BEST, RESCORED = 10, 0.05


def recall(found: Tensor, exact: Tensor) -> float:
    """Return the share of the best rows by exact scores that are among the candidates by the index, mean over queries."""
    best = exact.topk(BEST, dim=1).indices
    rescored = found.topk(candidates(exact.shape[1], BEST, RESCORED), dim=1).indices
    return float((best.unsqueeze(2) == rescored.unsqueeze(1)).any(2).double().mean())


def measured(attributor: Attributor, train: Any, queries: Any, exact: Tensor, projection: str, dtype: str, keep: str) -> dict[str, Any]:
    """Make one index, ask it, and delete it."""
    start = time.perf_counter()
    index = attributor.index(train, projection=projection, dtype=dtype, keep=float(Fraction(keep)), name="fidelity", overwrite=True)
    written = time.perf_counter() - start
    start = time.perf_counter()
    found = index.scores(queries)
    asked = time.perf_counter() - start
    correlations = torch.tensor([spearmanr(one, other).statistic for one, other in zip(found, exact, strict=True)])
    result = {
        "projection": projection, "dtype": dtype, "keep": keep, "bytes_per_row": index.row_bytes, "spearman": correlations.mean().item(),
        "least": correlations.min().item(), "recall": recall(found, exact), "write_s": written, "scores_s": asked,
    }  # fmt: skip
    shutil.rmtree(index.folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["glue", "swag", "wikitext"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--keeps", nargs="*", default=list(KEEPS))
    parser.add_argument("--plans", nargs="*", default=[":".join(plan) for plan in PLANS], help="projection:dtype")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    attributor = Attributor(recipe.model, recipe.task, run_dir=options.work, collate=recipe.collate, progress=False)
    attributor.fit(recipe.train)
    queries = [recipe.queries[number] for number in range(min(options.queries, len(recipe.queries)))]
    exact = attributor.scores(queries, recipe.train).values
    plans = [plan.split(":") for plan in options.plans]
    results = []
    for projection, dtype in plans:
        for keep in options.keeps:
            results.append(measured(attributor, recipe.train, queries, exact, projection, dtype, keep))
            print(results[-1], flush=True)
    rows = [
        [f"{r['projection']}, {r['dtype']}", r["keep"], f"{r['bytes_per_row'] / 1024:.1f}", f"{r['spearman']:.3f}", f"{r['recall']:.3f}"]
        for r in results
    ]
    print_table(f"{len(recipe.train)} rows, {len(queries)} queries", ["rows", "keep", "KiB per row", "Spearman", "recall@10"], rows)
    numbers = sum(attributor.coverage.tracked.values())
    settings = {"train": len(recipe.train), "queries": len(queries), "parameters": numbers, "damping": "0.1 of each layer's mean"}
    write_results(f"index_fidelity_{options.name}", {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
