"""What is known of one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from whence.capture.pair import LayerGradient, SharedInputs
from whence.capture.regroup import Regrouping
from whence.capture.sites import Site
from whence.capture.tracking import TrackedLayer
from whence.tasks import Masks

Consumer = Callable[[TrackedLayer, LayerGradient], None]


@dataclass
class Call:
    """One call of a tracked layer: its input until the gradient arrives, the input's version, and the call's number."""

    layer: TrackedLayer
    site: Site
    x: Tensor | None
    version: int
    number: int = 0
    shared: SharedInputs | None = None
    view: tuple[Tensor, int] | None = None  # its output and the output's version

    @property
    def overwritten(self) -> bool:
        """Whether the input was changed in place since the call."""
        return self.x is not None and self.x._version != self.version


@dataclass
class Pass:
    """One pass; `calls` counts those of the forward pass, `muted` are layers called without gradients."""

    consumer: Consumer
    calls: dict[str, int] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)
    pieces: dict[str, list[tuple[Call, Tensor, Tensor]]] = field(default_factory=dict)
    muted: dict[str, bool] = field(default_factory=dict)  # in a reentrant checkpoint?
    finished: set[str] = field(default_factory=set)
    shared: dict[tuple[Any, ...], SharedInputs] = field(default_factory=dict)
    backward: bool = False
    regrouping: Regrouping | None = None
    masks: Masks = None
    tokens: tuple[int, Tensor | None] | None = None
    rows: int = 0
    lenient: bool = False
    repeated: bool = False  # several backward passes: inputs are kept
    watched: bool = False  # keep outputs that are views, to see whether they are overwritten
