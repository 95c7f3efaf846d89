"""Are groups of corrupted training rows found, without any fine-tune?

    python bench/noisy_groups.py --data DATA/flan_cot --out runs/noisy-data
    whence train instruct --data runs/noisy-data --group group --model MODEL --lora-rank 8 --checkpoint-dir checkpoints/noisy
    python bench/noisy_groups.py --checkpoint checkpoints/noisy --name flan

The first command writes 300 clean and 200 corrupted rows in groups of 25 and 168 clean validation rows. A corrupted row has the
answer of another one (`--kind answers`), or the words of its own answer in random order (`--kind words`). The model is trained on
all 500 rows. Then every way to judge a group is compared by the area under the ROC curve of corrupted groups: `refit` by
ensembles (conditional means of 1,000 random halves), by leaving a group out and by greedy backward selection; `influence` and
`gradient` (the same refit's limits); `cosine` of gradients with the validation rows'; the published recipe's ensemble (`gradex`);
mean loss of the group; BM25 with the validation rows; random. Writes results/noisy_groups_NAME.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from support.common import environment, print_table, write_results
from torch import Tensor

from whence.attributor import Attributor
from whence.evaluate.baselines import bm25_scores
from whence.evidence.calibrating import EstimateSettings, raw_estimates, raw_options
from whence.evidence.estimating import SubsetSettings
from whence.evidence.first_order import GradientSettings, Linear, linearise_recipe
from whence.recipes.base import Recipe, load_recipe
from whence.refit.problem import Problem
from whence.refit.select import SelectOptions, select
from whence.refit.subsets import bernoulli, leave_one_group_out
from whence.refit.surrogate import conditional_means

SIZE, CLEAN, CORRUPTED, VALIDATION, LONGEST = 25, 300, 200, 168, 420
PREFIX = "bad"


def write_data(source: Path, out: Path, kind: str, seed: int) -> None:
    generator, out = random.Random(seed), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = {split: _read(source, split) for split in ("train", "validation")}
    train, validation = (
        generator.sample(rows[split], count) for split, count in (("train", CLEAN + CORRUPTED), ("validation", VALIDATION))
    )
    clean, bad = train[:CLEAN], train[CLEAN:]
    answers = [row["targets"] for row in bad]
    for place, row in enumerate(bad):
        words = answers[place].split()
        generator.shuffle(words)
        row["targets"] = answers[(place + 1) % len(bad)] if kind == "answers" else " ".join(words)
    for name, some in (("good", clean), (PREFIX, bad)):
        for place, row in enumerate(some):
            row["group"] = f"{name}-{place // SIZE:02d}"
    together = clean + bad
    generator.shuffle(together)
    for row in validation:
        row["group"] = "validation"
    for split, some in (("train", together), ("validation", validation)):
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def _read(source: Path, split: str) -> list[dict[str, Any]]:
    packed = source / f"{split}.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else (source / f"{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if len(row["inputs"]) + len(row["targets"]) < LONGEST]


def judged(linear: Linear, recipe: Recipe, ridge: float | None) -> dict[str, Tensor]:
    """Return how bad each group is by every judge, `[group]`; higher is worse."""
    assert linear.target.linear is not None
    groups = linear.groups
    members = bernoulli(groups, count=1000, seed=0).members
    halves = SubsetSettings(design="bernoulli", count=1000, seed=0).draw(groups)
    found: dict[str, Tensor] = {}
    for method in ("refit", "influence", "gradient", "gradex"):
        own = ridge if method in ("refit", "influence") else None  # the others have none
        settings = EstimateSettings(method=method, ridge=own, calibration=0 if own else 4)
        outcomes = raw_estimates(linear, halves, raw_options(linear, settings), settings).of("loss")
        found[f"{method}, ensemble"] = -conditional_means(members, outcomes, sign=-1.0, resamples=2).values
    settings = EstimateSettings(ridge=ridge, calibration=0 if ridge else 4)
    options = raw_options(linear, settings)
    without = raw_estimates(linear, leave_one_group_out(groups), options, settings).of("loss")
    found["refit, leave one out"] = -without
    problem = Problem(train=linear.train, groups=groups, target=linear.target, metric="loss", options=options)
    taken = select(problem, SelectOptions(method="backward", until="best"))
    assert len(taken.order) == len(groups) - 1, "all but the last group are taken away, one by one"
    order = [*taken.order, *(group for group in range(len(groups)) if group not in taken.order)]
    found["refit, backward"] = -torch.tensor([order.index(group) for group in range(len(groups))], dtype=torch.float64)
    found["influence"] = -problem.influence()
    unit = [gradients / gradients.norm(dim=1, keepdim=True) for gradients in map(_examples, (linear.train, linear.target.linear))]
    found["cosine"] = -groups.totals(unit[0] @ unit[1].mean(0))
    losses = linear.train.loss(torch.zeros(1, linear.train.dimensions, dtype=torch.float64))[0]
    found["loss"] = groups.totals(losses)
    found["BM25"] = -groups.totals(bm25_scores(recipe.queries, recipe.train).double().mean(0))
    found["random"] = torch.rand(len(groups), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return found


def _examples(one: Any) -> Tensor:
    return one.example_sums(one.gradients.double().T).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of flan_cot, to make the noisy rows of")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=["answers", "words"], default="answers")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--name", help="of the results")
    parser.add_argument("--dimension", type=int, default=400)
    parser.add_argument("--ridges", type=float, nargs="*", default=[], help="instead of one of the curvature's size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.data is not None:
        write_data(options.data, options.out, options.kind, options.seed)
        return
    torch.set_num_threads(1)
    recipe = load_recipe("instruct", checkpoint_dir=options.checkpoint)
    run = options.run_dir or Path("runs") / f"noisy-{options.name}"
    results: dict[str, Any] = {}
    for variant in ("pca:mean", "random:mean"):
        projection, _, _ = variant.partition(":")
        attributor = Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=run / projection, collate=recipe.collate)
        linear = linearise_recipe(attributor, recipe, GradientSettings(projection=projection, dimension=options.dimension))  # type: ignore[arg-type]
        bad = [name.startswith(PREFIX) for name in linear.groups.names]
        for ridge in options.ridges or [None]:
            areas = {name: float(roc_auc_score(bad, values.numpy())) for name, values in judged(linear, recipe, ridge).items()}
            results[f"{variant} ridge {ridge or 'auto'}"] = areas
    names = list(next(iter(results.values())))
    print_table(
        "AUC of corrupted groups", ["judge", *results], [[name, *(f"{one[name]:.3f}" for one in results.values())] for name in names]
    )
    settings = {"train": len(recipe.train), "groups": len(bad), "corrupted": sum(bad), "dimension": options.dimension}
    write_results(f"noisy_groups_{options.name}", {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
