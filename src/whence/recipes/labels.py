"""Wrong labels made on purpose, to be found again."""

from __future__ import annotations

import torch
from torch import Tensor

from whence.errors import ConfigError


def flip_labels(labels: Tensor, *, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Return labels `[row]` of which `round(share * rows)` are replaced by a uniformly drawn other class.

    Raises:
        ConfigError: the share is not between 0 and 1, or there is no other class.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share={share!r} of the labels cannot be flipped; give a number from 0 to 1.")
    if classes < 2:
        raise ConfigError(f"classes={classes!r} leaves no other class to flip a label to; there must be 2 or more.")
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    # Adding 1 to classes - 1 reaches every class but the present one.
    steps = torch.randint(1, classes, (len(chosen),), generator=generator)
    flipped = labels.clone()
    flipped[chosen] = (labels[chosen] + steps) % classes
    return flipped
