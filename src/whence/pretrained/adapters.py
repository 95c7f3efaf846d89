"""Low-rank adapters (LoRA: E. J. Hu et al., 2021) on a model of transformers, made, saved and told apart by peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whence.errors import ConfigError
from whence.pretrained.kinds import kind_of, need
from whence.tasks import MultipleChoice
from whence.tasks.hugging_face import bare

# Last names of the layers that get an adapter, by the architecture's name in its configuration (`model_type`).
_TARGETS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj", "c_fc")),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5", "longt5", "umt5"), ("q", "k", "v")),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
}
# Of all others, the first set that a model has whole: Llama, Mistral, Qwen, GPT-Neo, OPT, BART; BERT, RoBERTa, ELECTRA; DeBERTa.
_USUAL = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"))


@contextmanager
def peft_is_quiet() -> Iterator[None]:
    """Keep a warning away that nobody but peft can mend."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for it by a name that is going away.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def lora_targets(model: nn.Module, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the last names of the layers that get adapters: those that are asked for, else by architecture.

    Raises:
        ConfigError: the model has no layer of such a name, or is of an architecture that is not known.
    """
    kinds = _layers(model)
    have = f"{type(bare(model)).__name__} has linear layers named {', '.join(sorted(kinds))}"
    if asked is not None:
        missing = [name for name in asked if name not in kinds]
        if missing:
            raise ConfigError(f"lora_targets={missing[0]!r} names no linear layer; {have}.")
        return tuple(asked)
    inner: Any = bare(model)
    named = _TARGETS.get(str(getattr(getattr(inner, "config", None), "model_type", None)))
    found = next((names for names in (named, *_USUAL) if names is not None and kinds.keys() >= set(names)), None)
    if found is None:
        raise ConfigError(f"which layers get adapters is not known of this architecture: {have}. Give --lora-targets.")
    return found


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> Any:
    """Return the model with adapters that are trained and parameters that are not, but for the head of a classifier.

    An adapter adds `alpha / rank * B A` to a layer's weight; A is random, keyed by the seed, and B is zero, so that the model
    computes as before.
    """
    peft = need("peft")
    inner: Any = bare(model)
    kind = kind_of(type(inner).__name__)
    # What peft has no name for has a head that it does not know to be new.
    choice = kind is not None and kind.task is MultipleChoice
    head = [name for name, _ in inner.named_children() if name == "classifier"] if choice else None
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type=None if kind is None else kind.adapter,
        modules_to_save=head,
        # GPT-2's Conv1D is a transposed Linear.
        fan_in_fan_out=any("Conv1D" in _layers(model)[name] for name in targets),
    )
    with torch.random.fork_rng(devices=[]), peft_is_quiet():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has adapters of peft."""
    return hasattr(model, "peft_config")


def save_adapter(model: Any, folder: Path, base: str) -> None:
    """Save adapters and new heads; `base` is where the model without them lies, seen from the folder."""
    config = model.peft_config["default"]
    before = config.base_model_name_or_path
    config.base_model_name_or_path = base
    try:
        model.save_pretrained(folder, save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = before
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody filled in


def _layers(model: nn.Module) -> dict[str, set[str]]:
    """Return the classes of the linear layers by the last part of their names."""
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found.setdefault(name.rpartition(".")[2], set()).add(type(module).__name__)
    return found
