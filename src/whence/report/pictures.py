"""Small pictures as PNG data URIs, so that a page needs no file beside it."""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

from whence.errors import DataError
from whence.report.page import Picture

# Colour type in the PNG header, by number of channels (PNG specification, third edition, 11.2.1).
_COLOUR_TYPES = {1: 0, 3: 2}


def picture(image: Tensor, *, alt: str, ink: bool = False) -> Picture:
    """Return an image `[height, width]`, `[1, height, width]` or `[3, height, width]`, values from 0 to 1, as a picture.

    Args:
        image: the pixels, one PNG pixel each; pages enlarge them without smoothing.
        alt: what it shows, for readers who do not see it.
        ink: 0 is paper and 1 is ink, as in scans of writing; such a picture follows the page's dark colours.

    Raises:
        DataError: the shape is another one, or a value is not finite.
    """
    pixels = image.detach().cpu().float()
    pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels
    if pixels.dim() != 3 or pixels.shape[0] not in _COLOUR_TYPES or not torch.isfinite(pixels).all():
        raise DataError(
            f"an image of shape {tuple(image.shape)} cannot be shown. Give [height, width], [1, height, width] or "
            "[3, height, width] with finite values from 0 to 1."
        )
    levels = (1 - pixels if ink else pixels).clamp(0, 1).mul(255).round().to(torch.uint8)
    encoded = base64.b64encode(_png(levels)).decode("ascii")
    return Picture(source=f"data:image/png;base64,{encoded}", alt=alt, ink=ink)


def _png(levels: Tensor) -> bytes:
    """Return a PNG file of `[channel, height, width]` bytes."""
    channels, height, width = levels.shape
    # Every line starts with a filter number; 0 leaves the line as it is.
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), levels.permute(1, 2, 0).reshape(height, -1)], dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    data = zlib.compress(lines.numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
