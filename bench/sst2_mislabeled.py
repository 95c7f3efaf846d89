"""Wrong labels in SST-2: who finds them, and what dropping them buys.

    whence train glue --task sst2 --flip 0.1 --model MODEL ... --checkpoint-dir checkpoints/flipped
    python bench/sst2_mislabeled.py checkpoints/flipped --work runs/sst2_mislabeled

Ranks the training rows by self-influence (EKFAC and identity, and identity over the run), by their loss, and by cleanlab's two ways
from five-fold cross-validated probabilities; gives recall and area under the ROC curve. Then drops as many rows as were flipped, by each
ranking and at random, trains again with three seeds, and measures the validation rows. Writes results/NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from support.common import environment, print_table, write_results
from torch import Tensor

from whence.attributor import Attributor
from whence.checkpoints import Checkpoints
from whence.evaluate.mislabeled import recall_curve
from whence.evaluate.retrain import RetrainSpec, retrain_all
from whence.evidence.compare import suspicious_orders
from whence.recipes.base import Recipe, load_recipe
from whence.recipes.quality import quality
from whence.recipes.retraining import START, Retraining
from whence.recipes.start import load_start
from whence.recipes.training import train_model
from whence.runtime.progress import Stages

MARKS = (0.05, 0.1, 0.2, 0.3)


def probabilities(recipe: Recipe, checkpoint: Path, train: list[int], test: list[int]) -> np.ndarray:
    """Train from the saved start on some rows; return the probabilities `[row, class]` of others."""
    procedure = recipe.retraining
    assert isinstance(procedure, Retraining)
    model = load_start(procedure.family, checkpoint / START, procedure.training)
    train_model(model, [recipe.train[row] for row in train], recipe.collate, procedure.training, seed=procedure.training.seed)
    parts = []
    with torch.no_grad():
        for start in range(0, len(test), 32):
            batch = recipe.collate([recipe.train[row] for row in test[start : start + 32]])
            parts.append(model(**{key: value for key, value in batch.items() if key != "labels"}).logits.softmax(-1))
    return torch.cat(parts).double().numpy()


def cleanlab_orders(recipe: Recipe, checkpoint: Path, work: Path) -> dict[str, Tensor]:
    """Return cleanlab's rankings; none if it is not installed."""
    try:
        from support.cleanlab_peer import confident_learning_scores, cross_validated_probabilities, label_quality_scores
    except ModuleNotFoundError as error:
        print(f"cleanlab is left out: {error.name} is not installed", file=sys.stderr)
        return {}
    labels, kept = recipe.classes.numpy(), work / "probabilities.npy"
    if not kept.is_file():
        work.mkdir(parents=True, exist_ok=True)

        def fit_predict(train: Any, test: Any) -> np.ndarray:
            return probabilities(recipe, checkpoint, list(map(int, train)), list(map(int, test)))

        np.save(kept, cross_validated_probabilities(fit_predict, labels))
    found = np.load(kept, allow_pickle=False)
    return {
        "cleanlab, confident learning": torch.from_numpy(np.ascontiguousarray(confident_learning_scores(found, labels))),
        "cleanlab, label quality (5 folds)": torch.from_numpy(np.ascontiguousarray(label_quality_scores(found, labels))),
    }


def over_run(recipe: Recipe, work: Path) -> dict[str, Tensor]:
    """Return the ranking by the gradient's norm, mean over the snapshots of the run: TracIn's self-influence (G. Pruthi et al., 2020)."""
    files = [file for file, _ in recipe.snapshots]
    checkpoints = Checkpoints(recipe.model, recipe.task, files, run_dir=work / "over-run", collate=recipe.collate, progress=False)
    return {"gradient norm, mean over the run": checkpoints.fit(recipe.train, strategy="identity").self_influence(recipe.train)}


def effects(recipe: Recipe, orders: dict[str, Tensor], work: Path, repeats: int, jobs: int) -> dict[str, Any]:
    """Drop as many rows as were flipped by each order, train again, and return accuracy and measurement of the queries."""
    rows, count = range(len(recipe.train)), int(recipe.flipped.sum())
    kept = {"all rows": list(rows), "without the flipped rows": [row for row in rows if not recipe.flipped[row]]}
    for name, order in orders.items():
        gone = set(torch.argsort(order, descending=True, stable=True)[:count].tolist())
        kept[f"without the first by {name}"] = [row for row in rows if row not in gone]
    key = recipe.retraining.key
    specs = [RetrainSpec(key=key, rows=tuple(left), seed=seed) for left in kept.values() for seed in range(repeats)]
    measured = torch.stack(retrain_all(recipe.retraining, specs, folder=work / "retrain", n_jobs=jobs, stages=Stages()))
    measured = measured.view(len(kept), repeats, -1)
    accuracy = (measured < 0).double().mean(-1)
    return {
        name: {"accuracy": accuracy[n].mean().item(), "of_each_seed": accuracy[n].tolist(), "margin": -measured[n].mean().item()}
        for n, name in enumerate(kept)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", default="sst2_mislabeled", help="of the results")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe("glue", checkpoint_dir=options.checkpoint)
    attributor = Attributor(recipe.model, recipe.task, run_dir=options.work / "run", collate=recipe.collate)
    attributor.fit(recipe.train)
    orders = (
        suspicious_orders(attributor, recipe) | over_run(recipe, options.work) | cleanlab_orders(recipe, options.checkpoint, options.work)
    )
    flipped = recipe.flipped
    curves = {name: recall_curve(order, flipped) for name, order in orders.items()}
    found = {
        name: {
            "auc": float(roc_auc_score(flipped.numpy(), orders[name].numpy())), **{f"{m:.0%}": curve.at(m) for m in MARKS},
            "recall": [curve.at(share / 50) for share in range(51)],
        }
        for name, curve in curves.items()
    }  # fmt: skip
    bought = effects(recipe, orders, options.work, options.repeats, options.jobs)
    rows = [[name, f"{one['auc']:.3f}", *(f"{one[f'{m:.0%}']:.1%}" for m in MARKS)] for name, one in found.items()]
    print_table(f"{int(flipped.sum())} of {len(flipped)} labels flipped", ["ranking", "AUC", *(f"first {m:.0%}" for m in MARKS)], rows)
    print_table(
        "trained again", ["on", "accuracy", "margin"], [[n, f"{o['accuracy']:.3f}", f"{o['margin']:.3f}"] for n, o in bought.items()]
    )
    settings = {"rows": len(flipped), "flipped": int(flipped.sum()), "queries": len(recipe.queries), "key": recipe.retraining.key}
    figures = {"environment": environment(), "settings": settings | {"model": quality(recipe)}, "rankings": found, "trained_again": bought}
    write_results(options.name, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
