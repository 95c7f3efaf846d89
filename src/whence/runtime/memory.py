"""Memory: how much is free, what running out of it looks like, and batch sizes that give way."""

from __future__ import annotations

from pathlib import Path

import torch

from whence.errors import ConfigError

LARGEST_BATCH = {"cpu": 32}
"""Rows that an automatic batch size starts from; more bring a CPU nothing, and a GPU starts from 256."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())


def free_bytes(device: torch.device) -> int:
    """Return how many bytes are free on a device: what the system would give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo")
    if lines.exists():
        for line in lines.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62  # nobody says; the allocator will


class BatchSize:
    """Rows per batch: a given number, or `"auto"`, which starts large and is halved when memory runs out.

    Raises:
        ConfigError: it is neither `"auto"` nor a whole number of at least one.
    """

    def __init__(self, value: int | str, *, device: torch.device, name: str = "batch_size") -> None:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r} cannot be used; give a number of rows, 1 or more, or 'auto'.")
        self.name, self.auto = name, value == "auto"
        self.rows = LARGEST_BATCH.get(device.type, 256) if isinstance(value, str) else value

    def halve(self, error: BaseException) -> None:
        """Take half as many rows from now on.

        Raises:
            ConfigError: the number was given, or is one already.
        """
        if not self.auto or self.rows == 1:
            remedy = (
                "Give a smaller one or 'auto'"
                if self.rows > 1
                else "Free memory, shorten the rows, or use offload=True or a larger machine"
            )
            raise ConfigError(f"out of memory with {self.name}={self.rows}: {str(error).splitlines()[0]} {remedy}.") from error
        self.rows //= 2
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
