"""What does asking an index cost, against the number of its rows?

    python bench/index_search.py wikitext checkpoints/lm --work runs/index_search --bytes 8192 --rows 10000 100000 1000000

Makes an index of the checkpoint's training rows with so many bytes per row, measures its fidelity against exact scores, and lays
its rows end to end until there are as many as asked: what is read, decoded and multiplied is what so many rows of other content
would need. Every size is asked in a process of its own, by one query several times, without exact scoring of the best: `first_s`
with the files' pages dropped from memory where the system allows it, `query_s` the median of the rest; of it `gradient_s` is
spent on the query's gradient and its decomposition, the rest on rows. `resident_mib` is the process's peak, mapped pages counted.
Writes results/index_search_NAME.json, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results

from whence.attributor import Attributor
from whence.index.fidelity import fidelity
from whence.index.index import Index
from whence.index.search import both_ends
from whence.index.writer import FINGERPRINT, IDS, about, done
from whence.recipes.base import Recipe, load_recipe
from whence.storage.shards import ShardStore

TIMES = 7


def bound(recipe: Recipe, work: Path) -> Attributor:
    return Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=work, collate=recipe.collate, progress=False)


def made(attributor: Attributor, recipe: Recipe, size: int, plan: str) -> dict[str, Any]:
    """Make the small index; return what it keeps of scores."""
    projection, dtype = plan.split(":")
    attributor.fit(recipe.train)
    whole = 4 * sum(attributor.coverage.tracked.values())
    index = attributor.index(recipe.train, projection=projection, dtype=dtype, keep=size / whole, name="small", overwrite=True)
    exact = attributor.scores(recipe.queries, recipe.train, overwrite=True).values
    near = fidelity(index.scores(recipe.queries), exact)
    return {"keep": size / whole, "bytes_per_row": index.row_bytes, "spearman": near.spearman, "recall": near.recall}


def laid(small: Index, folder: Path, rows: int) -> None:
    """Write an index of so many rows, made of the small one's."""
    if folder.exists():
        return
    view = small._stored.store
    pieces = [(name, len(ids)) for name, ids in small._stored.shards()]
    with ShardStore(folder, kind="index", settings=small.settings) as store:
        first = 0
        while first < rows:
            for name, count in pieces:
                store.write(f"part-0000/rows-{first:09d}", view.read(name))
                first += count
        store.write(about(0), {IDS: torch.arange(first), FINGERPRINT: view.read(about(0))[FINGERPRINT]})
        store.write(done(0), {"rows": torch.tensor(first)})
        store.finish({"unreached": []})


def asked(attributor: Attributor, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Ask an index; return times, memory and bytes."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    index = Index(attributor, folder)
    queries, totals, gradients = [recipe.queries[0]], [], []
    for _ in range(TIMES):
        start = time.perf_counter()
        projection, held = attributor.index_queries(queries, None, index.settings)
        ready = time.perf_counter()
        both_ends(index._stored.blocks(projection, held), 10)
        gradients.append(ready - start)
        totals.append(time.perf_counter() - start)
    return {
        "rows": len(index),
        "bytes_per_row": index.row_bytes,
        "first_s": totals[0],
        "query_s": statistics.median(totals[1:]),
        "gradient_s": statistics.median(gradients[1:]),
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--plan", default="factors:int8", help="projection:dtype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ask", type=Path, help="for the processes that it starts: only ask this index")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    attributor = bound(recipe, options.work)
    if options.ask:
        print(json.dumps(asked(attributor, recipe, options.ask)))
        return
    quality = made(attributor, recipe, options.bytes, options.plan)
    print(quality, flush=True)
    small, results = Index(attributor, options.work / "index" / "small"), []
    for rows in options.rows:
        folder = options.work / f"laid-{options.plan.replace(':', '-')}-{options.bytes}-{rows}"
        laid(small, folder, rows)
        found = subprocess.run([sys.executable, *sys.argv, "--ask", str(folder)], check=True, capture_output=True, text=True)
        results.append(json.loads(found.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    shown = [
        [str(r["rows"]), *(f"{r[key]:.3f}" for key in ("first_s", "query_s", "gradient_s")), f"{r['resident_mib']:.0f}"] for r in results
    ]
    print_table(f"{quality['bytes_per_row']:.0f} bytes per row", ["rows", "first s", "query s", "gradient s", "MiB resident"], shown)
    settings = {"plan": options.plan, "threads": options.threads, "parameters": sum(attributor.coverage.tracked.values())}
    write_results(
        f"index_search_{options.name}", {"environment": environment(), "settings": settings, "quality": quality, "results": results}
    )


if __name__ == "__main__":
    main()
