"""The choice of a device, and of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from whence.errors import ConfigError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device asked for; `"auto"` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: the name is no device, or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)  # the one check that holds for every kind and index of device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        count = torch.cuda.device_count()
        have = ["'auto'", "'cpu'", *(f"'cuda:{index}'" for index in range(count))]
        raise ConfigError(f"device={str(device)!r} cannot be used here: {reason}. This machine has {', '.join(have)}.") from None
    return chosen


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: layers this small only wait for others (measured: 2 s, against 55 s on two busy cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
