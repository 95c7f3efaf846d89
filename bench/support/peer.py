"""Kronfluence 1.0.1 behind the few calls that the comparisons need. Nothing here imports whence."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn

from support.models import Case

FACTORS = "factors"


class PeerTask(Task):
    """A case's loss and measurement in the peer's form: one sum over the batch."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the summed loss with the data's own labels (empirical Fisher)."""
        if sample:
            raise ValueError("the comparisons use the empirical Fisher")
        return self.case.loss(model, batch).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the summed measurement."""
        return self.case.measurement(model, batch).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the names of the tracked layers."""
        return self.case.layers

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """Return the padding mask."""
        return None if self.case.mask is None else self.case.mask(batch)


def rewrite_conv1d(model: nn.Module) -> nn.Module:
    """Replace Hugging Face's `Conv1D` by an equal `nn.Linear`, which the peer needs."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias.data = module.bias.data.clone()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, linear)
    return model


class Peer:
    """One analysis of one case with one strategy, in float32 with the peer's default types, on the CPU.

    `damping=None` is the peer's 0.1 of each layer's mean eigenvalue. Files go to `folder`; `rewrite` makes `Conv1D` into Linear.
    """

    def __init__(self, case: Case, *, strategy: str, batch: int, folder: Path, rewrite: bool = True, copy_model: bool = True) -> None:
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.disable(logging.WARNING)
        task = PeerTask(case)
        # The wrappers replace layers in place, so the peer gets a model of its own.
        model = copy.deepcopy(case.model) if copy_model else case.model
        model = prepare_model(rewrite_conv1d(model) if rewrite else model, task)
        self.case, self.batch = case, batch
        self.analyzer = Analyzer("peer", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=case.collate))
        self.factors = FactorArguments(
            strategy=strategy, use_empirical_fisher=True, has_shared_parameters=case.shared,
            covariance_max_examples=None, lambda_max_examples=None,
        )  # fmt: skip

    def fit_eigenvalues(self) -> dict[str, Tensor]:
        """Run the pass that sums squared gradients in the eigenbasis, again; return the sums `[out, in]` by layer."""
        self.analyzer.fit_lambda_matrices(
            FACTORS, self.case.train, per_device_batch_size=self.batch, factor_args=self.factors,
            overwrite_output_dir=True,
        )  # fmt: skip
        return self.analyzer.load_lambda_matrices(FACTORS)["lambda_matrix"]

    def fit(self) -> None:
        """Fit whatever the strategy needs; nothing if the folder holds it."""
        self.analyzer.fit_all_factors(
            FACTORS, self.case.train, per_device_batch_size=self.batch, factor_args=self.factors
        )  # fmt: skip

    def pairwise(self, *, query_batch: int, per_layer: bool = False, count: int | None = None) -> dict[str, Tensor]:
        """Return scores `[query, train]` of the first `count` queries by layer, or under one name."""
        self.analyzer.compute_pairwise_scores(
            "pairwise", FACTORS, query_dataset=self.case.queries, train_dataset=self.case.train,
            query_indices=None if count is None else list(range(count)),
            per_device_query_batch_size=query_batch, per_device_train_batch_size=self.batch,
            score_args=ScoreArguments(damping_factor=None, compute_per_module_scores=per_layer),
            overwrite_output_dir=True,
        )  # fmt: skip
        return self.analyzer.load_pairwise_scores("pairwise")

    def self_influence(self, *, per_layer: bool = False) -> dict[str, Tensor]:
        """Return self-influence `[train]` by layer, or under one name."""
        self.analyzer.compute_self_scores(
            "self", FACTORS, train_dataset=self.case.train, per_device_train_batch_size=self.batch,
            score_args=ScoreArguments(damping_factor=None, compute_per_module_scores=per_layer),
            overwrite_output_dir=True,
        )  # fmt: skip
        return self.analyzer.load_self_scores("self")
