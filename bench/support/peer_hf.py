"""Peers on Hugging Face models: Kronfluence 1.0.1 and TRAK (traker 0.3.2), on the CPU in float32. Nothing here imports whence.

Three kinds of model:

* `classification`: logits `[batch, class]`, labels `[batch]`;
* `choice`: multiple choice, inputs `[batch, choice, token]`, logits `[batch, choice]`; the choices of a row are one example;
* `lm`: causal language models; every token is predicted from those before it. The loss is summed over a row's tokens.

Rows are dicts of tokenised columns; `collate` pads a list of them: `input_ids`, `attention_mask`, `labels` and whatever
else the model takes. Scores are `[query, train]`, float32, with our sign: positive says that training on the row pushed
the query's loss-like measurement down.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from trak import TRAKer
from trak.gradient_computers import IterativeGradientComputer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector
from trak.score_computers import BasicScoreComputer

from support.peer import rewrite_conv1d

Kind = Literal["classification", "choice", "lm"]
Measurement = Literal["loss", "margin"]
Row = dict[str, Any]
Batch = dict[str, Tensor]
Collate = Callable[[list[Row]], Batch]
IGNORED = -100

# Numbers in the largest tensor of a batch (a layer's gradients of each row, or the logits): half a gigabyte in float32.
BATCH_NUMBERS = 2**27
# Numbers in the preconditioned gradients that the peer holds for a batch of queries: two gigabytes.
QUERY_NUMBERS = 2**29


def predictions(kind: Kind, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits `[..., class]` and what they should say `[...]`: a class, or `IGNORED` where nothing is asked."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    if kind != "lm":
        return model(**inputs).logits, batch["labels"]
    targets = batch.get("labels", batch["input_ids"]).masked_fill(batch["attention_mask"] == 0, IGNORED)
    # The first position sees nothing before it, the last one predicts nothing that is there.
    return model(**inputs, use_cache=False).logits[:, :-1], targets[:, 1:]


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-odds `[...]` of the right class; 0 where nothing is asked."""
    right = targets.clamp(min=0).unsqueeze(-1)
    others = logits.scatter(-1, right, float("-inf")).logsumexp(-1)
    return (logits.gather(-1, right).squeeze(-1) - others).masked_fill(targets == IGNORED, 0.0)


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)


def tracked_layers(model: nn.Module) -> list[str]:
    """Return the names of all `nn.Linear` but a language model's head, which is as wide as the vocabulary."""
    head = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head]


class HuggingFaceTask(Task):
    """A kind's loss and measurement in the peer's form: one sum over the batch."""

    def __init__(self, kind: Kind, layers: list[str], *, measurement: Measurement, choices: int) -> None:
        self.kind, self.layers, self.measurement, self.choices = kind, layers, measurement, choices
        self.enable_post_process_per_sample_gradient = kind == "choice"

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the summed loss, with labels drawn from the model if `sample`."""
        logits, targets = predictions(self.kind, model, batch)
        if sample:
            drawn = torch.multinomial(logits.detach().flatten(0, -2).softmax(-1), 1).view_as(targets)
            targets = torch.where(targets == IGNORED, IGNORED, drawn)
        return _summed_loss(logits, targets)

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """Return the summed loss, or the summed log-odds of the wrong answer: lower is better."""
        if self.measurement == "loss":
            return self.compute_train_loss(batch, model)
        return -log_odds(*predictions(self.kind, model, batch)).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the names of the tracked layers."""
        return self.layers

    def get_attention_mask(self, batch: Batch) -> Tensor:
        """Return the padding mask."""
        return batch["attention_mask"]

    def post_process_per_sample_gradient(self, module_name: str, gradient: Tensor) -> Tensor:
        """Sum the gradients `[batch * choice, out, in]` of one example's choices, which the model takes as rows."""
        return gradient.unflatten(0, (-1, self.choices)).sum(1)


def _fingerprint(model: nn.Module, train: Batch) -> str:
    digest = hashlib.sha256()
    for name, values in [*model.state_dict().items(), *train.items()]:
        digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _batch_sizes(kind: Kind, model: nn.Module, layers: Sequence[str], shape: torch.Size) -> tuple[int, int]:
    """Return how many training rows and queries at once keep the peer within a few gigabytes; `shape` is that of all input ids."""
    sizes = [model.get_submodule(name).weight.numel() for name in layers]
    numbers = max(sizes) * (shape[1] if kind == "choice" else 1)
    if kind == "lm":
        numbers = max(numbers, shape[1] * model.config.vocab_size)
    return max(1, min(64, BATCH_NUMBERS // numbers)), max(1, QUERY_NUMBERS // sum(sizes))


def kronfluence_scores(
    model: nn.Module,
    kind: Kind,
    queries: list[Row],
    train: list[Row],
    collate: Collate,
    *,
    damping: float | None,
    empirical: bool = False,
    work: Path,
    name: str,
    measurement: Measurement = "loss",
    strategy: str = "ekfac",
) -> Tensor:
    """Return Kronfluence's scores `[query, train]` over all linear layers but a language model's head.

    `damping=None` is the peer's 0.1 of each layer's mean eigenvalue. `empirical` takes the data's labels for the Fisher
    matrix instead of labels drawn from the model. Factors stay in `work`, and are fitted once for a name, a strategy,
    `empirical`, the model's weights and the training rows. `model` is left as it was: the peer gets a copy, with
    Hugging Face's `Conv1D` rewritten to `nn.Linear`.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    own = rewrite_conv1d(copy.deepcopy(model)).float().eval()
    layers, everything = tracked_layers(own), collate(train)
    shape = everything["input_ids"].shape
    train_batch, query_batch = _batch_sizes(kind, own, layers, shape)
    task = HuggingFaceTask(kind, layers, measurement=measurement, choices=shape[1])
    identity = f"{name}-{_fingerprint(own, everything)}"
    analyzer = Analyzer(identity, prepare_model(own, task), task, cpu=True, disable_tqdm=True, output_dir=str(work))
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    factors = f"{strategy}-{'empirical' if empirical else 'drawn'}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the labels it draws
        analyzer.fit_all_factors(
            factors, train, per_device_batch_size=train_batch,
            factor_args=FactorArguments(
                strategy=strategy, use_empirical_fisher=empirical, covariance_max_examples=None, lambda_max_examples=None
            ),
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", factors, query_dataset=queries, train_dataset=train,
            per_device_query_batch_size=min(query_batch, len(queries)), per_device_train_batch_size=train_batch,
            score_args=ScoreArguments(damping_factor=damping), overwrite_output_dir=True,
        )  # fmt: skip
    return analyzer.load_pairwise_scores("scores")["all_modules"].float().clone()


class MarginOutput(AbstractModelOutput):
    """What TRAK makes linear: the log-odds of the right answer, summed over a language model's tokens.

    The paper's weight of a row, the derivative of its loss by that output, is 1 - p (Park et al., "TRAK: Attributing
    model behavior at scale", 2023, section 3); for a language model we take its mean over the tokens.
    Batches are sequences of the columns named in `columns`.
    """

    def __init__(self, kind: Kind, columns: list[str]) -> None:
        self.kind, self.columns = kind, columns

    def _log_odds(self, model: nn.Module, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the log-odds `[batch, token]` and which are asked for; a classifier has one token."""
        logits, targets = predictions(self.kind, model, dict(zip(self.columns, batch, strict=True)))
        odds = log_odds(logits, targets)
        return odds.reshape(len(odds), -1), (targets != IGNORED).reshape(len(odds), -1)

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, *batch: Tensor) -> Tensor:
        """Return the output `[batch]`."""
        return self._log_odds(model, batch)[0].sum(1)

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Sequence[Tensor]) -> Tensor:
        """Return 1 - p `[batch, 1]`."""
        with torch.no_grad():
            odds, asked = self._log_odds(model, batch)
            return ((-odds).sigmoid() * asked).sum(1, keepdim=True) / asked.sum(1, keepdim=True)


class SketchProjector(AbstractProjector):
    """Random projection for processors: each parameter goes to one of `proj_dim` sums, with a random sign.

    It keeps inner products as the package's dense matrix does, in the mean and in variance (Weinberger et al., "Feature
    hashing for large scale multitask learning", 2009). The package's own `BasicProjector` draws its matrix anew for each
    batch: 40 billion numbers for 20 million parameters and 2048 sums.
    """

    def __init__(self, grad_dim: int, proj_dim: int, seed: int) -> None:
        super().__init__(grad_dim, proj_dim, seed, "sketch", "cpu")
        self.drawn_for: int | None = None

    def project(self, grads: Tensor, model_id: int) -> Tensor:
        """Return the projection `[batch, proj_dim]` of gradients `[batch, parameter]`, other signs for each model."""
        if self.drawn_for != model_id:
            generator = torch.Generator().manual_seed(self.seed + 1000 * model_id)
            self.sums = torch.randint(self.proj_dim, (self.grad_dim,), generator=generator)
            self.signs = torch.randint(2, (self.grad_dim,), generator=generator).float().mul_(2).sub_(1)
            self.drawn_for = model_id
        return grads.new_zeros(len(grads), self.proj_dim).index_add_(1, self.sums, grads * self.signs)


class RidgeScores(BasicScoreComputer):
    """The package's scores, with a ridge that is a share of the kernel matrix's mean eigenvalue instead of absolute."""

    def __init__(self, *, ridge: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.ridge = ridge

    def get_xtx(self, grads: Tensor) -> Tensor:
        """Return the kernel matrix `[proj_dim, proj_dim]` with the ridge."""
        kernel = super().get_xtx(grads)
        kernel.diagonal().add_(self.ridge * kernel.diagonal().mean())
        return kernel


def trak_scores(
    models: Sequence[nn.Module],
    kind: Kind,
    queries: list[Row],
    train: list[Row],
    collate: Collate,
    *,
    proj_dim: int = 2048,
    ridge: float = 0.1,
    seed: int = 0,
    projector: AbstractProjector | None = None,
) -> Tensor:
    """Return TRAK's scores `[query, train]` of the log-odds, by traker's `TRAKer`, over all parameters of each model.

    Several models of one architecture, trained on their own, make one ensemble: the package averages scores and weights.
    `ridge` is added to the kernel matrix as a share of its mean eigenvalue; the package's own 0 needs many more training
    rows than `proj_dim`, since the matrix is singular otherwise. Rows go one by one, through the package's iterative
    gradients: its `torch.func` ones fail inside Hugging Face's attention masks. Models are left as they were.
    """
    if ridge == 0 and proj_dim >= len(train):
        raise ValueError(f"proj_dim={proj_dim} with {len(train)} training rows and no ridge: give ridge > 0, or a smaller proj_dim")
    own = copy.deepcopy(models[0]).float().eval().requires_grad_(True)
    columns = list(collate(train[:1]))
    parameters = sum(values.numel() for values in own.parameters())
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            own, MarginOutput(kind, columns), train_set_size=len(train), save_dir=folder, device="cpu",
            gradient_computer=IterativeGradientComputer, score_computer=partial(RidgeScores, ridge=ridge),
            projector=projector or SketchProjector(parameters, proj_dim, seed),
            use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        for number, model in enumerate(models):
            traker.load_checkpoint(model.state_dict(), model_id=number)
            for batch in _one_by_one(train, collate, columns):
                traker.featurize(batch, num_samples=1)
        traker.finalize_features()
        for number, model in enumerate(models):
            traker.start_scoring_checkpoint("queries", model.state_dict(), model_id=number, num_targets=len(queries))
            for batch in _one_by_one(queries, collate, columns):
                traker.score(batch, num_samples=1)
        return torch.tensor(traker.finalize_scores("queries")).T.float().contiguous()


def _one_by_one(rows: list[Row], collate: Collate, columns: list[str]) -> Iterator[list[Tensor]]:
    for row in rows:
        batch = collate([row])
        yield [batch[column] for column in columns]
