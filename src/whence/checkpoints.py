"""Several checkpoints of one model: averages over them, and the response of a whole run, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from whence.attributor import Attributor
from whence.curvature.response import Unrolled
from whence.curvature.strategies import StrategyName
from whence.errors import ConfigError, MismatchError, StorageError
from whence.index.index import Index
from whence.index.joined import CHECKPOINTS, JoinedIndex
from whence.index.projection import Held, Projection
from whence.scores.matrix import Scores
from whence.scores.tokens import TokenScores
from whence.tasks import Task
from whence.workbench import Size

Checkpoint = str | Path | Mapping[str, Tensor]


class Checkpoints:
    """The same questions as to an `Attributor`, asked of several checkpoints.

    `scores`, `self_influence` and the scores of an `index` are means over the checkpoints: of one run (as in TracIn), or of
    models that were trained alike from other seeds, which takes the chance of one training out of the scores. `unrolled_scores`
    follows one run through its checkpoints. The model has its own parameters back after every call.

    Args:
        model, task: as for `Attributor`; the model's own parameters are those of the end of training.
        checkpoints: safetensors files, folders that hold them (as the Hugging Face `Trainer` writes), or state dicts.
        run_dir: one folder per checkpoint is made in it; None: temporary ones.
        options: as for `Attributor`.

    Raises:
        ConfigError: there are no checkpoints. StorageError: one cannot be read, or does not fit the model.
    """

    def __init__(
        self, model: nn.Module, task: Task, checkpoints: Sequence[Checkpoint], *, run_dir: str | Path | None = None, **options: Any
    ):
        if not checkpoints:
            raise ConfigError("checkpoints is empty; give files, folders or state dicts of the model.")
        self.model, self.checkpoints = model, list(checkpoints)
        folders = [None if run_dir is None else Path(run_dir) / f"checkpoint-{number:04d}" for number in range(len(checkpoints))]
        self.attributors = [Attributor(model, task, run_dir=folder, **options) for folder in folders]
        self._end = Attributor(model, task, run_dir=None if run_dir is None else Path(run_dir) / "end", **options)

    def fit(self, train: Any, **options: Any) -> Self:
        """Fit the curvature of every checkpoint; arguments as of `Attributor.fit`."""
        self._each(lambda attributor: attributor.fit(train, **options))
        return self

    def scores(self, queries: Any, train: Any, **options: Any) -> Scores:
        """Return the mean over the checkpoints of `Attributor.scores`."""
        return mean_scores(self._each(lambda attributor: attributor.scores(queries, train, **options)))

    def self_influence(self, train: Any, **options: Any) -> Tensor:
        """Return the mean over the checkpoints of `Attributor.self_influence`."""
        return torch.stack(self._each(lambda attributor: attributor.self_influence(train, **options))).mean(0)

    def index(self, train: Any, **options: Any) -> Index:
        """Keep small rows of every training example at every checkpoint, beside each other; arguments as of `Attributor.index`.

        A score of the index is the mean over the checkpoints, each with its own curvature, as of `scores`. Broken off anywhere,
        the same call goes on.
        """
        made = self._each(lambda attributor: attributor.index(train, **options))
        return Index(self, [one.folder for one in made], train=train)

    def index_folders(self, name: str) -> list[Path]:
        """Return where `index` keeps the index with a name: `whence.Index(checkpoints, checkpoints.index_folders("ekfac"))`."""
        return [attributor.run.sub("index", name) for attributor in self.attributors]

    def index_queries(self, queries: Any, query_rows: Sequence[int] | None, settings: Mapping[str, Any]) -> tuple[Projection, Held]:
        """Return every checkpoint's projection and queries as the index meets them, behind the first projection.

        Raises:
            MismatchError: the index is of other checkpoints, or of factors fitted otherwise.
        """
        held = self._each(lambda attributor, own: attributor.index_queries(queries, query_rows, own), self._own(settings))
        return held[0][0], held

    def index_exact(
        self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any], *, together: bool = False
    ) -> Tensor:
        """Return exact scores `[query, row]`, the mean over the checkpoints; as `Attributor.index_exact`."""
        found = self._each(
            lambda attributor, own: attributor.index_exact(queries, query_rows, rows, own, together=together), self._own(settings)
        )
        return torch.stack(found).mean(0)

    def index_tokens(self, queries: Any, query_rows: Sequence[int] | None, rows: list[Any], settings: Mapping[str, Any]) -> TokenScores:
        """Return scores by token on both sides, the mean over the checkpoints; as `Attributor.index_tokens`."""
        found = self._each(lambda attributor, own: attributor.index_tokens(queries, query_rows, rows, own), self._own(settings))
        return TokenScores(
            values=torch.stack([one.values for one in found]).mean(0),
            rows=torch.stack([one.rows for one in found]).mean(0),
            queries=torch.stack([one.queries for one in found]).mean(0),
        )

    def index_append(self, folders: Sequence[Path], rows: Any, ids: Sequence[int]) -> None:
        """Add rows to the index of every checkpoint.

        They are there once all checkpoints have them. After a call that broke off the same one goes on; one with other rows
        drops what was appended to some of the checkpoints alone.
        """
        stored = JoinedIndex.open(folders)
        self._own(stored.settings)
        number = len(stored.parts)
        self._each(lambda attributor, folder: attributor.index_append([folder], rows, ids, number=number), folders)

    def index_nearest(self, folders: Sequence[Path], rows: Any, settings: Mapping[str, Any]) -> None:
        """Refuse: what is near is different at each checkpoint."""
        raise ConfigError("an index of several checkpoints has no approximate one; accelerate an index of one checkpoint.")

    def _own(self, settings: Mapping[str, Any]) -> list[Any]:
        """Return what an index of as many checkpoints as there are here was made with at each of them."""
        own = list(settings.get(CHECKPOINTS, [settings]))
        if len(own) != len(self.checkpoints):
            raise MismatchError(
                f"the index is of {len(own)} checkpoints, not of {len(self.checkpoints)}. Open the folders of all (index_folders), "
                "or index again."
            )
        return own

    def unrolled_scores(
        self,
        queries: Any,
        train: Any,
        times: Sequence[float],
        *,
        strategy: StrategyName | None = None,
        weight_decay: float = 0.0,
        per_layer: bool = False,
        query_rows: Sequence[int] | None = None,
        train_rows: Sequence[int] | None = None,
        query_batch_size: Size = "auto",
        batch_size: Size = "auto",
        overwrite: bool = False,
    ) -> Scores:
        """Score for a whole run: each checkpoint stands for a segment of it (SOURCE: Bae et al., 2024).

        The queries' gradients, taken at the model's own parameters, are carried back through the segments: in each they meet
        the training gradients of its checkpoint, weighed by how far the segment could go in its time, and what later
        segments undid of an early difference is taken off by `exp(-time l)`.

        Args:
            queries, train: rows.
            times: sum of the learning rates in each checkpoint's segment, in the order of the checkpoints.
            strategy: which fitted curvature of every checkpoint to use.
            weight_decay: added to every eigenvalue.
            per_layer, query_rows, train_rows, query_batch_size, batch_size, overwrite: as of `Attributor.scores`.

        Raises:
            ConfigError: there is not one time for every checkpoint.
        """
        if len(times) != len(self.checkpoints):
            raise ConfigError(f"times has {len(times)} entries for {len(self.checkpoints)} checkpoints; give one for each segment.")
        segments = [Unrolled(time=time) for time in times]
        gradients = self._end.query_gradients(queries, train, query_rows=query_rows, query_batch_size=query_batch_size)
        parts = []
        for number in reversed(range(len(segments))):
            with self._loaded(self.checkpoints[number]):
                part, gradients = self.attributors[number].segment_scores(
                    gradients,
                    queries,
                    train,
                    segments[number],
                    strategy=strategy,
                    damping=weight_decay,
                    per_layer=per_layer,
                    query_rows=query_rows,
                    train_rows=train_rows,
                    batch_size=batch_size,
                    overwrite=overwrite,
                )
            parts.append(part)
        return combined(parts, 1.0)

    def _each(self, call: Callable[..., Any], *values: Sequence[Any]) -> list[Any]:
        """Call with every attributor, and with its own of each list of values, while the model has its checkpoint's parameters."""
        results = []
        for checkpoint, *given in zip(self.checkpoints, self.attributors, *values, strict=True):
            with self._loaded(checkpoint):
                results.append(call(*given))
        return results

    @contextmanager
    def _loaded(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Give the model a checkpoint's parameters for a while."""
        own = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        try:
            load_checkpoint(self.model, checkpoint)
            yield
        finally:
            self.model.load_state_dict(own)


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a state dict, a safetensors file, or a folder with such files, into a model.

    Raises:
        StorageError: it cannot be read, or does not fit the model.
    """
    if isinstance(checkpoint, Mapping):
        name, state = "the state dict", dict(checkpoint)
    else:
        path = Path(checkpoint)
        files = _weights(path) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise StorageError(f"checkpoint {path}: no safetensors file is there. Give a file, or a folder with model.safetensors.")
        name, state = f"checkpoint {path}", {}
        for file in files:
            try:
                state |= safetensors.torch.load_file(file)
            except (OSError, safetensors.SafetensorError) as error:
                raise StorageError(f"{file} cannot be read: {error}. Save the checkpoint again as safetensors.") from error
    own = model.state_dict(keep_vars=True)
    # peft saves adapters and new heads without the name of the adapter.
    names = {key.replace(".modules_to_save.default.", ".").replace(".default.", "."): key for key in own}
    state = {key if key in own else names.get(key, key): tensor for key, tensor in state.items()}
    # A tied tensor is stored under one of its names; what is not trained may be left out.
    given = {own[key].data_ptr() for key in state if key in own}
    missing = [key for key in own if key not in state and own[key].data_ptr() not in given and not _is_fixed(own[key])]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and own[key].shape != state[key].shape]
    if missing or unknown or wrong:
        what = (
            f"lacks {missing[0]!r}"
            if missing
            else f"has {unknown[0]!r}, which the model lacks"
            if unknown
            else f"has another shape of {wrong[0]!r}"
        )
        raise StorageError(f"{name} does not fit the model: it {what}. Give a checkpoint of this model.")
    model.load_state_dict(state, strict=False)


def _weights(folder: Path) -> list[Path]:
    """Return a folder's files of weights: whence train keeps second moments beside them, under the same names."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name.startswith(("model", "adapter_model"))] or files


def _is_fixed(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Return the mean of scores of the same queries and rows.

    Raises:
        ConfigError: there are none, or they are of different sizes.
    """
    return combined(scores, 1.0 / max(1, len(scores)))


def combined(scores: Sequence[Scores], factor: float) -> Scores:
    """Return the sum of scores of the same queries and rows, times a factor."""
    if len({tuple(part.values.shape) for part in scores}) != 1:
        raise ConfigError(
            f"scores of shapes {[tuple(part.values.shape) for part in scores]} cannot be averaged; give scores of the same rows."
        )
    first = scores[0]
    layers = {name: factor * torch.stack([part.per_layer[name] for part in scores]).sum(0) for name in first.per_layer}
    tokens = (
        None if first.per_token is None else factor * torch.stack([part.per_token for part in scores if part.per_token is not None]).sum(0)
    )
    values = factor * torch.stack([part.values for part in scores]).sum(0)
    return replace(first, values=values, per_layer=layers, per_token=tokens, settings={**first.settings, "parts": len(scores)})
