"""Real architectures of Hugging Face and torch, small and random, with rows of their own, a task, and what must be tracked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cases_norm import spread
from oracle_layers import PROJECTIONS, is_conv1d_of_transformers, is_norm
from whence.tasks import Task

VOCABULARY, LENGTHS, QUERY_LENGTHS = 11, (4, 6, 3, 5, 6, 4, 5, 3, 6, 5, 4), (5, 3, 6)
IMAGES = 11


class HuggingFace(Task):
    """Classes, next words, words of a target, or the word at each place: whatever the model's logits say."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(**batch["inputs"]).logits
        if logits.dim() == 2:
            return nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        words = batch["words"]
        if "decoder_input_ids" not in batch["inputs"] and batch["shift"]:
            logits, words = logits[:, :-1], words[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), words, reduction="none", ignore_index=-100)
        return losses.sum(1)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(**batch["inputs"]).logits
        own = logits if logits.dim() == 2 else logits * self.real(batch, logits)
        return own.sin().flatten(1).sum(1) - own.flatten(1)[:, 0]

    def real(self, batch: Any, logits: Tensor) -> Tensor:
        mask = None if "decoder_input_ids" in batch["inputs"] else self.padding_mask(batch)
        return torch.ones_like(logits[..., :1]) if mask is None else mask.unsqueeze(-1).to(logits)

    def padding_mask(self, batch: Any) -> Tensor | None:
        return batch["inputs"].get("attention_mask")


def words(generator: torch.Generator, lengths: tuple[int, ...]) -> list:
    """Rows of words (none of them 0 or 1, which pad), a label, and a word for each."""

    def draw(n: int) -> Tensor:
        return torch.randint(2, VOCABULARY, (n,), generator=generator)

    return [{"ids": draw(n), "words": draw(n), "label": int(draw(1)) % 3} for n in lengths]


def collate_words(rows: list, *, shift: bool = False, pad: int = 0, side: str = "right") -> dict:
    """Pad to the longest row."""
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str | None, fill: int) -> Tensor:
        made = []
        for row in rows:
            own = torch.ones_like(row["ids"]) if key is None else row[key]
            rest = own.new_full((longest - len(own),), fill)
            made.append(torch.cat([own, rest] if side == "right" else [rest, own]))
        return torch.stack(made)

    inputs = {"input_ids": padded("ids", pad), "attention_mask": padded(None, 0)}
    following = padded("ids" if shift else "words", -100)
    return {"inputs": inputs, "words": following, "shift": shift, "label": torch.tensor([row["label"] for row in rows])}


def targets(generator: torch.Generator, lengths: tuple[int, ...]) -> list:
    """Five words and four words of a target: nothing is padded, for the encoder's and the decoder's masks have one name to share."""
    return [
        {"ids": torch.randint(2, VOCABULARY, (5,), generator=generator), "words": torch.randint(2, VOCABULARY, (4,), generator=generator)}
        for _ in lengths
    ]


def collate_targets(rows: list) -> dict:
    """Feed the target one word late."""
    after = torch.stack([row["words"] for row in rows])
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    inputs = {"input_ids": torch.stack([row["ids"] for row in rows]), "decoder_input_ids": before}
    return {"inputs": inputs, "words": after}


def pictures(generator: torch.Generator, lengths: tuple[int, ...], *, size: int, channels: int) -> list:
    """Rows of an image and a label."""
    return [(torch.randn(channels, size, size, generator=generator).double() + 0.3, index % 3) for index, _ in enumerate(lengths)]


def collate_pictures(rows: list) -> dict:
    """Stack the images."""
    return {"inputs": {"pixel_values": torch.stack([x for x, _ in rows])}, "label": torch.tensor([label for _, label in rows])}


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A model and its rows; `fallback`: whether bare parameters are tracked.

    `left_out`: layers called without the batch's axis, or (Gemma's embedding, which scales) not what their class says.
    """

    name: str
    factory: Callable[[], nn.Module]
    rows: Callable[[torch.Generator, tuple[int, ...]], list] = words
    collate: Callable[[list], dict] = collate_words
    left_out: tuple[str, ...] = ()
    fallback: bool = False

    def data(self) -> tuple[list, list]:
        generator = torch.Generator().manual_seed(len(self.name))
        return self.rows(generator, LENGTHS), self.rows(generator, QUERY_LENGTHS)

    def tracked(self, model: nn.Module) -> list[str]:
        """Name all layers that `layers="all"` must track, from the definitions in the contract."""
        found: list[str] = []
        seen: set[int] = set()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for name, module in model.named_modules():
            own = {key: p for key, p in module.named_parameters(recurse=False) if p.requires_grad}
            if isinstance(module, nn.MultiheadAttention):
                found += [f"{name}.{part}" for part in PROJECTIONS]
                seen |= {id(p) for p in module.parameters()}
            elif known(module):
                # The weight of a tied head belongs to the embedding, wherever that stands; its bias is its own.
                mine = {id(p) for p in own.values()} - (set() if isinstance(module, nn.Embedding) else tables)
                if mine - seen:
                    found.append(name)
                seen |= mine
            elif self.fallback:
                found += [f"{name}.{key}".lstrip(".") for key, p in own.items() if id(p) not in seen]
        return [name for name in found if name not in self.left_out]


def known(module: nn.Module) -> bool:
    """Tell whether the contract has a handler for the module."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return isinstance(module, kinds) or is_conv1d_of_transformers(module) or is_norm(module)


def hugging_face(kind: str, config: str, **options: Any) -> nn.Module:
    """Make a model of transformers with weights large enough to matter, and norms and biases that are not those of the start."""
    import transformers

    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Move all parameters off their first values."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.35 * torch.randn_like(p) + (1.0 if p.dim() == 1 and bool((p == 1).all()) else 0.0))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.BatchNorm2d):
            spread(module)
    return model


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 7,
    "max_position_embeddings": 12,
    "num_labels": 3,
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 6,
    "max_position_embeddings": 16,
}
GPT2 = {"n_embd": 6, "n_layer": 2, "n_head": 2, "n_positions": 12, "n_inner": 7, "bos_token_id": 0, "eos_token_id": 0}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 6, "n_layers": 2, "n_heads": 2, "hidden_dim": 7, "max_position_embeddings": 12}
T5 = {"vocab_size": VOCABULARY, "d_model": 6, "d_kv": 3, "d_ff": 7, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
VIT = {"hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 7, "image_size": 6, "patch_size": 2}
RESNET = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 5], "depths": [1, 2], "layer_type": "basic", "num_labels": 3}


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder with a final norm, on words."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=7, dropout=0.0, batch_first=True, norm_first=True)
        self.words = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, nn.LayerNorm(6), enable_nested_tensor=False), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        x = torch.tanh(x) * attention_mask.unsqueeze(-1)
        return Output(self.head(x.sum(1) / attention_mask.sum(1, keepdim=True)))


@dataclass
class Output:
    """What a model of transformers gives."""

    logits: Tensor


def resnet_of_groups() -> nn.Module:
    """Replace the batch norms of a ResNet by group norms."""
    model = hugging_face("ResNetForImageClassification", "ResNetConfig", **RESNET)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, spread(nn.GroupNorm(1, child.num_features)))
    return model


def adapted(base: Callable[[], nn.Module], targets: list[str], *, dora: bool = False) -> nn.Module:
    """Wrap a model into LoRA adapters whose second matrix is not zero."""
    import peft

    # GPT-2's Conv1D is a transposed Linear; peft would remark that it sets this itself.
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, use_dora=dora, fan_in_fan_out="c_attn" in targets, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft looks at an attribute that transformers has renamed
        model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.5 * torch.randn_like(p))
    return model


bert = partial(hugging_face, "BertForSequenceClassification", "BertConfig", **BERT)
gpt2 = partial(hugging_face, "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, **GPT2)
small_images, larger_images = partial(pictures, size=6, channels=3), partial(pictures, size=20, channels=1)
next_word = partial(collate_words, shift=True)

ARCHITECTURES = [
    Architecture(name="bert", factory=bert, left_out=("bert.embeddings.position_embeddings",)),
    Architecture(
        name="roberta",
        factory=partial(hugging_face, "RobertaForMaskedLM", "RobertaConfig", **BERT, pad_token_id=1),
        collate=partial(collate_words, pad=1),
    ),
    Architecture(
        name="distilbert",
        factory=partial(hugging_face, "DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT, num_labels=3),
        left_out=("distilbert.embeddings.position_embeddings",),
    ),
    Architecture(name="gpt2", factory=gpt2, collate=next_word, left_out=("transformer.wpe",)),
    Architecture(name="llama", factory=partial(hugging_face, "LlamaForCausalLM", "LlamaConfig", **LLAMA), collate=next_word),
    Architecture(
        name="qwen2",
        factory=partial(hugging_face, "Qwen2ForCausalLM", "Qwen2Config", **LLAMA, tie_word_embeddings=True),
        collate=next_word,
    ),
    Architecture(
        name="gemma",
        factory=partial(hugging_face, "GemmaForCausalLM", "GemmaConfig", **LLAMA, head_dim=4),
        collate=next_word,
        left_out=("model.embed_tokens",),
    ),
    Architecture(
        name="t5",
        factory=partial(hugging_face, "T5ForConditionalGeneration", "T5Config", **T5, dropout_rate=0.0),
        rows=targets,
        collate=collate_targets,
        left_out=(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        ),
    ),
    Architecture(
        name="vit",
        factory=partial(hugging_face, "ViTForImageClassification", "ViTConfig", **VIT, num_labels=3),
        rows=small_images,
        collate=collate_pictures,
        fallback=True,
    ),
    Architecture(name="torch_encoder", factory=lambda: shaken(Encoder())),
    Architecture(
        name="resnet",
        factory=partial(hugging_face, "ResNetForImageClassification", "ResNetConfig", **RESNET),
        rows=larger_images,
        collate=collate_pictures,
    ),
    Architecture(name="resnet_of_groups", factory=resnet_of_groups, rows=larger_images, collate=collate_pictures),
    Architecture(name="bert_lora", factory=partial(adapted, bert, ["query", "value", "dense"])),
    Architecture(name="gpt2_lora", factory=partial(adapted, gpt2, ["c_attn", "c_proj"]), collate=next_word),
    Architecture(name="bert_dora", factory=partial(adapted, bert, ["query", "value"], dora=True), fallback=True),
]
