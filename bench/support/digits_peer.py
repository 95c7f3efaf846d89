"""Kronfluence 1.0.1 on the digits network: its own EKFAC, labels drawn from the network unless asked otherwise."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional as F

from support.digits_setting import Setting
from support.models import margin
from whence.runtime.device import one_thread

BATCH = 64


class DigitsTask(Task):
    """Cross-entropy, and the setting's measurement, in the peer's form: one sum over the batch."""

    def __init__(self, measurement: str) -> None:
        self.measure = measurement

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the summed cross-entropy, with labels drawn from the network if `sample`."""
        logits, labels = model(batch[0]), batch[1]
        if sample:
            labels = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the summed measurement, signed as ours: positive scores help."""
        if self.measure == "margin":
            return margin(model, batch).sum()
        return self.compute_train_loss(batch, model)


def kronfluence(setting: Setting, *, damping: float | None, empirical: bool) -> Tensor:
    """Return scores `[query, train]`; `damping=None` is the peer's 0.1 of each layer's mean eigenvalue."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    task = DigitsTask(setting.measurement)
    # The wrappers replace layers in place, so the peer gets a network of its own.
    model = prepare_model(copy.deepcopy(setting.network), task)
    train, queries = ([(row.image, row.label) for row in rows] for rows in (setting.train, setting.queries))
    torch.manual_seed(0)  # of the labels it draws
    with tempfile.TemporaryDirectory() as folder, one_thread():
        analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        factors = FactorArguments(
            strategy="ekfac", use_empirical_fisher=empirical, covariance_max_examples=None, lambda_max_examples=None
        )  # fmt: skip
        analyzer.fit_all_factors("factors", train, per_device_batch_size=BATCH, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=queries, train_dataset=train, per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH, score_args=ScoreArguments(damping_factor=damping),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].clone()
