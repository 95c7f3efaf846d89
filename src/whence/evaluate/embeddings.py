"""Embeddings of rows by a model itself, which is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whence.errors import ConfigError, NumericalError
from whence.runtime.batches import check_dataset, iterate_batches
from whence.runtime.device import resolve_device
from whence.tasks.base import Task
from whence.tasks.hugging_face import bare, forward_parameters
from whence.tasks.supervised import Classification


def embeddings(
    model: nn.Module,
    rows: Any,
    what: str = "training",
    *,
    collate: Callable[[list[Any]], Any] | None,
    device: torch.device | str,
    batch_size: int = 32,
    task: Task | None = None,
) -> Tensor:
    """Return each row's embedding by the model itself, of length 1 or zero, `[row, feature]`.

    Hugging Face models: the last hidden state of the body (the model without its head; the encoder alone where there is a
    decoder too), averaged over the positions that the attention mask keeps, then over choices. Other models: what the last
    `nn.Linear` that runs is given, averaged over positions; positions that the task's padding mask calls padding are left out
    if that mask has the shape of this input.

    The model runs in eval mode without gradients, and is left as it was found. It must be on `device` already.

    Args:
        what: what the rows are called in errors.
        collate: from a list of rows to a batch; None is `torch.utils.data.default_collate`.
        batch_size: rows per forward pass.
        task: how a model that is not of Hugging Face is called; None: `Classification()`.

    Raises:
        ConfigError: the model gives no such embedding. DataError: rows cannot be read or collated.
        NumericalError: an embedding is not finite.
    """
    check_dataset(rows, what)
    inner, place, task = bare(model), resolve_device(device), task or Classification()
    embed = _body_embedding if hasattr(inner, "base_model_prefix") else _linear_embedding
    parts = []
    with only_looking(inner, place):
        for batch in iterate_batches(rows, range(len(rows)), batch_size=batch_size, collate=collate, device=place):
            parts.append(embed(inner, task, batch.data, len(batch.ids)).cpu())
            _check_finite(parts[-1], batch.ids, what)
    return nn.functional.normalize(torch.cat(parts), dim=1)


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


def _check_finite(embeddings: Tensor, ids: list[int], what: str) -> None:
    wrong = [ids[place] for place in (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()]
    if wrong:
        raise NumericalError(
            f"embeddings: the {what} rows {wrong[:8]} have values that are not finite. "
            "Look at these rows and at the model's weights; drop or mend the rows, or load a checkpoint without NaN."
        )


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
