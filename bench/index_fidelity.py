"""What is left of scores in an index, at equal bytes per row?

    python bench/finetune_models.py --data DATA --encoder ENCODER --out checkpoints
    python bench/index_fidelity.py glue checkpoints/sst2 --work runs/index_fidelity --name sst2

Fits EKFAC, scores every query and row exactly, then makes indexes with every projection, type and size, and compares: Spearman's
correlation per query, mean and least, before any exact scoring; recall@10, the share of the ten best rows by exact scores that
are among the ten best by the index, among the 2.5% best, which `Index.query` scores exactly at this end by default, and among
the 5% best. Damping is a tenth of each layer's mean eigenvalue, the measurement the recipe's. Bytes per row are those of all
tensors of the rows. Rows are made by the code that writes indexes, all plans of one size in one pass, and never touch the disk.
`logix` and `trak` are the peers' projections of plain gradients (support/index_peers.py).
Writes results/index_fidelity_NAME.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.common import environment, print_table, write_results
from support.index_peers import PROJECTIONS, peer_scores
from torch import Tensor

from whence.attributor import Attributor
from whence.capture.pair import IDENTITY
from whence.capture.passes import Rows, loss_of, measurement_of, run_block
from whence.capture.recorder import Recorder
from whence.capture.survey import Survey
from whence.curvature.settings import resolve
from whence.evaluate.lds import lds
from whence.evaluate.retrain import RetrainBank, draw_masks, retrain_bank
from whence.index.balance import Balance, balance
from whence.index.dense import DenseRows
from whence.index.fidelity import fidelity, recall
from whence.index.make import make_dense, make_factors
from whence.index.pilot import best_spent
from whence.index.projection import Projection, RowSettings
from whence.index.search import candidates
from whence.index.writer import Batches
from whence.recipes.base import load_recipe
from whence.runtime.progress import Stages

PLANS = ("factors:auto", "factors:int8", "pca:int8", "kronecker:int8", "sjlt:int8", "logix:int8", "trak:int8")
LARGE = Fraction(1, 64)
KEEPS = ("1/1024", "1/256", "1/64", "1/16", "1/8")
BEST, RESCORED = 10, 0.05
RECALLS = ("recall", "recall_half", "recall_rescored")


@dataclass(frozen=True)
class Plan:
    """A projection, and the coordinates that its rows and queries are in."""

    name: str
    projection: Projection
    balances: Mapping[str, Balance]

    def scores(self, stored: Any, held: Any, rows: int) -> Tensor:
        """Return scores `[query, row]`."""
        style, _ = self.name.split(":")
        if style in PROJECTIONS:
            assert isinstance(self.projection, DenseRows)
            return peer_scores(style, self.projection, stored, held).T
        return self.projection.scores(stored, held, rows).T


def hold(recorder: Recorder, asked: Rows, plans: Sequence[Plan]) -> list[Any]:
    """Return the queries as each projection holds them."""
    held = [plan.projection.hold(len(asked)) for plan in plans]

    def fill(first: int, layer: Any, gradient: Any) -> None:
        for plan, its in zip(plans, held, strict=True):
            own = plan.balances[layer.name]
            for part, values in gradient.gradients(own.queries, 2**28):
                weighted = values if own.weights is None else values * own.weights
                plan.projection.fill(its, layer.name, first + (part.start or 0), weighted)

    for block in asked.blocks():
        objective = measurement_of(recorder.task)
        run_block(recorder, asked, block, objective, lambda first: partial(fill, first), lambda n: None, first=block.start)
    return held


def planned(attributor: Attributor, recorder: Recorder, seen: Survey, rows: Rows, names: Sequence[str], keep: str) -> list[Plan]:
    """Make the projections."""
    spectrum = resolve("auto", "inverse", calibration=None, training_time=None)
    weighed, energies = attributor._curved(attributor._factors("ekfac", seen), spectrum, RowSettings())
    like = torch.zeros((), dtype=weighed.dtype)
    plain = {layer.name: balance(IDENTITY, None, like) for layer in recorder.taken}
    balances = {layer.name: balance(weighed.basis(layer.name), weighed.weight(layer.name), like) for layer in recorder.taken}
    shapes = {layer.name: layer.shape for layer in recorder.taken}
    one_hot = {layer.name for layer in recorder.taken if any(site.handler.one_hot for site in layer.sites)}
    plans = []
    for name in names:
        kind, dtype = name.split(":")
        settings = RowSettings(projection=PROJECTIONS.get(kind, kind), dtype=dtype, keep=float(Fraction(keep)))  # type: ignore[arg-type]
        if kind == "factors":
            plans.append(Plan(name, best_spent(recorder, rows, make_factors(settings, balances, energies, shapes)), balances))
        else:
            own = plain if kind in PROJECTIONS else balances
            plans.append(Plan(name, make_dense(settings, own, energies, shapes, one_hot), own))
    return plans


def made(attributor: Attributor, train: Any, queries: Any, names: Sequence[str], keep: str) -> Iterator[tuple[Plan, int, Tensor]]:
    """Yield plan, bytes per row and scores, of indexes that are made in one pass over the rows and live in memory."""
    rows, asked = (attributor._rows(data, "training", None, "auto") for data in (train, queries))
    with attributor._session(rows, train=train) as (recorder, seen):
        plans = planned(attributor, recorder, seen, rows, names, keep)
        batches = [Batches(plan.projection) for plan in plans]

        def begin(batch: Any) -> None:
            for one in batches:
                one.begin(len(batch.ids))

        def take(first: int, layer: Any, gradient: Any) -> None:
            for one in batches:
                one.open.add(layer.name, gradient)

        for block in rows.blocks():
            run_block(recorder, rows, block, loss_of(recorder.task), lambda first: partial(take, first), lambda n: None, before=begin)
        held = hold(recorder, asked, plans)
    for plan, own, its in zip(plans, batches, held, strict=True):
        stored = own.joined()
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        yield plan, size // len(train), plan.scores(stored, its, len(train))


def measured(found: Tensor, exact: Tensor, bank: RetrainBank | None) -> dict[str, Any]:
    """Compare scores of an index with exact ones, and with what retraining did."""
    near, rows = fidelity(found, exact), exact.shape[1]
    result: dict[str, Any] = {
        "spearman": near.spearman,
        "least": near.least,
        "recall": near.recall,
        "recall_half": recall(found, exact, BEST, candidates(rows, BEST, RESCORED)),
        "recall_rescored": recall(found, exact, BEST, max(BEST, round(RESCORED * rows))),
    }
    if bank is not None:
        score = lds(found, bank)
        result |= {"lds": score.mean, "low": score.low, "high": score.high}
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
    parser.add_argument("--bank", type=Path, help="work folder of finetune_lds.py: also the linear datamodeling score, on its retrains")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(options.recipe, checkpoint_dir=options.checkpoint)
    attributor = Attributor(recipe.model, recipe.task, layers=recipe.layers, run_dir=options.work, collate=recipe.collate, progress=False)
    attributor.fit(recipe.train)
    queries = [recipe.queries[number] for number in range(min(options.queries, len(recipe.queries)))]
    exact = attributor.scores(queries, recipe.train).values
    bank = None
    if options.bank:
        masks = draw_masks(len(recipe.train), options.subsets)
        bank = retrain_bank(recipe.retraining, masks, repeats=options.repeats, folder=options.bank / "retrain", n_jobs=1, stages=Stages())
    results = [{"plan": "exact", "keep": "", "bytes_per_row": 0, **measured(exact, exact, bank)}] if bank else []
    for keep in options.keeps:
        # Large rows one after the other: all of them at once would not fit.
        groups = [[plan] for plan in options.plans] if Fraction(keep) > LARGE else [options.plans]
        for group in groups:
            for plan, size, found in made(attributor, recipe.train, queries, group, keep):
                settings = plan.projection.settings
                kept = {"plan": plan.name, "keep": keep, "dtype": settings.dtype, "coordinates": settings.coordinates}
                results.append({**kept, "bytes_per_row": size, **measured(found, exact, bank)})
                print(results[-1], flush=True)
    shown = [
        [f"{r['plan']} ({r.get('dtype')}, {r.get('coordinates') or 1:g})", r["keep"], f"{r['bytes_per_row'] / 1024:.1f}"]
        + [f"{r[key]:.3f}" for key in ("spearman", "least", *RECALLS, *(("lds",) if bank else ()))]
        for r in results
    ]
    heads = ["rows", "keep", "KiB per row", "Spearman", "least", "recall@10", "of 2.5%", "of 5%", *(("LDS",) if bank else ())]
    print_table(f"{len(recipe.train)} rows, {len(queries)} queries", heads, shown)
    numbers = sum(attributor.coverage.tracked.values())
    settings = {"train": len(recipe.train), "queries": len(queries), "parameters": numbers, "damping": "0.1 of each layer's mean"}
    write_results(f"index_fidelity_{options.name}", {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
