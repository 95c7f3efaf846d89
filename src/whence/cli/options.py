"""The options of every verb: keyword-only dataclasses, of which the command line, its help and its YAML files are made.

A field's docstring is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from whence.cli.values import Count, Fraction, Names, Numbers, Size, Switch, Texts, Whole

# The parser resolves inherited annotations here: Measurement, PresetName.
from whence.recipes.settings import DataSettings, Measurement, PresetName, TrainingSettings  # noqa: F401

Strategy = Literal["identity", "diagonal", "kfac", "ekfac"]


@dataclass(frozen=True, kw_only=True)
class DataOptions(DataSettings):
    """Which trained model, and which data; for recipes that ask for them (cot, glue, instruct, stdlib, swag, wikitext)."""

    checkpoint_dir: Path | None = None
    """Folder of the trained model: of whence train, or a checkpoint of your own."""

    columns: Names | None = None  # type: ignore[assignment]  # a list on the command line
    """Columns of the text, for data of your own: one or two for glue, the one of the text for wikitext and stdlib, prompt and
    answer for instruct."""

    max_length: Count | None = None
    """Longest row in tokens; for wikitext the length of every block."""

    max_train_rows: Count | None = None
    """Take only the first training rows."""

    max_query_rows: Count | None = None
    """Take only the first validation rows as queries."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        return values | ({} if self.columns is None else {"columns": tuple(self.columns)})

    def settings(self) -> DataSettings:
        """Return the options about data."""
        return DataSettings(**{name: value for name, value in self.given().items() if name != "checkpoint_dir"})


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainingSettings):
    """How a model is trained."""

    train_batch_size: Count | None = None
    """Rows per step."""

    eval_batch_size: Count | None = None
    """Rows at a time when queries are measured."""

    freeze: Names = field(default_factory=list)  # type: ignore[assignment]  # a list on the command line
    """Parameters that are not trained, and so not attributed: names or patterns, for example *embeddings*."""

    lora_targets: Names | None = None  # type: ignore[assignment]  # a list on the command line
    """With --lora-rank: last names of the layers that get adapters. Default: by architecture, for example c_attn, c_proj, c_fc."""

    seed: Whole = 1004
    """Of a new head, new adapters, a random start, the order of rows and dropout."""

    def settings(self) -> TrainingSettings:
        """Return the options as the library takes them."""
        targets = None if self.lora_targets is None else tuple(self.lora_targets)
        return TrainingSettings(**{**vars(self), "freeze": tuple(self.freeze), "lora_targets": targets})


@dataclass(kw_only=True)
class RetrainOptions:
    """How models are trained again."""

    repeats: Count | None = None
    """Trainings of each set of rows, with different seeds. Default: 5, for counterfactual and clean 3, for estimate and select 1."""

    jobs: int = 1
    """Trainings at a time; -1 uses every core."""

    backend: Literal["loky", "threading", "dask", "ray"] = "loky"
    """Where joblib runs them: processes here, or a cluster of dask or ray."""

    def given(self, *, repeats: int) -> dict[str, Any]:
        """Return the options as the library takes them, checked; `repeats` if none are given."""
        from whence.evaluate.retrain import check_jobs

        check_jobs(self.jobs)
        return {"repeats": self.repeats or repeats, "n_jobs": self.jobs, "backend": self.backend}


@dataclass(kw_only=True)
class RunOptions:
    """Which run, on which device."""

    run_dir: Path | None = None
    """Run folder. Default: runs/NAME, after the recipe's name."""

    layers: Names | None = None
    """Layers to track: names or patterns, separated by commas, all, or a list that the recipe names (wikitext: seed). Default: all
    but embeddings and heads as wide as the vocabulary."""

    fallback: Switch = False
    """Also track parameters without a handler, one backward pass per example."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""

    seed: Whole = 0
    """Seed of everything random."""

    batch_size: Size = "auto"
    """Training rows per batch, or auto: halved when memory runs out. Changes speed and memory, not results."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of products; float32 is the model's own. Sums are float32 at least."""

    adam: Switch = False
    """Scale gradients as Adam's steps were, by the second moments that whence train keeps."""

    compile: Switch = False
    """Run the model through torch.compile."""

    offload: Switch = False
    """Keep activations and factors in the CPU's memory until they are needed."""

    json: Switch = False
    """Print the data as JSON."""


@dataclass(kw_only=True)
class KeepOptions(RunOptions):
    """Which run, on which device, of a verb that keeps what it computes under a name."""

    overwrite: Switch = False
    """Start again where the run folder holds results of another model, data set or setting."""


@dataclass(kw_only=True)
class FitOptions:
    """How the curvature is fitted."""

    strategy: Strategy = "ekfac"
    """Form of the curvature."""

    empirical: Switch = False
    """Use the data's own labels (empirical Fisher) instead of labels drawn from the model (true Fisher)."""

    max_examples: Count | None = None
    """Fit on this many training rows only."""


@dataclass(kw_only=True)
class ResponseOptions:
    """What weight an eigen-direction gets."""

    response: str = "inverse"
    """inverse (a converged model), or unrolled:TIME for a run of finite length, TIME being the sum of its learning rates."""


@dataclass(kw_only=True)
class WeightOptions(ResponseOptions):
    """What weight an eigen-direction gets, and what is added to its eigenvalue."""

    damping: str = "auto"
    """A number (absolute), auto, calibrated, relative:0.1 (of each layer's mean eigenvalue) or relative:0.1:model (of all layers' mean)."""


@dataclass(kw_only=True)
class InverseOptions(WeightOptions):
    """Which fitted curvature is inverted, and how."""

    strategy: Strategy | None = None
    """Form of the curvature; it must be fitted, except identity, which needs no fit. Default: ekfac; with --over-run identity."""


@dataclass(kw_only=True)
class IndexOptions:
    """What an index keeps of every training row."""

    projection: Literal["factors", "pca", "kronecker", "sjlt", "none"] = "factors"
    """factors: leading singular triplets of each layer's gradient; pca: leading eigenvectors; kronecker: random directions;
    sjlt: a count sketch; none: everything."""

    keep: Fraction = 1 / 64
    """Bytes of a row as a share of the float32 gradient's, for example 1/64."""

    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """Type of the numbers that are kept."""


@dataclass(kw_only=True)
class MatrixOptions:
    """What is scored."""

    query_batch_size: Size = "auto"
    """Queries per batch, or auto."""

    per_layer: Switch = False
    """Keep each layer's part of the scores too."""

    per_token: Switch = False
    """Keep each training token's part of the scores too."""

    over_run: Switch = False
    """Mean over the snapshots of the training; a curvature that is asked for is fitted at each. Default of score for glue
    and swag, with --normalize cosine, unless --strategy, --damping, --response, --solver, --normalize or --aggregate is given."""

    solver: Literal["direct", "cg", "exact"] = "direct"
    """direct: the fitted curvature's inverse; cg: conjugate gradients from there; exact: the Gauss-Newton matrix itself."""

    query_rank: Count | None = None
    """Keep each query's preconditioned gradients at this rank: less memory."""

    normalize: Literal["relatif", "cosine"] | None = None
    """Divide by the training row's own norm (relatif), or by both norms (cosine)."""

    aggregate: Literal["queries", "rows", "both"] | None = None
    """Sum over queries, training rows or both."""

    query_rows: Numbers | None = None
    """Queries to score, for example 0,3,7. Default: all."""

    train_rows: Numbers | None = None
    """Training rows to score. Default: all."""


@dataclass(kw_only=True)
class ScoreOptions(MatrixOptions):
    """What is scored, and under which name it is kept."""

    draws: Count | None = None
    """With --solver cg: labels drawn per training row instead of all outputs, which language models have too many of."""

    name: str | None = None
    """Folder of these scores within the run folder. Default: the strategy's name; over a run over-run, or over-run-STRATEGY."""


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """What is asked about; one of them. Default: the recipe's first query."""

    query: Numbers | None = None
    """The recipe's own queries by number, for example 0,3,7."""

    text: Texts | None = None
    """A text to ask about, given once or more: of a language model the text itself, of a classifier the class that it reads in it."""

    rows: Numbers | None = None
    """Training rows by number, for example 3,17: why the model does on them what it does."""

    file: Path | None = None
    """JSON lines, each {"text": "..."} or the columns of the recipe's data; without a label a classifier is asked for what it reads."""

    class_: str | None = None
    """All of the recipe's queries of a class, by its name or number."""

    together: Switch = False
    """Explain all that is asked about as one, by the mean of the measurements, and say how much they agree."""


@dataclass(kw_only=True)
class ListOptions:
    """What is listed."""

    k: Count = 10
    """Rows per list."""

    bottom: Switch = False
    """List the other end too."""
