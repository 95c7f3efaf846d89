"""Where a fine-tune starts: pretrained weights with a new head, or a small random model with a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from whence.errors import ConfigError
from whence.pretrained.adapters import add_lora, lora_targets
from whence.pretrained.kinds import need, quiet
from whence.recipes.family import Family, TokenizerStyle, auto_of
from whence.recipes.rows import Row
from whence.recipes.settings import DataSettings, PresetName, TrainingSettings

VOCABULARY: dict[PresetName, int] = {"tiny": 1000, "mini": 4000, "small": 8000}
_SPECIAL: dict[TokenizerStyle, dict[str, str]] = {
    "bert": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    "gpt2": {"eos_token": "<|endoftext|>"},
}


def make_start(family: Family, rows: Sequence[Row], data: DataSettings, training: TrainingSettings) -> tuple[Any, Any]:
    """Return an untrained model and its tokenizer; what is random is keyed by the training's seed.

    Raises:
        ConfigError: the pretrained model cannot be loaded.
    """
    transformers = need("transformers")
    head = family.head(rows, data)
    if training.preset is None:
        model, tokenizer = _pretrained(transformers, family, head, training)
    else:
        tokenizer = make_tokenizer(family.style, family.texts(rows, data), training.preset)
        config = family.preset(training.preset, tokenizer, data, training.architecture or family.architectures[0])
        _set(config, head)
        _set_dropout(config, training.dropout)
        model = _seeded(training.seed, lambda: getattr(transformers, auto_of(family, config)).from_config(config))
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def settle_lora(training: TrainingSettings, model: Any) -> TrainingSettings:
    """Return the settings with those of adapters filled in, where adapters are asked for.

    Raises:
        ConfigError: the model has no such layers.
    """
    if training.lora_rank is None:
        return training
    dropout = 0.1 if training.dropout is None else training.dropout
    targets = lora_targets(model, training.lora_targets)
    chosen = {"lora_alpha": 8.0 * training.lora_rank, "lora_dropout": dropout}  # as in the published runs
    return replace(training.over(chosen), lora_targets=targets)


def adapted(model: Any, training: TrainingSettings) -> Any:
    """Return the model as it is trained: with new adapters, keyed by the training's seed, where they are asked for."""
    if training.lora_rank is None:
        return model
    alpha, dropout, targets = training.lora_alpha, training.lora_dropout, training.lora_targets
    assert alpha is not None and dropout is not None and targets is not None  # settle_lora  # noqa: PT018
    return add_lora(model, rank=training.lora_rank, alpha=alpha, dropout=dropout, targets=targets, seed=training.seed)


def load_start(family: Family, folder: Path, training: TrainingSettings) -> Any:
    """Return the untrained model that was saved in a folder, with the adapters that it was trained with, untrained too."""
    transformers = need("transformers")
    with quiet(transformers):
        config = transformers.AutoConfig.from_pretrained(folder)
        return adapted(getattr(transformers, auto_of(family, config)).from_pretrained(folder), training)


def outline(family: Family, folder: Path) -> Any:
    """Return the model of a folder without its weights, to look up the names of its layers."""
    transformers = need("transformers")
    config = transformers.AutoConfig.from_pretrained(folder)
    with quiet(transformers), torch.device("meta"):
        return _seeded(0, lambda: getattr(transformers, auto_of(family, config)).from_config(config))


def _pretrained(transformers: Any, family: Family, head: dict[str, Any], training: TrainingSettings) -> tuple[Any, Any]:
    name = str(training.model)
    if (Path(name) / "adapter_config.json").is_file():
        raise ConfigError(f"{name} holds adapters, and no model to start from. Give the model that they are for as --model: {name}/start.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        config = transformers.AutoConfig.from_pretrained(name)
        _set(config, head)
        _set_dropout(config, training.dropout)
        with quiet(transformers):  # that the head is new is the point
            model = _seeded(
                training.seed,
                lambda: getattr(transformers, auto_of(family, config)).from_pretrained(
                    name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
                ),
            )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"the model {name!r} cannot be loaded: {reason}. Give --model FOLDER_OR_NAME of a pretrained model, check the network, or "
            "start from a small random one with --preset small."
        ) from error
    return model, tokenizer


def _seeded(seed: int, make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _set(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _set_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout probability that a configuration names (`hidden_dropout_prob`, `attn_pdrop`, `classifier_dropout`, ...)."""
    if dropout is None:
        return
    for name, value in list(vars(config).items()):
        probability = isinstance(value, float) or (value is None and name == "classifier_dropout")
        if probability and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, dropout)


def make_tokenizer(style: TokenizerStyle, texts: Iterator[str], size: PresetName) -> Any:
    """Return a tokenizer made from text: pairs of bytes, in lower case for bert, framed as the style's models expect.

    Not word pieces, as BERT's own: the same text gives other ones every time (tokenizers 0.23).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = _SPECIAL[style]
    tokenizer = Tokenizer(models.BPE())
    if style == "bert":
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=VOCABULARY[size],
        special_tokens=list(special.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    number: dict[str, Any] = {token: tokenizer.token_to_id(token) for token in special.values()}
    if style == "bert":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", number["[SEP]"]), ("[CLS]", number["[CLS]"]))
    elif style == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", number["</s>"]), ("<s>", number["<s>"]), add_prefix_space=False)
    return need("transformers").PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
