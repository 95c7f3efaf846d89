"""Cases with torch's attention, whose projections are no calls of modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import case_tasks as t
from case import Case, simple
from case_data import collate_padded, collate_streams, labelled, sequences

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def four(*names: str) -> str:
    """Return the names of the projections of attentions."""
    return " ".join(f"{name}.{part}" for name in names for part in PARTS)


def unlike(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Give biases that are not zero, and weights large enough to make attention matter."""
    with torch.no_grad():
        for name, p in attention.named_parameters():
            p.normal_() if "bias" in name else p.mul_(1.5)
    return attention


class SelfAttention(nn.Module):
    """Five positions that look at each other; `mask` is for all pairs of positions, "bool" or "float"."""

    def __init__(self, *, need_weights: bool = True, mask: str = "", keywords: bool = False, **options: Any) -> None:
        super().__init__()
        self.attn, self.head = unlike(nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})), nn.Linear(4, 3)
        self.need_weights, self.mask, self.keywords = need_weights, mask, keywords

    def pairs(self, n: int, like: Tensor) -> Tensor | None:
        if not self.mask:
            return None
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        return later if self.mask == "bool" else torch.linspace(-2, 2, n * n, dtype=like.dtype).sin().view(n, n)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attn.batch_first else x.transpose(0, 1)
        options = {"need_weights": self.need_weights, "attn_mask": self.pairs(5, x)}
        y, weights = self.attn(query=x, key=x, value=x, **options) if self.keywords else self.attn(x, x, x, **options)
        assert (weights is None) != self.need_weights
        y = torch.tanh(y)
        return self.head(y.mean(1) if self.attn.batch_first else y.mean(0))


class PaddedAttention(nn.Module):
    """Attention within padded rows; what it gives at padding is dropped."""

    def __init__(self, *, need_weights: bool = True) -> None:
        super().__init__()
        self.attn, self.head, self.need_weights = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 3), need_weights

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, _ = self.attn(x, x, x, key_padding_mask=mask == 0, need_weights=self.need_weights)
        y = torch.tanh(y) * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


class CrossAttention(nn.Module):
    """Four positions look at six, of other widths; or, with `keys` and `values` of 4, through packed weights."""

    def __init__(self, *, batch_first: bool = True, keys: int = 3, values: int = 2, **options: Any) -> None:
        super().__init__()
        widths = {} if keys == values == 4 else {"kdim": keys, "vdim": values}
        self.attn = unlike(nn.MultiheadAttention(4, 2, batch_first=batch_first, **widths, **options))
        self.head, self.keys, self.values = nn.Linear(4, 3), keys, values

    def forward(self, x: Tensor) -> Tensor:
        """`x [batch, 10, 4]`: four positions of queries, six of keys and values."""
        query, key, value = x[:, :4], x[:, 4:, : self.keys], x[:, 4:, -self.values :].sin()
        if not self.attn.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        y = torch.tanh(self.attn(query, key, value)[0])
        return self.head(y.mean(1) if self.attn.batch_first else y.mean(0))


class CrossStreams(nn.Module):
    """Padded queries look at padded keys of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = unlike(nn.MultiheadAttention(4, 1, batch_first=True)), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor, y: Tensor, y_mask: Tensor) -> Tensor:
        out = torch.tanh(self.attn(x, y, y, key_padding_mask=y_mask == 0)[0]) * mask.unsqueeze(-1)
        return self.head(out.sum(1) / mask.sum(1, keepdim=True))


class CrossTask(t.StreamsTask):
    """Queries and output lie on the first sequence, keys and values on the second."""

    def padding_mask(self, batch: Any) -> dict[str, Tensor]:
        first, second = batch["inputs"]["mask"], batch["inputs"]["y_mask"]
        return {"attn.[qo]*_proj": first, "attn.[kv]_proj": second}


class AttentionTwice(nn.Module):
    """One attention used twice, recomputed in the backward pass if `checkpointed`, its output overwritten."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.attn, self.head, self.checkpointed = unlike(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 3), checkpointed

    def block(self, x: Tensor) -> Tensor:
        y = self.attn(x, x, x, need_weights=False)[0]
        y.mul_(1.5).sin_()
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(torch.tanh(x).mean(1))


class Encoded(nn.Module):
    """Torch's own layers of encoder or decoder."""

    def __init__(self, *, norm_first: bool, decoder: bool = False, batch_first: bool = True, bias: bool = True) -> None:
        super().__init__()
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        self.block = kind(4, 2, dim_feedforward=6, dropout=0.0, batch_first=batch_first, norm_first=norm_first, bias=bias)
        self.head, self.decoder, self.batch_first = nn.Linear(4, 3), decoder, batch_first
        with torch.no_grad():
            for p in self.block.parameters():
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.block(x[:, :3], x[:, 3:].sin()) if self.decoder else self.block(x)
        return self.head(torch.tanh(y).mean(1 if self.batch_first else 0))


class EncodedPadded(nn.Module):
    """The same on padded rows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.block(x, src_key_padding_mask=mask == 0)) * mask.unsqueeze(-1)
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


def frozen_bias() -> SelfAttention:
    """The packed bias is frozen, the weight is not."""
    model = SelfAttention()
    model.attn.in_proj_bias.requires_grad_(False)
    return model


five, ten = partial(labelled, shape=(5, 4)), partial(labelled, shape=(10, 4))
crossed = partial(CrossTask, inputs="inputs", labels="labels")
padded_task = partial(t.PaddedTask, inputs="inputs", labels="labels", measurement="margin")
ALL, ENCODER = four("attn") + " head", four("block.self_attn") + " block.linear1 block.linear2 block.norm1 block.norm2 head"
DECODER = four("block.self_attn", "block.multihead_attn") + " block.linear1 block.linear2 block.norm1 block.norm2 block.norm3 head"


def looking(name: str, factory: Any, tracked: str = ALL, rows: Any = five, **options: Any) -> Case:
    """A case on an attention."""
    return simple(f"attention_{name}", factory, tracked, rows=rows, **options)


ATTENTION = [
    looking("self", SelfAttention),
    looking("self_without_weights", partial(SelfAttention, need_weights=False)),
    looking("self_keywords", partial(SelfAttention, keywords=True)),
    looking("sequence_first", partial(SelfAttention, batch_first=False)),
    looking("without_bias", partial(SelfAttention, bias=False)),
    looking("frozen_bias", frozen_bias),
    looking("bool_mask", partial(SelfAttention, mask="bool")),
    looking("float_mask", partial(SelfAttention, mask="float", need_weights=False)),
    looking("padded", PaddedAttention, rows=sequences, task=padded_task, collate=collate_padded),
    looking(
        "padded_without_weights", partial(PaddedAttention, need_weights=False), rows=sequences, task=padded_task, collate=collate_padded
    ),
    looking("cross", partial(CrossAttention, keys=4, values=4), rows=ten),
    looking("cross_other_widths", CrossAttention, rows=ten),
    looking("cross_other_widths_sequence_first", partial(CrossAttention, batch_first=False), rows=ten),
    looking("cross_other_widths_without_bias", partial(CrossAttention, bias=False), rows=ten),
    looking(
        "cross_padded", CrossStreams, rows=sequences, task=partial(CrossTask, inputs="inputs", labels="labels"), collate=collate_streams
    ),
    looking("twice", AttentionTwice),
    looking("checkpointed", partial(AttentionTwice, checkpointed=True)),
    looking("named_whole", SelfAttention, tracked=four("attn"), layers=["attn"]),
    looking("named_parts", SelfAttention, tracked="attn.q_proj attn.v_proj", layers=["attn.[qv]_proj"]),
    looking("encoder", partial(Encoded, norm_first=False), tracked=ENCODER),
    looking("encoder_norm_first", partial(Encoded, norm_first=True), tracked=ENCODER),
    # Only the attention knows that its batch axis is 1; the other layers of the block are left out as off the batch's axis.
    looking("encoder_sequence_first", partial(Encoded, norm_first=True, batch_first=False), tracked=four("block.self_attn") + " head"),
    looking("encoder_without_bias", partial(Encoded, norm_first=True, bias=False), tracked=ENCODER),
    looking("encoder_padded", EncodedPadded, tracked=ENCODER, rows=sequences, task=padded_task, collate=collate_padded),
    looking("decoder", partial(Encoded, norm_first=False, decoder=True), tracked=DECODER, rows=ten),
]
