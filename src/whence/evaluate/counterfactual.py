"""Do the rows that scores call helpful matter? Remove them, train again, and see how far the queries rise.

Two designs. `"each"`: every query by itself loses its own top rows, and counts as flipped if most of the models trained
again misclassify it. `"sum"`: the scores of some queries are summed, the top rows of the sum are removed for all of them
together, and their mean measurement or perplexity is followed. A random order stands beside every order that is given.

- Only rows with a positive score are removed: an order that calls fewer rows helpful than are to go removes those, and the
  result says for how many queries. Rows of equal score come in a random order.
- Repeat r has the same training seed for all orders, removals and queries, and for the training on all rows that it is
  compared with: what the seed alone does drops out.
- With `"each"` only those queries are taken that every base model classifies right (measurement below 0); the others are
  counted. They are chosen by the same base models that removals are compared with, which makes for a small rise in any
  order, the random one included: compare orders with each other.
- There are `base_repeats` + (orders + 1) x removals x repeats trainings, with `"each"` the latter for every query; equal ones
  run once.

Kronfluence's scripts (`examples/glue` and `examples/wikitext`, `run_counterfactual.py`) have the same two designs; here
differ: once a query has flipped they count it as flipped for all larger removals without a training, here every removal is
trained; their random order for classifiers takes its rows from the first 100 places of the evaluation set's labels, here it
draws from all training rows, anew for every query and repeat; they give no intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Unpack

import torch
from torch import Tensor

from whence.errors import ConfigError, DataError
from whence.evaluate.estimates import check_resamples
from whence.evaluate.removal import Counterfactual
from whence.evaluate.retrain import Procedure, RetrainSpec, Running, repeat_seed, retrain_all
from whence.runtime.batches import check_rows

RANDOM = "random"
"""The name of the random order in results."""

Mode = Literal["each", "sum"]


def counterfactual(
    orders: Mapping[str, Tensor],
    procedure: Procedure,
    *,
    remove: Sequence[int],
    mode: Mode,
    queries: Sequence[int] | None = None,
    repeats: int = 3,
    base_repeats: int | None = None,
    tokens: Tensor | None = None,
    seed: int = 0,
    resamples: int = 1000,
    **running: Unpack[Running],
) -> Counterfactual:
    """Remove the rows that each order calls most helpful, train again, and measure the queries; see the top of this file.

    Args:
        orders: by name, scores `[query, train]`, high for rows that push the measurement down; the random one is drawn here.
        procedure: trains and measures, for `"each"` minus the log-odds of the label (`"margin"`): above 0 is misclassified.
        remove: numbers of rows; 0, the base, is always in the result.
        mode: `"each"` or `"sum"`.
        queries: which of the procedure's to ask about; None: all.
        repeats: trainings per removal, with different seeds; one leaves the chance of training out of the intervals.
        base_repeats: trainings on all rows, at least `repeats`; None: as many.
        tokens: trained tokens `[query]` where the measurement is a loss summed over them, for perplexities; with `"sum"` only.
        seed: of trainings, random orders and bootstrap samples.
        resamples: bootstrap samples for the intervals.
        running: see `whence.evaluate.retrain.Running`.

    Raises:
        ConfigError: an option cannot be used. DataError: scores are not finite or do not fit, or no query is classified right.
        NumericalError, StorageError: as of `retrain_bank`.
    """
    scored, train = _check_orders(orders)
    counts = check_counts(remove, train)
    base_repeats = repeats if base_repeats is None else base_repeats
    _check_options(mode, repeats, base_repeats, resamples, tokens)
    asked = sorted(set(check_rows(queries, scored, "queries")))
    tokens = None if tokens is None else _check_tokens(tokens, scored)
    run = partial(retrain_all, procedure, **running)
    trainings = _Trainings(run=run, key=procedure.key, rows=tuple(range(train)), seed=seed)
    base = trainings.without([([], repeat) for repeat in range(base_repeats)])
    taken, left_out = _choose(base, asked, scored, mode)
    after, helpful = _remove(trainings, orders, counts, taken, repeats, mode)
    return Counterfactual(
        mode=mode,
        methods=(*orders, RANDOM),
        removed=counts,
        queries=tuple(taken),
        left_out=left_out,
        base=base[:, taken],
        after=after,
        helpful=helpful,
        tokens=None if tokens is None else tokens[taken],
        resamples=resamples,
        settings={"key": procedure.key, "seed": seed, "train": train},
    )


@dataclass(frozen=True, kw_only=True)
class _Trainings:
    """Trains on all rows but some."""

    run: Callable[[Sequence[RetrainSpec]], list[Tensor]]
    key: str
    rows: tuple[int, ...]
    seed: int

    def without(self, jobs: Sequence[tuple[list[int], int]]) -> Tensor:
        """Return the measurements `[job, query]` of jobs, each the rows to remove and the number of the repeat."""
        specs = []
        for removed, repeat in jobs:
            gone = set(removed)
            kept = tuple(row for row in self.rows if row not in gone)
            specs.append(RetrainSpec(key=self.key, rows=kept, seed=repeat_seed(self.seed, 0, repeat)))
        return torch.stack(self.run(specs))


def _remove(
    trainings: _Trainings, orders: Mapping[str, Tensor], counts: tuple[int, ...], taken: list[int], repeats: int, mode: Mode
) -> tuple[Tensor, Tensor]:
    """Return measurements `[method, removal, repeat, query]`, and how many rows each order could remove, `[method, group]`."""
    groups = [[query] for query in taken] if mode == "each" else [taken]
    rankings = [
        [_ranking(scores, group, repeats, trainings.seed) for scores in orders.values()]
        + [[_draw(len(trainings.rows), group, repeat, trainings.seed).tolist() for repeat in range(repeats)]]
        for group in groups
    ]
    jobs = [
        (ranking[:count], repeat)
        for of_group in rankings
        for of_order in of_group
        for count in counts
        for repeat, ranking in enumerate(of_order)
    ]
    after = trainings.without(jobs).view(len(groups), len(orders) + 1, len(counts), repeats, -1)
    # A model that lost the rows of one query speaks of that query alone.
    after = after[range(len(groups)), ..., taken].movedim(0, -1) if mode == "each" else after[0][..., taken]
    return after, torch.tensor([[len(of_order[0]) for of_order in of_group] for of_group in rankings]).T


def _ranking(scores: Tensor, group: list[int], repeats: int, seed: int) -> list[list[int]]:
    """Return the rows with a positive sum of scores over a group of queries, most helpful first, once per repeat."""
    summed = scores[group].double().cpu().sum(0)
    # Rows of equal score in random order: their order in the data set must play no part.
    drawn = _draw(len(summed), group, 0, seed)
    ranked = drawn[torch.sort(summed[drawn], descending=True, stable=True).indices]
    return [ranked[: int((summed > 0).sum())].tolist()] * repeats


def _draw(train: int, group: list[int], repeat: int, seed: int) -> Tensor:
    """Return all training rows in a random order."""
    # Keyed by the query itself: asking about more of them changes nothing for these. Number 0 keys the trainings.
    key = repeat_seed(seed, 1 + group[0], repeat)
    return torch.randperm(train, generator=torch.Generator().manual_seed(key))


def _choose(base: Tensor, asked: list[int], scored: int, mode: str) -> tuple[list[int], tuple[int, ...]]:
    """Return the queries to take, and those that are left out because a base model misclassifies them."""
    if scored != base.shape[1]:
        raise DataError(f"the orders are of {scored} queries, the procedure measures {base.shape[1]}; they must be the same ones.")
    if mode == "sum":
        return asked, ()
    right = (base < 0).all(0)
    taken = [query for query in asked if right[query]]
    if not taken:
        raise DataError(
            f"none of {len(asked)} queries is classified right by all of {len(base)} models trained on all rows (measurement below 0), "
            "so none can flip. Use a procedure that measures 'margin', other queries, or mode='sum'."
        )
    return taken, tuple(query for query in asked if not right[query])


def _check_orders(orders: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the numbers of queries and of training rows."""
    if RANDOM in orders or not orders:
        raise ConfigError(f"orders are {list(orders)}; give one or more, none of them {RANDOM!r}: the random order is drawn here.")
    shapes = {name: tuple(scores.shape) for name, scores in orders.items()}
    if len(set(shapes.values())) > 1 or any(scores.dim() != 2 for scores in orders.values()):
        raise DataError(f"orders have the shapes {shapes}; give scores [query, train] of the same queries and rows.")
    for name, scores in orders.items():
        if not torch.isfinite(scores).all():
            query, row = (~torch.isfinite(scores)).nonzero()[0].tolist()
            raise DataError(
                f"order {name!r}: the score of query {query} and row {row} is {scores[query, row].item()}. Find out where it comes from."
            )
    queries, train = next(iter(shapes.values()))
    return queries, train


def check_counts(remove: Sequence[int], train: int) -> tuple[int, ...]:
    """Return the numbers of rows to remove, rising, without 0.

    Raises:
        ConfigError: there is none, or one is no number of rows below `train`.
    """
    counts = tuple(sorted(set(remove) - {0}))
    if not counts or not all(type(count) is int and 0 < count < train for count in counts):
        raise ConfigError(f"remove={list(remove)!r} of {train} training rows; give whole numbers of rows from 1 to {train - 1}.")
    return counts


def _check_options(mode: str, repeats: int, base_repeats: int, resamples: int, tokens: Tensor | None) -> None:
    if mode not in ("each", "sum"):
        raise ConfigError(f"mode={mode!r} is not known; choose 'each' or 'sum'.")
    if repeats < 1 or base_repeats < repeats:
        raise ConfigError(f"repeats={repeats}, base_repeats={base_repeats}; give 1 or more, and no fewer on all rows than on some.")
    check_resamples(resamples)
    if tokens is not None and mode != "sum":
        raise ConfigError("tokens make perplexities, which are of mode='sum'; leave tokens out.")


def _check_tokens(tokens: Tensor, queries: int) -> Tensor:
    if tokens.shape != (queries,) or not bool((tokens > 0).all()):
        raise DataError(f"tokens have shape {tuple(tokens.shape)}; give one number, 1 or more, for each of {queries} queries.")
    return tokens.cpu().double()
