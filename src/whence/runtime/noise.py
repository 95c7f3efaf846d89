"""Random numbers that belong to an example, so that batch size, order and padding change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from whence.errors import ConfigError

_WORD = 2**64
_LARGEST = 1.0 - 2.0**-24  # the largest float32 below 1


class KeyedNoise:
    """Uniform numbers for one batch (`tasks.Noise`), each a function of (seed, stream, example id, call, position) alone.

    They come from Philox 4x64-10, a counter-based generator (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
    as 1, 2, 3", 2011): key (seed, stream), counter (position // 4, call, example id, 0), all taken modulo 2**64. `call`
    counts the calls of `uniform` on this object from 0; `position` counts an example's numbers of one call in row-major order.

    Two consequences. An example draws the same numbers in any batch, at any place in it. A longer first dimension only adds
    numbers: `uniform(5)` starts with `uniform(3)`, and `uniform(5, 2)` with `uniform(3, 2)`, so padding changes nothing.

    Args:
        seed: chosen by the user.
        stream: separates uses within a run (a pass, a stage) under one seed.
        ids: each row's example id, such as its index in the data set.
        device: where the numbers are put; they are made on the CPU and equal on every device.
        dtype: float64 or float32; the latter are the former, rounded.

    Raises:
        ConfigError: the dtype is neither float64 nor float32.
    """

    def __init__(
        self, *, seed: int, stream: int, ids: Sequence[int], device: torch.device | str, dtype: torch.dtype = torch.float64
    ) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ConfigError(f"keyed noise of {dtype} is not possible; choose torch.float64 or torch.float32 and convert afterwards.")
        self._key = np.array([seed % _WORD, stream % _WORD], dtype=np.uint64)
        self._ids = [int(identity) % _WORD for identity in ids]
        self._device, self._dtype = torch.device(device), dtype
        self._calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return fresh numbers `[len(ids), *shape]`, strictly inside (0, 1) also after rounding to float32."""
        count = int(np.prod(shape, dtype=np.int64))
        words = np.empty((len(self._ids), count), dtype=np.uint64)
        for row, identity in enumerate(self._ids):
            counter = np.array([0, self._calls, identity, 0], dtype=np.uint64)
            words[row] = np.random.Philox(key=self._key, counter=counter).random_raw(count)
        self._calls += 1
        # The middles of 2**52 equal intervals are exact in float64. The topmost would round to 1 in float32, hence the bound.
        numbers = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        np.minimum(numbers, _LARGEST, out=numbers)
        return torch.from_numpy(numbers).reshape(len(self._ids), *shape).to(self._device, self._dtype)
