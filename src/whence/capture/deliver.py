"""From what a tap saw, `(x, g)` of every call, to the layer's gradient in the internal layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.capture.assemble import joined, mask_for, numbered, regrouped
from whence.capture.formed import Formed
from whence.capture.pair import LayerGradient, Pair
from whence.capture.sparse import SparsePair
from whence.capture.state import Call, Pass
from whence.capture.tracking import TrackedLayer
from whence.errors import LayerError

Transform = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How gradients are put together.

    Attributes:
        sums: type of all contractions.
        half: type that operands are rounded to first, if any.
        transform: the task's post-processing `(layer name, [example, group, out, in])`, if it has one.
        scales: by layer, what each gradient is multiplied by, `[group, out, in]`.
    """

    sums: torch.dtype
    half: torch.dtype | None
    transform: Transform | None
    scales: Mapping[str, Tensor]

    def gradient(self, now: Pass, pieces: list[tuple[Call, Tensor, Tensor]], loss_scale: float) -> LayerGradient:
        """Return the gradient of a layer from all its calls."""
        layer = pieces[0][0].layer
        pair = joined([self._pair(now, call, x, g, loss_scale) for call, x, g in pieces])
        scale = self.scales.get(layer.name)
        if scale is not None and isinstance(pair, SparsePair):
            # Each position belongs to one token's column, so its own gradient can be scaled.
            factors = scale[0].mT[pair.ids.clamp(min=0)].unsqueeze(1)
            pair = SparsePair(pair.ids, pair.g * factors, pair.vocabulary, pair.mask, pair.places, plain=pair.g)
        elif scale is not None or self.transform is not None:
            dense = pair if isinstance(pair, Pair) else pair.dense()
            return Formed(gradient=self.finished(layer, dense.formed()), pair=dense)
        return pair

    def finished(self, layer: TrackedLayer, gradient: Tensor) -> Tensor:
        """Return formed gradients after the task's transform and the scaling."""
        if self.transform is not None:
            gradient = self.transform(layer.name, gradient)
        scale = self.scales.get(layer.name)
        return gradient if scale is None else gradient * scale

    def _operand(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return (x if self.half is None else x.to(self.half)).to(self.sums)

    def _pair(self, now: Pass, call: Call, x: Tensor, g: Tensor, loss_scale: float) -> Pair | SparsePair:
        layer, site = call.layer, call.site
        a = self._operand(site.handler.inputs(site.module, x))
        g = self._operand(site.handler.gradients(site.module, g))
        if loss_scale != 1:
            g = g / loss_scale
        if self.transform is None and len(g) != now.rows:
            raise LayerError(
                f"layer {layer.name!r} was called on {len(g)} rows, but the batch has {now.rows}. Its first axis must be "
                "the batch's: give the task example_ids(batch) that say which example each row belongs to, "
                "or leave the layer out with layers=..."
            )
        own = mask_for(now.masks, layer.name, a.shape[:2], call.number)
        positions = a.shape[1]
        mask, on_axis = own, _on_axis(now, own, positions)
        if now.regrouping is not None:
            mask = regrouped(now.regrouping, own, positions)
            # Ids move up by one, since places that are filled up hold zero.
            a = now.regrouping.gather(a) if a.is_floating_point() else now.regrouping.gather(a + 1) - 1
            g = now.regrouping.gather(g)
        places = None
        if on_axis:
            places = numbered(torch.ones(a.shape[:2], dtype=torch.bool, device=g.device) if mask is None else mask)
        if not a.is_floating_point():
            sparse = SparsePair(a, g.transpose(1, 2), layer.parts.inputs, mask, places)
            return sparse if all(site.handler.one_hot for site in layer.sites) else sparse.dense()
        if not layer.weight:
            a = a[..., :0]
        if site.exchanged:
            a, g = g, a
        # Groups before positions: a view for one group, and batched products for more.
        shared = call.shared if now.regrouping is None else None
        return Pair(a=a.transpose(1, 2), g=g.transpose(1, 2), bias=layer.bias, mask=mask, places=places, shared=shared)


def _on_axis(now: Pass, own: Tensor | None, positions: int) -> bool:
    """Whether a call's positions are the batch's tokens."""
    if now.tokens is None or positions != now.tokens[0]:
        return False
    # With a mask for each layer, another mask means another axis, such as the decoder's.
    return isinstance(now.masks, Tensor) or now.masks is None or own is now.tokens[1]
