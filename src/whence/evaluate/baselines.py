"""Scores without gradients of the training loss: what a method of attribution has to beat.

All return float32 `[query, train]` on the CPU, higher for rows that should matter more to the query. Only
`signed_by_class` knows of harm: a similarity alone calls every similar row helpful.

What each is: random order; words in common (S. Robertson and H. Zaragoza, "The Probabilistic Relevance Framework: BM25 and
Beyond", 2009); nearness in the model's last layer (as in K. Hanawa et al., "Evaluation of Similarity-based Explanations",
2021, where the sign by class is discussed too); the training row's own loss.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ConfigError, DataError
from whence.evaluate.embeddings import embeddings
from whence.runtime.batches import check_dataset
from whence.tasks.base import Task

BASELINES = ("random", "bm25", "bm25 signed", "embedding", "embedding signed", "gradient cosine", "loss")
"""Names of the baselines in the order of tables; "gradient cosine" is `Attributor.scores(strategy="identity", normalize="cosine")`."""

_COMMON = 0.95


def random_scores(queries: int, train: int, *, seed: int = 0) -> Tensor:
    """Return standard normal numbers, `[queries, train]`; equal seeds give equal numbers.

    Raises:
        ConfigError: a count is less than 1.
    """
    _check_count("queries", queries)
    _check_count("train", train)
    return torch.randn(queries, train, generator=torch.Generator().manual_seed(seed))


def bm25_scores(queries: Any, train: Any) -> Tensor:
    """Return how well the words of a training row match the query's: BM25 as in Lucene, `[query, train]`, never negative.

    The sum over the query's tokens (one that comes twice counts twice) of
    `log(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))`: N training rows, n of them with
    the token, f times in this row; k1 = 1.5, b = 0.75. Tokens of more than 95% of the training rows (special tokens, full
    stops) are dropped beforehand and count for no length; so are tokens whose attention mask is 0.

    Args:
        queries, train: tokenised data sets: rows are dicts with `input_ids`, which may be nested (multiple choice: the tokens
            of all choices together).

    Raises:
        ConfigError: a row has no `input_ids`, or the package bm25s is not installed.
        DataError: a data set is empty, or an attention mask is not as long as its tokens.
    """
    asked, rows = _tokens(queries, "query"), _tokens(train, "training")
    counts = Counter(token for row in rows for token in set(row))
    # The library takes the numbers of tokens for places in its table, so they must not have gaps.
    places = {token: place for place, token in enumerate(token for token, count in counts.items() if count <= _COMMON * len(rows))}
    scores = torch.zeros(len(asked), len(rows))
    if not places:
        return scores
    engine = _bm25s().BM25(method="lucene", k1=1.5, b=0.75, backend="numpy")
    engine.index((_placed(rows, places), {str(token): place for token, place in places.items()}), show_progress=False)
    for number, tokens in enumerate(_placed(asked, places)):
        scores[number] = torch.from_numpy(engine.get_scores_from_ids(tokens))
    return scores


def embedding_scores(
    model: nn.Module,
    queries: Any,
    train: Any,
    *,
    collate: Callable[[list[Any]], Any] | None,
    device: torch.device | str,
    batch_size: int = 32,
    task: Task | None = None,
) -> Tensor:
    """Return the cosine of query's and training row's embeddings by the model itself, `[query, train]`, from -1 to 1.

    A row whose embedding is zero has the cosine 0. Arguments and errors are those of `embeddings`.
    """
    for rows, what in ((queries, "query"), (train, "training")):
        check_dataset(rows, what)
    found = [
        embeddings(model, rows, what, collate=collate, device=device, batch_size=batch_size, task=task)
        for rows, what in ((queries, "query"), (train, "training"))
    ]
    return (found[0] @ found[1].T).clamp_(-1, 1)


def loss_scores(losses: Tensor, queries: int) -> Tensor:
    """Return the training rows' losses `[train]` as scores `[queries, train]`, the same for every query.

    Raises:
        DataError: the losses are no vector, or not finite. ConfigError: `queries` is less than 1.
    """
    _check_count("queries", queries)
    if losses.dim() != 1 or not losses.isfinite().all():
        raise DataError(
            f"losses have shape {tuple(losses.shape)}, {int((~losses.isfinite()).sum())} of them not finite. "
            "Give one finite number per training row."
        )
    return losses.detach().cpu().float().repeat(queries, 1)


def signed_by_class(scores: Tensor, query_classes: Tensor, classes: Tensor) -> Tensor:
    """Return similarities `[query, train]` with their sign turned where the training row is of another class than the query.

    A row of the query's class speaks for it and one of another class against it, the more so the more alike they are.

    Args:
        scores: similarities, not negative or to be read as such.
        query_classes: class of each query, `[query]`.
        classes: class of each training row, `[train]`.

    Raises:
        DataError: the sizes do not fit.
    """
    if scores.dim() != 2 or query_classes.shape != scores.shape[:1] or classes.shape != scores.shape[1:]:
        raise DataError(
            f"scores have shape {tuple(scores.shape)}, query_classes {tuple(query_classes.shape)} and classes {tuple(classes.shape)}. "
            "Give scores [query, train] and one class for each query and each training row."
        )
    same = query_classes.cpu().unsqueeze(1) == classes.cpu()
    return torch.where(same, scores.cpu(), -scores.cpu()).float()


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ConfigError(f"{name}={count!r} rows give no scores; give 1 or more.")


def _bm25s() -> Any:
    package = import_module("bm25s")
    # It asks for debugging output by itself, which would turn up in any program that logs.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return package


def _placed(rows: list[list[int]], places: Mapping[int, int]) -> list[list[int]]:
    return [[places[token] for token in row if token in places] for row in rows]


def _tokens(rows: Any, what: str) -> list[list[int]]:
    """Return each row's real tokens, one after the other."""
    found = []
    for number in range(check_dataset(rows, what)):
        row = rows[number]
        if not isinstance(row, Mapping) or row.get("input_ids") is None:
            have = sorted(map(str, row)) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ConfigError(
                f"bm25_scores compares words, and {what} row {number} has no 'input_ids'; it has {have}. "
                "Give tokenised rows (dicts with input_ids), or leave this baseline out where the data are no text."
            )
        tokens, mask = _flat(row["input_ids"]), row.get("attention_mask")
        if mask is not None:
            real = _flat(mask)
            if len(real) != len(tokens):
                raise DataError(f"{what} row {number} has {len(tokens)} input_ids and an attention_mask of {len(real)}; give one for each.")
            tokens = [token for token, kept in zip(tokens, real, strict=True) if kept]
        found.append(tokens)
    return found


def _flat(value: Any) -> list[int]:
    """Return the numbers of a list, array or tensor, however it is nested."""
    items = value.tolist() if hasattr(value, "tolist") else value
    nested = any(hasattr(item, "__len__") for item in items)
    return [number for item in items for number in _flat(item)] if nested else list(items)
