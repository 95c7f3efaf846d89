"""Does removing the rows that scores call helpful hurt more than removing others?

    python bench/finetune_counterfactual.py wikitext checkpoints/lm --work runs/lm --name lm --remove 16 32 64

Takes scores that `finetune_lds.py` left in the work folder and trains again from the same start without the top rows: with
`--mode sum` those of the scores' sum over the first queries, with `--mode each` every query's own, for the queries that the model
classifies right by the smallest margins. Retrains are kept in the work folder, so that a run that was
stopped continues. Writes results/finetune_counterfactual_NAME.json and a picture in docs/images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from support.common import environment, write_results
from support.finetune_methods import METHODS
from support.finetune_setting import Setting

from whence.evaluate.counterfactual import counterfactual
from whence.recipes.base import load_recipe
from whence.recipes.quality import tokens_of
from whence.recipes.training import measure
from whence.report.counterfactual import counterfactual_picture
from whence.runtime.progress import Stages
from whence.tasks import CausalLM

ORDERS = ("ekfac", "gradient cosine, mean over the run", "identity", "bm25")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["glue", "swag", "wikitext"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--mode", choices=["sum", "each"], default="sum")
    parser.add_argument("--orders", nargs="*", default=list(ORDERS))
    parser.add_argument("--remove", nargs="*", type=int, required=True)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    setting = Setting(recipe=recipe, work=options.work, checkpoint=options.checkpoint)
    queries = list(range(min(options.queries, len(recipe.queries))))
    if options.mode == "each":
        with torch.no_grad():
            measured = measure(recipe.model, recipe.task, recipe.queries, recipe.collate, 32)
        queries = sorted(torch.where(measured < 0, measured, -torch.inf).argsort(descending=True)[: options.queries].tolist())
    result = counterfactual(
        {name: setting.scores(name, METHODS[name]) for name in options.orders},
        recipe.retraining,
        remove=options.remove,
        mode=options.mode,
        queries=queries,
        repeats=options.repeats,
        tokens=tokens_of(recipe, recipe.queries) if isinstance(recipe.task, CausalLM) and options.mode == "sum" else None,
        folder=options.work / "retrain",
        n_jobs=options.jobs,
        stages=Stages(),
    )
    Console(width=140).print(result.table())
    counterfactual_picture(options.pictures / f"counterfactual-{options.name}.svg", result)
    settings = {
        "train": len(recipe.train),
        "queries": len(queries),
        "repeats": options.repeats,
        "mode": options.mode,
        "key": recipe.retraining.key,
    }
    figures = {"environment": environment(), "settings": settings, "result": result.to_json()}
    write_results(f"finetune_counterfactual_{options.name}", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
