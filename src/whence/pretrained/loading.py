"""Models of Hugging Face folders and names, and peft adapters, with the task and collate function that fit them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from whence.errors import ConfigError
from whence.pretrained.adapters import peft_is_quiet
from whence.pretrained.collator import Collator
from whence.pretrained.kinds import KINDS, Kind, kind_of, need, no_kind
from whence.tasks import MultipleChoice, SequenceClassification, Task
from whence.tasks.hugging_face import bare, forward_parameters

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
# Where the classes of a classifier are counted: the last layer of its head, by the names that transformers uses.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight")


def open_pretrained(path: str | Path, *, task: Task | None = None) -> tuple[nn.Module, Task, Callable[[list[Any]], Any]]:
    """Load a checkpoint of transformers or peft; return the model, its task and a collate function.

    The class of the model is the one that its `config.json` names. An adapter folder (`adapter_config.json`) loads its
    base model and the adapter on top, trainable. Weights keep the type they were saved in. The model is in eval mode.
    Rows are tokenised dicts; see `Collator`.

    Args:
        path: a folder written by `save_pretrained` or the Trainer, or a name on the Hugging Face hub.
        task: instead of the task that the model's class stands for; any class of transformers may then be loaded.

    Raises:
        ConfigError: no such folder or name, no network, no configuration, a model without a ready task, weights that
            are missing from the checkpoint, or a package that is not installed.
    """
    transformers = need("transformers")
    name = _checked(path)
    with _reading(name):
        adapter = transformers.utils.find_adapter_config_file(name)
    if adapter is not None:
        return _open_adapter(transformers, name, task)
    model, kind = _load(transformers, name, task)
    return model, _task(task, kind), collator_for(model, kind, _tokenizer(transformers, name))


def _checked(path: str | Path) -> str:
    """Return the name of a folder with a model, or what may be a name on the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"the folder {str(path)!r} has neither config.json nor adapter_config.json. Give a folder written by "
                "model.save_pretrained(...) or a checkpoint folder of the Trainer."
            )
        return str(folder)
    if folder.exists():
        raise ConfigError(f"{str(path)!r} is a file. Give the folder that holds it, with config.json beside the weights.")
    if isinstance(path, Path) or not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise ConfigError(f"there is no folder {str(path)!r}. Give a folder written by save_pretrained, or a name on the Hugging Face hub.")
    return path


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever transformers, peft and the hub's client raise for files they cannot read into one kind of error."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")
        if Path(name).is_dir():
            raise ConfigError(f"the model in {name!r} cannot be loaded: {reason}. Save it again with save_pretrained.") from error
        raise ConfigError(
            f"{name!r} is no folder here, and the Hugging Face hub did not give it: {reason}. Check the name, the network and "
            "HF_HUB_OFFLINE, or download the model and give its folder."
        ) from error


def _load(
    transformers: Any, name: str, task: Task | None, *, kind: Kind | None = None, given: frozenset[str] = frozenset(), **options: Any
) -> tuple[nn.Module, Kind | None]:
    """Load the class that the configuration names, or that of `kind`; weights in `given` come later."""
    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(name, **options)
    if kind is None:
        architecture = (getattr(config, "architectures", None) or [None])[0]
        if architecture is None:
            raise ConfigError(
                f"the configuration of {name!r} does not say which class the model is ('architectures' is missing). "
                "Save the model again with model.save_pretrained(...)."
            )
        kind = kind_of(architecture)
        if kind is None and (task is None or not hasattr(transformers, architecture)):
            raise no_kind(f"the model in {name!r}", architecture)
        loader = getattr(transformers, architecture if kind is None else kind.auto)
    else:
        loader = getattr(transformers, kind.auto)
    with _reading(name):
        model, report = loader.from_pretrained(name, config=config, dtype="auto", output_loading_info=True)
    missing = sorted({*report["missing_keys"]} - given)
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(
            f"the checkpoint {name!r} lacks weights of {type(model).__name__}: {shown}. They would be random, and scores with them "
            "mean nothing. Give the checkpoint of the trained model."
        )
    return model.eval(), kind


def _open_adapter(transformers: Any, name: str, task: Task | None) -> tuple[nn.Module, Task, Collator]:
    peft = need("peft")
    with _reading(name):
        config = peft.PeftConfig.from_pretrained(name)
        given = peft.utils.load_peft_weights(name, device="cpu")
    base = config.base_model_name_or_path
    if not base:
        raise ConfigError(f"the adapter in {name!r} does not name its base model. Set base_model_name_or_path in adapter_config.json.")
    shapes = {key.removeprefix("base_model.model."): tuple(weight.shape) for key, weight in given.items()}
    kind = next((kind for kind in KINDS if kind.adapter is not None and kind.adapter == config.task_type), None)
    # The classes of a head that was trained with the adapter are told by the head alone.
    labels = next((shapes[head][0] for head in _HEADS if head in shapes), None)
    options = {} if labels is None or kind is None else {"num_labels": labels}
    if not Path(base).is_dir() and (beside := Path(name) / base).is_dir():
        base = str(beside)  # as whence train keeps it, so that the folder may be moved
    model, kind = _load(transformers, _checked(base), task, kind=kind, given=frozenset(shapes), **options)
    with _reading(name), peft_is_quiet():
        adapted = peft.PeftModel.from_pretrained(model, name, is_trainable=True)
    own = any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    return adapted.eval(), _task(task, kind), collator_for(adapted, kind, _tokenizer(transformers, name if own else base))


def _task(task: Task | None, kind: Kind | None) -> Task:
    if task is not None:
        return task
    assert kind is not None  # no_kind was raised otherwise
    return kind.task()


def _tokenizer(transformers: Any, name: str) -> Any:
    """Return the tokenizer beside the model, or None."""
    # Without any file of its own transformers would make an empty one.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def collator_for(model: nn.Module, kind: Kind | None, tokenizer: Any) -> Collator:
    """Return the collate function of a model of transformers; without a tokenizer rows cannot be padded."""
    inner: Any = bare(model)
    pad = getattr(inner.config, "pad_token_id", None)
    pads = None
    if tokenizer is not None:
        pad = tokenizer.pad_token_id if pad is None else pad
        if kind is not None and kind.task is SequenceClassification and pad is None:
            raise ConfigError(
                f"neither the tokenizer nor the configuration of {type(inner).__name__} names a padding token, so that rows of different "
                "length cannot share a batch. Set tokenizer.pad_token and model.config.pad_token_id, and save both again."
            )
        # Decoders that classify find the last real token by this.
        inner.config.pad_token_id = pad
        # Padding is masked, so that for the others any id will do.
        fill = 0 if pad is None else pad
        pads = {"input_ids": fill, "decoder_input_ids": fill, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return Collator(
        model=type(inner).__name__,
        columns=frozenset({*forward_parameters(model), "labels"}),
        labels="token" if kind is None else kind.labels,
        pads=pads,
        choices=kind is not None and kind.task is MultipleChoice,
    )
