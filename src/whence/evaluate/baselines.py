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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ConfigError, DataError, NumericalError
from whence.runtime.batches import check_dataset, iterate_batches
from whence.runtime.device import resolve_device
from whence.tasks.base import Task
from whence.tasks.hugging_face import bare, forward_parameters
from whence.tasks.supervised import Classification

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

    Hugging Face models: the last hidden state of the body (the model without its head; the encoder alone where there is a
    decoder too), averaged over the positions that the attention mask keeps, then over choices. Other models: what the last
    `nn.Linear` that runs is given, averaged over positions; positions that the task's padding mask calls padding are left out
    if that mask has the shape of this input. A row whose embedding is zero has the cosine 0.

    The model runs in eval mode without gradients, and is left as it was found. It must be on `device` already.

    Args:
        collate: from a list of rows to a batch; None is `torch.utils.data.default_collate`.
        batch_size: rows per forward pass.
        task: how a model that is not of Hugging Face is called; None: `Classification()`.

    Raises:
        ConfigError: the model gives no such embedding. DataError: rows cannot be read or collated.
        NumericalError: an embedding is not finite.
    """
    for rows, what in ((queries, "query"), (train, "training")):
        check_dataset(rows, what)
    inner, place, task = bare(model), resolve_device(device), task or Classification()
    embed = _body_embedding if hasattr(inner, "base_model_prefix") else _linear_embedding

    def embedded(rows: Any, what: str) -> Tensor:
        parts = []
        for batch in iterate_batches(rows, range(len(rows)), batch_size=batch_size, collate=collate, device=place):
            parts.append(embed(inner, task, batch.data, len(batch.ids)).cpu())
            _check_finite(parts[-1], batch.ids, what)
        return nn.functional.normalize(torch.cat(parts), dim=1)

    with only_looking(inner, place):
        return (embedded(queries, "query") @ embedded(train, "training").T).clamp_(-1, 1)


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


def _check_finite(embeddings: Tensor, ids: list[int], what: str) -> None:
    wrong = [ids[place] for place in (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()]
    if wrong:
        raise NumericalError(
            f"embeddings: the {what} rows {wrong[:8]} have values that are not finite. "
            "Look at these rows and at the model's weights; drop or mend the rows, or load a checkpoint without NaN."
        )


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


@contextmanager
def only_looking(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the model in eval mode without gradients; on exit its modes, the random state and torch's switches are as found."""
    training = [(module, module.training) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            # The fused encoder layer calls none of its modules, so no hook would see them.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, flag in training:
                module.training = flag


def _body_embedding(model: Any, task: Task, batch: Any, count: int) -> Tensor:
    """Return `[batch, hidden]` of a Hugging Face model.

    Its own `output_hidden_states` is not used: transformers leaves hooks on the model for that, and keeps every layer's.
    """
    body = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model.base_model
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"a Hugging Face model takes batches as dicts, not a {type(batch).__name__}. Give a collate function that makes them."
        )
    taken = forward_parameters(body)
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {key: value for key, value in batch.items() if key in taken and isinstance(value, Tensor)}
    if "input_ids" in inputs and inputs["input_ids"].dim() == 3:  # choices, which the model's head would make rows of
        inputs = {key: value.flatten(0, 1) for key, value in inputs.items()}
    # Pixels come as float32, whatever the type of the model.
    inputs = {key: value.to(kind) if value.is_floating_point() else value for key, value in inputs.items()}
    result = body(**inputs, **({"use_cache": False} if "use_cache" in taken else {}))
    hidden = result[0] if isinstance(result, tuple) else getattr(result, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) % count:
        got = f"of shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else "at all"
        raise ConfigError(
            f"{type(body).__name__} gives no last hidden state [batch, position, hidden] for {count} rows (none {got}). "
            "Leave the embedding baseline out for this model."
        )
    return _mean(hidden, inputs.get("attention_mask")).unflatten(0, (count, -1)).mean(1)


def _linear_embedding(model: nn.Module, task: Task, batch: Any, count: int) -> Tensor:
    """Return `[batch, feature]`: what the last `nn.Linear` that runs is given."""
    given: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[:] = [args[0] if args else kwargs["input"]]

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        task.measurement(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not given or given[0].dim() < 2 or len(given[0]) != count:
        got = f"the last one was given the shape {tuple(given[0].shape)}" if given else "none ran"
        raise ConfigError(
            f"embeddings are what the last nn.Linear is given, [batch, ..., feature] for {count} rows; in {type(model).__name__} {got}. "
            "Leave the embedding baseline out for this model."
        )
    mask = task.padding_mask(batch)
    fits = isinstance(mask, Tensor) and mask.shape == given[0].shape[:-1]
    return _mean(given[0].flatten(1, -2) if given[0].dim() > 2 else given[0].unsqueeze(1), mask if fits else None)


def _mean(values: Tensor, mask: Any) -> Tensor:
    """Return the mean `[batch, feature]` over positions of `[batch, position, feature]` that `mask [batch, ...]` keeps."""
    if mask is None:
        return values.float().mean(1)
    kept = (mask != 0).flatten(1).to(values.device)
    if kept.shape != values.shape[:2]:
        raise ConfigError(
            f"the attention mask of shape {tuple(mask.shape)} does not say which of {tuple(values.shape[:2])} positions are real. "
            "Give a collate function that makes a mask [batch, position]."
        )
    # Where nothing is kept the sum is zero, and so is the embedding.
    return values.float().masked_fill(~kept.unsqueeze(-1), 0).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
