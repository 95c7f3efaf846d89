"""Small random models of Hugging Face with rows of different lengths, one case per kind of task and architecture.

Test modules call `pytest.importorskip("transformers")` before they import this one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from whence.pretrained.collator import Collator
from whence.pretrained.kinds import kind_of
from whence.tasks.hugging_face import HuggingFaceTask, forward_parameters

VOCABULARY, CLASSES, PAD = 24, 3, 0
# More rows than the widest layer has features: the basis of a covariance that lacks rank is arbitrary.
LENGTHS = [5, 9, 3, 8, 7, 4, 9, 6, 5, 3, 7, 8, 4, 9, 6, 5]
WORDS = {"[PAD]": PAD, "[UNK]": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}


# No progress bars and remarks of transformers among the tests' output.
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")


_BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
_DISTIL = {
    "dim": 8,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
}
_GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": VOCABULARY,
    "n_positions": 20,
    "n_inner": 12,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 2}
_T5 = {
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": 2,
    "decoder_start_token_id": PAD,
}
_BART = {
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 20,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8, "patch_size": 4}


def ids(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def classified(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids(length, generator), "label": index % CLASSES}


def measured(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids(length, generator), "label": float(torch.randn((), generator=generator))}


def tagged_twice(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids(length, generator), "labels": [float(index % 2), 1.0, float(index % 3 == 0)]}


def tagged(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids(length, generator), "labels": [-100, *((index + j) % CLASSES for j in range(length - 1))]}


def chosen(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": [ids(length + j % 2, generator) for j in range(4)], "label": index % 4}


def text(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": ids(length, generator)}


def prompted(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    tokens = ids(length, generator)
    return {"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]}


def translated(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": [*ids(length, generator), 2], "labels": [*ids(LENGTHS[-index - 1], generator), 2]}


def ended(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": [*ids(length, generator), 2], "label": index % CLASSES}


def pictured(index: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": index % CLASSES}


@dataclass(frozen=True, kw_only=True)
class HFCase:
    """A model class with its configuration, and how a row is made."""

    name: str
    model: str
    config: str
    options: dict[str, Any]
    row: Callable[[int, int, torch.Generator], dict[str, Any]]

    def build(self) -> nn.Module:
        """Return a random model in eval mode, its weights large enough that outputs differ."""
        torch.manual_seed(1)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    def rows(self) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(3)
        return [self.row(index, length, generator) for index, length in enumerate(LENGTHS)]

    @property
    def task(self) -> type[HuggingFaceTask]:
        kind = kind_of(self.model)
        assert kind is not None
        return kind.task

    def collator(self, model: nn.Module) -> Collator:
        kind = kind_of(self.model)
        assert kind is not None
        return Collator(
            model=self.model,
            columns=frozenset({*forward_parameters(model), "labels"}),
            labels=kind.labels,
            choices=kind.task.__name__ == "MultipleChoice",
        )

    def save(self, folder: Path, *, with_tokenizer: bool = True) -> Path:
        self.build().save_pretrained(folder)
        if with_tokenizer and "pixel_values" not in self.rows()[0]:
            tokenizer().save_pretrained(folder)
        return folder


_THREE = {"num_labels": CLASSES}
CASES = [
    HFCase(name="bert", model="BertForSequenceClassification", config="BertConfig", options=_BERT | _THREE, row=classified),
    HFCase(name="bert number", model="BertForSequenceClassification", config="BertConfig", options=_BERT | {"num_labels": 1}, row=measured),
    HFCase(name="bert labels", model="BertForSequenceClassification", config="BertConfig", options=_BERT | _THREE, row=tagged_twice),
    HFCase(
        name="gpt2 classes",
        model="GPT2ForSequenceClassification",
        config="GPT2Config",
        options=_GPT2 | _THREE | {"pad_token_id": PAD},
        row=classified,
    ),
    HFCase(name="bart classes", model="BartForSequenceClassification", config="BartConfig", options=_BART | _THREE, row=ended),
    HFCase(name="vit", model="ViTForImageClassification", config="ViTConfig", options=_VIT | _THREE, row=pictured),
    HFCase(name="distilbert", model="DistilBertForTokenClassification", config="DistilBertConfig", options=_DISTIL | _THREE, row=tagged),
    HFCase(name="roberta", model="RobertaForMultipleChoice", config="RobertaConfig", options=_BERT, row=chosen),
    HFCase(name="gpt2", model="GPT2LMHeadModel", config="GPT2Config", options=_GPT2, row=text),
    HFCase(name="llama", model="LlamaForCausalLM", config="LlamaConfig", options=_LLAMA, row=prompted),
    HFCase(name="qwen2", model="Qwen2ForCausalLM", config="Qwen2Config", options=_LLAMA, row=text),
    HFCase(name="t5", model="T5ForConditionalGeneration", config="T5Config", options=_T5, row=translated),
    HFCase(name="bart", model="BartForConditionalGeneration", config="BartConfig", options=_BART, row=translated),
]
BY_NAME = {case.name: case for case in CASES}
