"""The tasks of the cases, for what a plain classifier does not need: example ids, padding, several runs of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whence.tasks import Classification, Regression, Task


class ChoiceTask(Classification):
    """Multiple choice: the model flattens `[batch, 4]` to `[4 * batch]`, choices of one question are one example."""

    def example_ids(self, batch: Any) -> Tensor:
        return torch.arange(len(batch[0])).repeat_interleave(4)


class GroupTask(Task):
    """Each example is a few rows that lie anywhere in the batch; its loss is their sum."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        rows = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        return rows.new_zeros(batch["count"]).index_add(0, batch["ids"], rows)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        rows = model(batch["x"]).sin().sum(-1)
        return rows.new_zeros(batch["count"]).index_add(0, batch["ids"], rows)

    def example_ids(self, batch: Any) -> Tensor:
        return batch["ids"]


class PackedTask(Task):
    """Examples packed into rows of tokens; ids are `[row, position]` and -1 where a row is not full."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        tokens = F.cross_entropy(model(batch["x"]).movedim(-1, 1), batch["labels"], reduction="none", ignore_index=-100)
        held = batch["ids"].flatten() >= 0
        ids, values = batch["ids"].flatten()[held], tokens.flatten()[held]
        return values.new_zeros(batch["count"]).index_add(0, ids, values)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return 2.0 * self.loss(model, batch).square()

    def example_ids(self, batch: Any) -> Tensor:
        return batch["ids"]

    def padding_mask(self, batch: Any) -> Tensor:
        return batch["ids"] >= 0


class UnmaskedPackedTask(PackedTask):
    """As before, but only the ids tell that a position is empty."""

    def padding_mask(self, batch: Any) -> None:
        return None


class PaddedTask(Classification):
    """Rows of different length, padded in the batch."""

    def padding_mask(self, batch: Any) -> Tensor:
        return batch["inputs"]["mask"]


class StreamsTask(Classification):
    """Two sequences with a mask each."""

    def padding_mask(self, batch: Any) -> dict[str, Tensor]:
        return {"source.*": batch["inputs"]["mask"], "target.*": batch["inputs"]["y_mask"]}


class TaggingTask(PaddedTask):
    """One label per position, -100 at padding."""

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["inputs"]["x"])


class PairTask(Task):
    """The loss runs the model on both parts of a row, the measurement on one: layers fire twice, and once."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - model(batch[1])).square().sum(-1)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sin().sum(-1)


class HeadsTask(Classification):
    """The loss needs both heads, the measurement only one: the other's gradient is zero."""

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0], both=True)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).logsumexp(-1)


class ClippedTask(Regression):
    """Gradients of one layer are shrunk to a bounded norm, those of the others left alone."""

    def transform_gradient(self, layer: str, gradient: Tensor) -> Tensor:
        if layer != "2":
            return gradient
        norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return gradient / (1.0 + norm)
