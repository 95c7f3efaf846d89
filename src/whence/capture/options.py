"""How passes are run: precision, compilation, offloading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from whence.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """How passes are run.

    Attributes:
        precision: `"float32"` leaves the model's own type. `"bfloat16"` and `"float16"` take forward and backward passes under
            autocast on a GPU; a CPU, slow at both, rounds every layer's inputs and output gradients to that type and
            multiplies them in float32. Sums are float32 at least.
        compile: run the model, with its taps, through `torch.compile`.
        offload: keep activations and factors in the CPU's memory until they are needed.
    """

    precision: Precision = "float32"
    compile: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("float32", *HALF):
            raise ConfigError(
                f"precision={self.precision!r} is not known; choose 'float32' (the model's own type), 'bfloat16' or 'float16'."
            )

        if self.compile and self.offload:
            raise ConfigError("compile=True cannot be combined with offload=True: compiled graphs keep their activations. Leave one out.")

    @property
    def half(self) -> torch.dtype | None:
        """The half-precision type, if there is one."""
        return HALF.get(self.precision)
