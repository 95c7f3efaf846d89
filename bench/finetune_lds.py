"""Do scores predict what retraining does, for fine-tuned Hugging Face models, and which scores do it best?

    whence train glue --task sst2 --model MODEL ... --checkpoint-dir checkpoints/sst2
    python bench/finetune_lds.py glue checkpoints/sst2 --work runs/finetune_lds/sst2 --name sst2

The model is trained again from the same start on random halves of its training rows; each method scores the training rows
for the validation rows on the model of all rows; its linear datamodeling score (LDS) says how well it ranks the retrained
models. Retrains and scores are kept in the work folder; a run that was stopped continues. Peers that are not installed are
left out, which is said. Writes results/finetune_lds_NAME.json. The commands of the committed results: README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from support.finetune_methods import METHODS
from support.finetune_peers import PEERS
from support.finetune_setting import Setting

from whence.evaluate.lds import Lds, lds
from whence.evaluate.retrain import RetrainBank, draw_masks, retrain_bank
from whence.recipes.base import load_recipe
from whence.recipes.quality import quality
from whence.runtime.progress import Stages

REFERENCE = "ekfac"


def judged(setting: Setting, bank: RetrainBank, names: list[str]) -> dict[str, Lds]:
    """Score and judge every method; one whose package is missing is left out."""
    results = {}
    for name in names:
        try:
            results[name] = lds(setting.scores(name, {**METHODS, **PEERS}[name]), bank)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error.name} is not installed", file=sys.stderr)
            continue
        print(f"{name}: {results[name].mean:.3f}", file=sys.stderr, flush=True)
    return results


def to_json(score: Lds, reference: Lds) -> dict[str, Any]:
    return {"lds": score.mean, "low": score.low, "high": score.high, "minus_reference": score.minus(reference)}


def show(results: dict[str, Lds], bank: RetrainBank) -> None:
    """Print the table."""
    first = results[REFERENCE]
    rows = [
        [name, f"{s.mean:.3f} [{s.low:.3f}, {s.high:.3f}]", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*s.minus(first))]
        for name, s in results.items()
    ]
    subsets, repeats, queries = bank.measurements.shape
    quality_of_bank = f"reliability {first.reliability:.3f}, ceiling {first.ceiling:.3f}"
    print_table(f"{subsets} subsets, {repeats} retrains each, {queries} queries; {quality_of_bank}", ["method", "LDS", "less ekfac"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=["glue", "swag", "wikitext"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of retrains and scores")
    parser.add_argument("--name", required=True, help="of the results")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="retrains at a time")
    parser.add_argument("--methods", nargs="*", help="only these; nothing is written")
    parser.add_argument("--kept", action="store_true", help="only methods whose scores are in the work folder already")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    masks = draw_masks(len(recipe.train), options.subsets)
    bank = retrain_bank(
        recipe.retraining, masks, repeats=options.repeats, folder=options.work / "retrain", n_jobs=options.jobs, stages=Stages()
    )
    setting = Setting(recipe=recipe, work=options.work, checkpoint=options.checkpoint)
    names = options.methods or [name for name in (*METHODS, *PEERS) if not options.kept or setting.file(name).is_file()]
    results = judged(setting, bank, names)
    if options.methods:
        return 0
    show(results, bank)
    first = results[REFERENCE]
    figures = {
        "environment": environment(),
        "settings": {
            "key": recipe.retraining.key, "train": len(recipe.train), "queries": len(recipe.queries), "subsets": len(masks),
            "rows_of_a_subset": int(masks[0].sum()), "repeats": options.repeats, "model": quality(recipe),
            "interval": "95%, bootstrap over queries and subsets",
        },
        # One retrain per subset tells nothing of the bank's reliability.
        "bank": {"reliability": first.reliability, "ceiling": first.ceiling} if options.repeats > 1 else None,
        "reference": REFERENCE,
        "methods": {name: to_json(score, first) for name, score in results.items()},
    }  # fmt: skip
    write_results(f"finetune_lds_{options.name}", figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
