"""How well do an index's scores predict retraining, beside exact ones and the peers' projections at equal bytes?

    python bench/index_lds.py wikitext checkpoints/lm --work runs/finetune_lds/lm --name lm

On the model and the bank of `finetune_lds.py`, with its scores of EKFAC as the exact ones. Times are of one thread: `write_s`
one pass over the training rows, `query_s` all queries.
Writes results/index_lds_NAME.json.
"""

from __future__ import annotations

import argparse
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from support.finetune_setting import Setting
from support.index_peers import projected_scores

from whence.attributor import Attributor
from whence.evaluate.lds import lds
from whence.evaluate.retrain import RetrainBank, draw_masks, retrain_bank
from whence.index.fidelity import fidelity
from whence.recipes.base import load_recipe
from whence.runtime.progress import Stages

KEEPS = ("1/1024", "1/256", "1/64")
PLANS = ("factors:auto", "pca:int8", "logix:int8", "trak:int8")


def scored(attributor: Attributor, train: Any, queries: Any, plan: str, keep: str) -> dict[str, Any]:
    """Return scores of one plan with what they cost."""
    kind, dtype = plan.split(":")
    share, start = float(Fraction(keep)), time.perf_counter()
    if kind in ("logix", "trak"):
        found = projected_scores(attributor, train, queries, style=kind, keep=share, dtype=dtype)
        return {**found, "write_and_query_s": time.perf_counter() - start}
    index = attributor.index(train, strategy="ekfac", projection=kind, keep=share, dtype=dtype, name="lds", overwrite=True)
    written = time.perf_counter()
    values = index.scores(queries)
    done = time.perf_counter()
    return {"values": values, "bytes_per_row": index.row_bytes, "write_s": written - start, "query_s": done - written}


def judged(found: dict[str, Any], exact: torch.Tensor, bank: RetrainBank) -> dict[str, Any]:
    values = found.pop("values")
    score, near = lds(values.float(), bank), fidelity(values.float(), exact)
    return {**found, "spearman": near.spearman, "lds": score.mean, "low": score.low, "high": score.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["glue", "swag", "wikitext"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of retrains and scores of finetune_lds.py")
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    masks = draw_masks(len(recipe.train), options.subsets)
    bank = retrain_bank(recipe.retraining, masks, repeats=options.repeats, folder=options.work / "retrain", n_jobs=1, stages=Stages())
    setting = Setting(recipe=recipe, work=options.work, checkpoint=options.checkpoint)
    attributor = setting.attributor("ekfac")
    attributor.fit(recipe.train)
    start = time.perf_counter()
    exact = attributor.scores(recipe.queries, recipe.train, strategy="ekfac", name="last", overwrite=True).values
    results = {"exact": judged({"values": exact, "query_s": time.perf_counter() - start}, exact, bank)}
    for plan in PLANS:
        for keep in KEEPS:
            name = f"{plan} {keep}"
            results[name] = judged(scored(attributor, recipe.train, recipe.queries, plan, keep), exact, bank)
            print(name, results[name], flush=True)
    rows = [
        [name, f"{r.get('bytes_per_row', 0) / 1024:.1f}", f"{r['spearman']:.3f}", f"{r['lds']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"]
        for name, r in results.items()
    ]
    print_table(f"{len(recipe.train)} rows, {len(recipe.queries)} queries", ["rows", "KiB per row", "Spearman", "LDS"], rows)
    settings = {"train": len(recipe.train), "queries": len(recipe.queries), "subsets": options.subsets, "repeats": options.repeats}
    write_results(f"index_lds_{options.name}", {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
