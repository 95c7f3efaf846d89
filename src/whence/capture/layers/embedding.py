"""nn.Embedding: its input is one-hot and stays a vector of ids."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from whence.capture.layers.registry import Handler, LayerParts, register


@register(nn.Embedding)
class Embedding(Handler):
    """In the internal layout `in` counts tokens of the vocabulary and `out` features; the padding token has no gradient."""

    one_hot = True

    def against(self, module: nn.Module) -> str | None:
        """Name the options that tie one example's gradient to another's."""
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None:
            return "an embedding with max_norm, which changes its weight in the forward pass"
        return "an embedding with scale_grad_by_freq, which counts tokens over the batch" if embedding.scale_grad_by_freq else None

    def parts(self, module: nn.Module) -> LayerParts:
        """Sizes from the weight `[token, feature]`."""
        tokens, features = cast(nn.Embedding, module).weight.shape
        return LayerParts(groups=1, inputs=tokens, outputs=features)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Ids `[row, ...]` -> `[row, position]`, -1 for the padding token."""
        embedding = cast(nn.Embedding, module)
        ids = x.reshape(len(x), -1).long()
        return ids if embedding.padding_idx is None else ids.masked_fill(ids == embedding.padding_idx, -1)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """`[row, ..., feature]` -> `[row, position, 1, feature]`."""
        return g.reshape(g.shape[0], -1, 1, g.shape[-1])

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Look the rows of the weight up."""
        embedding = cast(nn.Embedding, module)
        return F.embedding(x, embedding.weight, embedding.padding_idx)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """`[token, feature]` -> `[1, feature, token]`."""
        return weight.mT.unsqueeze(0)
