"""What does asking an index cost, against the number of its rows?

    python bench/index_search.py wikitext checkpoints/lm --work runs/index_search --bytes 8192 --rows 10000 100000 1000000

Makes an index of the checkpoint's rows with so many bytes per row (give `--max-train-rows` more than it was trained on, so that
there are many different ones), measures its fidelity against exact scores, and lays its rows end to end, in shards as large as
whence writes them, until there are as many as asked. Rows that are landmarks of the coarse vectors are not laid, so that none is
known better than a new row would be. Every size is asked in a process of its own, by one query several times, without exact scoring
of the best: `first_s` with the files' pages dropped from memory where the system allows it, `query_s` the median of the rest; of it
`gradient_s` is spent on the query's gradient and its decomposition, the rest on rows. `all_s` is the median where all rows are
read. `resident_mib` is the process's peak, mapped pages counted. `coarse_recall`: of the ten best of the different rows, by the
index's own scores, how many are among the so many percent that the coarse vectors put first.
Writes results/index_search_NAME.json.
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
from torch import Tensor

from whence.attributor import Attributor
from whence.index.coarse import LANDMARKS, coarse_vectors, landmarks, products
from whence.index.factors import FactorRows
from whence.index.index import Index
from whence.index.names import COARSE, COUNT, FINGERPRINT, IDS, NORM, about, coarse_name, done
from whence.index.projection import Projection
from whence.index.search import both_ends
from whence.index.writer import shard_ranges
from whence.recipes.base import Recipe, load_recipe
from whence.storage.shards import ShardStore

TIMES = 7


def bound(recipe: Recipe, work: Path) -> Attributor:
    return Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=work, collate=recipe.collate, progress=False)


def made(attributor: Attributor, recipe: Recipe, size: int, plan: str) -> tuple[dict[str, Any], Projection]:
    """Make the small index; return what it keeps of scores, and its projection."""
    projection, dtype = plan.split(":")
    attributor.fit(recipe.train)
    whole = 4 * sum(attributor.coverage.tracked.values())
    index = attributor.index(recipe.train, projection=projection, dtype=dtype, keep=size / whole, name="small")
    used, held = attributor.index_queries(recipe.queries, None, index.settings)
    found = {"keep": size / whole, "different_rows": len(index), "bytes_per_row": index.row_bytes, "fidelity": vars(index.fidelity)}
    if isinstance(used, FactorRows):
        found["coarse_recall"] = coarse_recall(index, used, held)
    return found, used


def split(index: Index, projection: FactorRows) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the small index's rows, the landmarks' shard, and the places of the rows that are no landmarks."""
    view = index._stored.store
    parts = [(view.read(name), len(ids)) for name, ids in index._stored.shards()]
    whole = projection.join([rows for rows, _ in parts], [count for _, count in parts])
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    chosen, rest = (some.sort().values for some in (order[: len(index) // 2], order[len(index) // 2 :]))
    chosen = chosen[:LANDMARKS]
    return whole, landmarks(projection, projection.at(whole, chosen), len(chosen)), rest


def coarse_recall(index: Index, projection: FactorRows, held: Any) -> dict[str, Any]:
    """Return how many of the ten best of the rows that are no landmarks the coarse vectors put among the first percents."""
    whole, shared, rest = split(index, projection)
    rows = projection.at(whole, rest)
    queries = projection.scores(shared, held, len(shared["basis"])).T @ shared["basis"]
    near = products(coarse_vectors(projection, rows, len(rest), shared), queries).T
    best = projection.scores(rows, held, len(rest)).T.topk(10, dim=1).indices
    places = near.argsort(dim=1, descending=True).argsort(dim=1).gather(1, best)
    shares = {f"{share:g}": float((places < share * len(rest)).float().mean()) for share in (0.02, 0.05, 0.1, 0.2)}
    return {"landmarks": len(shared["basis"]), "rows": len(rest), "of_the_ten_best": shares}


def laid(small: Index, projection: Projection, folder: Path, rows: int) -> None:
    """Write an index of so many rows, made of the small one's, in shards of the writer's size; one that is there stays."""
    if folder.exists():
        return
    view, shared = small._stored.store, None
    if isinstance(projection, FactorRows):
        whole, shared, rest = split(small, projection)
    else:
        whole = projection.join(*map(list, zip(*((view.read(name), len(ids)) for name, ids in small._stored.shards()), strict=True)))
        rest = torch.arange(len(small))
    norms, pieces = small.self_influence, projection.at(whole, rest)
    vectors = {} if shared is None else coarse_vectors(projection, pieces, len(rest), shared)
    with ShardStore(folder, kind="index", settings=small.settings) as store:
        if shared is not None:
            store.write(COARSE, shared)
        for shard in shard_ranges(rows, projection.row_bytes):
            places = torch.arange(shard.start, shard.stop) % len(rest)
            turns = [part.sort().values for part in places.split(len(rest))]
            joined = projection.join([projection.at(pieces, turn) for turn in turns], list(map(len, turns)))
            name = f"part-0000/rows-{shard.start:09d}"
            store.write(name, {**joined, NORM: norms[rest[places]]})
            if shared is not None:
                store.write(coarse_name(name), {key: values[places] for key, values in vectors.items()})
        store.write(about(0), {IDS: torch.arange(rows), FINGERPRINT: view.read(about(0))[FINGERPRINT]})
        store.write(done(0), {COUNT: torch.tensor(rows)})
        store.finish({"unreached": []})


def asked(attributor: Attributor, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Ask an index; return times, memory and bytes."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    index = Index(attributor, folder)
    queries, totals, gradients, alls = [recipe.queries[0]], [], [], []
    for _ in range(TIMES):
        start = time.perf_counter()
        asked = attributor.index_queries(queries, None, index.settings)
        gradients.append(time.perf_counter() - start)
        both_ends(index._blocks(asked, 10, None), 10)
        totals.append(time.perf_counter() - start)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(3):
        start = time.perf_counter()
        both_ends(index._blocks(asked, 10, 0), 10)
        alls.append(time.perf_counter() - start + statistics.median(gradients[1:]))
    return {
        "rows": len(index),
        "bytes_per_row": index.row_bytes,
        "first_s": totals[0],
        "query_s": statistics.median(totals[1:]),
        "gradient_s": statistics.median(gradients[1:]),
        "all_s": statistics.median(alls),
        "resident_mib": resident,
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
    parser.add_argument("--max-train-rows", type=int, help="rows of the small index")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ask", type=Path, help="for the processes that it starts: only ask this index")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint, max_train_rows=options.max_train_rows)
    attributor = bound(recipe, options.work)
    if options.ask:
        print(json.dumps(asked(attributor, recipe, options.ask)))
        return
    quality, projection = made(attributor, recipe, options.bytes, options.plan)
    print(quality, flush=True)
    small, results = Index(attributor, options.work / "index" / "small"), []
    for rows in options.rows:
        folder = options.work / f"laid-{options.plan.replace(':', '-')}-{options.bytes}-{rows}"
        laid(small, projection, folder, rows)
        found = subprocess.run([sys.executable, *sys.argv, "--ask", str(folder)], check=True, capture_output=True, text=True)
        results.append(json.loads(found.stdout.splitlines()[-1]))
        print(results[-1], flush=True)
    times = ["first_s", "query_s", "gradient_s", "all_s"]
    shown = [[str(r["rows"]), *(f"{r[key]:.3f}" for key in times), f"{r['resident_mib']:.0f}"] for r in results]
    header = ["rows", "first s", "query s", "gradient s", "all rows s", "MiB resident"]
    print_table(f"{quality['bytes_per_row']:.0f} bytes per row", header, shown)
    settings = {"plan": options.plan, "threads": options.threads, "parameters": sum(attributor.coverage.tracked.values())}
    write_results(
        f"index_search_{options.name}", {"environment": environment(), "settings": settings, "quality": quality, "results": results}
    )


if __name__ == "__main__":
    main()
