"""Per-example gradients of several numbers of each example, such as the log-odds of every token: one forward pass, many backward.

A token's output depends on the activations of other positions, so its gradient is no part of another token's: each needs a backward
pass of its own, which goes for one token of every example of the batch at once. With `F` for a forward pass, and as much for a
backward pass without weight gradients, a token of T costs `F + F / T`; as an example of its own (the row once more, with one trained
token) it would cost `2 F`.

The output head and the log-odds over the vocabulary treat every position on its own. One backward pass through them gives, for all
tokens, the gradient at the head's input, and the passes per token begin there: in small models with large vocabularies the head is
most of the work. This is done only where the graph shows that the head's input is the one way back (`_only_way`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whence.capture.recorder import Objective, Recorder
from whence.capture.state import Consumer
from whence.runtime.batches import Batch
from whence.tasks import Task
from whence.tasks.hugging_face import bare

_NEAR = 64
"""Steps of the graph from the log-odds back to the head's input, at most."""


def run_columns(recorder: Recorder, batch: Batch, consumer_for: Callable[[int, Tensor], Consumer]) -> tuple[Tensor, Tensor]:
    """Hand over the gradients of the log-odds of every trained label, one label of each example at a time.

    Args:
        recorder: the taps, installed.
        batch: the rows.
        consumer_for: `consumer_for(column, there)` returns who takes the gradients of each example's trained label number `column`;
            `there` `[example]` says which examples have one: the gradients of the others are zero.

    Returns:
        Log-odds, and which are trained, both `[example, label]`, detached.
    """
    labels: list[Tensor] = []
    inputs: list[Tensor] = []
    head = None if recorder.options.compile else _plain_head(recorder)

    def objective(model: nn.Module, data: Any) -> Tensor:
        labels.clear()
        inputs.clear()
        with _watched(head, inputs):
            labels.extend(recorder.task.log_odds(model, data))
        return (labels[0] * labels[1]).sum(1)

    with recorder.forward(batch, objective) as backward:
        odds, trained = labels
        places, there = _places(trained)
        if odds.requires_grad:
            root, slopes = _root(recorder, odds, trained, inputs)
            for column in range(places.shape[1]):
                chosen = _chosen(slopes, places[:, column], there[:, column])
                backward(root, chosen * recorder.loss_scale, consumer_for(column, there[:, column]))
    if any(layer.alone is not None for layer in recorder.taken):
        for column in range(places.shape[1]):
            one = _one_label(recorder.task, column)
            recorder.run_singles(batch, lambda own, one=one: one, consumer_for(column, there[:, column]))  # type: ignore[misc]
    return odds.detach(), trained


def mean_log_odds(task: Task, seen: list[Tensor] | None = None) -> Objective:
    """Return the objective that is the mean log-odds of each example's trained labels, `[example]`.

    `seen`, if it is an empty list, gets which labels are trained.
    """

    def objective(model: nn.Module, data: Any) -> Tensor:
        odds, trained = task.log_odds(model, data)
        if seen == []:  # layers without a handler call again, with one row each
            seen.append(trained)
        return (odds * trained).sum(1) / trained.sum(1).clamp(min=1)

    return objective


def _one_label(task: Task, column: int) -> Objective:
    """Return the objective that is the log-odds of each example's trained label of that number, or zero."""

    def objective(model: nn.Module, data: Any) -> Tensor:
        odds, trained = task.log_odds(model, data)
        return (odds * (trained & (trained.cumsum(1) == column + 1))).sum(1)

    return objective


def _places(trained: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each example's trained labels are, `[example, column]`, and which of them there are."""
    counts = trained.sum(1)
    most = int(counts.max())
    places = trained.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    return places, torch.arange(most, device=counts.device) < counts.unsqueeze(1)


def _chosen(slopes: Tensor, places: Tensor, there: Tensor) -> Tensor:
    """Return `slopes` `[example, label, ...]` at one label of each example, zero elsewhere."""
    rows = there.nonzero().flatten()
    chosen = torch.zeros_like(slopes)
    chosen[rows, places[rows]] = slopes[rows, places[rows]]
    return chosen


def _root(recorder: Recorder, odds: Tensor, trained: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return where the passes per label begin, and with what: the head's input and all labels' gradients of it, or the log-odds."""
    if len(inputs) == 1 and inputs[0].dim() == 3 and inputs[0].shape[:2] == odds.shape and _only_way(odds, inputs[0]):
        now, recorder.taps.now = recorder.taps.now, None  # what is tapped there gets its gradient in the passes that follow
        try:
            (slopes,) = torch.autograd.grad(odds, inputs, trained.to(odds), retain_graph=True)
        finally:
            recorder.taps.now = now
        return inputs[0], slopes
    return odds, torch.ones_like(odds)


def _plain_head(recorder: Recorder) -> nn.Module | None:
    """Return the model's output head if it is a plain Linear that is not tracked."""
    get = getattr(bare(recorder.model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    tracked = any(site.module is head for layer in recorder.taken for site in layer.sites)
    return head if type(head) is nn.Linear and not tracked else None


@contextmanager
def _watched(head: nn.Module | None, inputs: list[Tensor]) -> Iterator[None]:
    """Note what a module is called with."""
    if head is None:
        yield
        return

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.extend(args[:1])

    handle = head.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _only_way(output: Tensor, through: Tensor) -> bool:
    """Whether every path of the graph from `output` leads to `through`, within a few steps."""
    if through.grad_fn is None or output.grad_fn is None:
        return False
    seen: dict[int, Any] = {}  # nodes are kept, so that ids stay theirs
    left = [(output.grad_fn, output.output_nr)]
    while left:
        node, number = left.pop()
        if node is through.grad_fn and number == through.output_nr:
            continue
        following = [(after, place) for after, place in node.next_functions if after is not None]
        if not following or len(seen) > _NEAR:
            return False
        if id(node) not in seen:
            seen[id(node)] = node
            left += following
    return True
