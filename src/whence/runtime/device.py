"""The choice of a device."""

from __future__ import annotations

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
