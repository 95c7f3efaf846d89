"""The tiny convolutional models of the cases, on images `[4, 5, 6]`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """One convolution on a `[4, 5, 6]` image, averaged over its pixels."""

    def __init__(self, channels: int = 6, activation: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, **{"kernel_size": (3, 2), **options})
        self.act = activation or nn.Tanh()
        self.head = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x)).mean((2, 3)))


class ReusedConv(nn.Module):
    """One convolution at two resolutions, so with two numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean((2, 3)))


class NormedConvNet(nn.Module):
    """Two convolutions with BatchNorm in eval mode, one with a single position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.squeeze, self.head = nn.Conv2d(5, 5, 1), nn.Linear(5, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head((x * gate).mean((2, 3)))
