"""Which task a model class of transformers is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from whence.errors import ConfigError
from whence.pretrained.collator import LabelShape
from whence.runtime import packages
from whence.tasks import CausalLM, MultipleChoice, Seq2SeqLM, SequenceClassification, TokenClassification
from whence.tasks.hugging_face import HuggingFaceTask


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A task with its class of models.

    Attributes:
        task: made without arguments.
        auto: the class of transformers that loads such models.
        table: the table of transformers that lists them.
        adapter: what peft calls the task, if it has a name for it.
        labels: how rows carry labels.
    """

    task: type[HuggingFaceTask]
    auto: str
    table: str
    adapter: str | None
    labels: LabelShape


KINDS = (
    Kind(
        task=SequenceClassification,
        auto="AutoModelForSequenceClassification",
        table="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        adapter="SEQ_CLS",
        labels="row",
    ),
    Kind(
        task=SequenceClassification,
        auto="AutoModelForImageClassification",
        table="MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        adapter=None,
        labels="row",
    ),
    Kind(
        task=TokenClassification,
        auto="AutoModelForTokenClassification",
        table="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        adapter="TOKEN_CLS",
        labels="token",
    ),
    Kind(
        task=MultipleChoice,
        auto="AutoModelForMultipleChoice",
        table="MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
        adapter=None,
        labels="row",
    ),
    Kind(
        task=Seq2SeqLM,
        auto="AutoModelForSeq2SeqLM",
        table="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        adapter="SEQ_2_SEQ_LM",
        labels="token",
    ),
    Kind(
        task=CausalLM,
        auto="AutoModelForCausalLM",
        table="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        adapter="CAUSAL_LM",
        labels="next token",
    ),
)


def kind_of(architecture: str) -> Kind | None:
    """Return the kind whose table in transformers lists the class, or None."""
    tables = import_module("transformers.models.auto.modeling_auto")
    for kind in KINDS:
        listed = getattr(tables, kind.table).values()
        if any(architecture == name or (isinstance(name, tuple | list) and architecture in name) for name in listed):
            return kind
    return None


def no_kind(what: str, architecture: str) -> ConfigError:
    """Return the error for a class that no task is known for."""
    kinds = ", ".join(dict.fromkeys(kind.task.__name__ for kind in KINDS))
    return ConfigError(
        f"{what} is a {architecture}, for which whence has no ready task (those it has: {kinds}). Give task=..., a task of your own "
        "(whence.tasks.Task), or load the model yourself and use whence.Attributor(model, task, collate=...)."
    )


def need(name: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed.
    """
    return packages.need(name, "Hugging Face models need", "hf")


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers to errors, and its bars over weights away, for a while."""
    logging = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
