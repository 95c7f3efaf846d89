"""Configurations of small language models with random weights, of the layers and widths of `whence.recipes.family.SIZES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from whence.recipes.family import SIZES, positions
from whence.recipes.settings import DataSettings, PresetName


def language_model(size: PresetName, tokenizer: Any, data: DataSettings, architecture: str) -> Any:
    """Return the configuration of a small model of an architecture (`gpt2`, `llama`, `gpt_neo`, `t5`) for a tokenizer."""
    layers, width = SIZES[size]
    end = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    return _CONFIGURATIONS[architecture](layers, width, positions(data), common)


def _gpt2(layers: int, width: int, length: int, common: dict[str, Any]) -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 32, n_positions=length, **common)


def _llama(layers: int, width: int, length: int, common: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        **common,
    )


def _gpt_neo(layers: int, width: int, length: int, common: dict[str, Any]) -> Any:
    from transformers import GPTNeoConfig

    kinds = [[["global", "local"], layers // 2]]
    return GPTNeoConfig(
        hidden_size=width, num_layers=layers, num_heads=width // 32, attention_types=kinds, max_position_embeddings=length, **common
    )


def _t5(layers: int, width: int, length: int, common: dict[str, Any]) -> Any:
    from transformers import T5Config

    end = common["eos_token_id"]
    config = T5Config(
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=width // 32,
        feed_forward_proj="gated-gelu",  # as of FLAN-T5
        pad_token_id=end,
        **common,
    )
    config.decoder_start_token_id = end
    return config


_CONFIGURATIONS: dict[str, Callable[[int, int, int, dict[str, Any]], Any]] = {
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "llama": _llama,
    "t5": _t5,
}
