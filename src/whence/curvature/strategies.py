"""What each strategy needs; nothing after fitting asks for a strategy's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from whence.errors import ConfigError

StrategyName = Literal["identity", "diagonal", "kfac", "ekfac"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """`eigenbasis`: rotate into eigenvectors of E[aa^T] and E[gg^T]. `eigenvalues`: where they come from.

    `"one"`: all one. `"product"`: products of the two sides' eigenvalues, scaled so that their sum is the mean
    squared norm of a gradient. `"moment"`: second moments of the gradients in the basis, by a pass over the data.
    """

    eigenbasis: bool
    eigenvalues: Literal["one", "product", "moment"]


STRATEGIES: dict[str, Strategy] = {
    "identity": Strategy(eigenbasis=False, eigenvalues="one"),
    "diagonal": Strategy(eigenbasis=False, eigenvalues="moment"),
    "kfac": Strategy(eigenbasis=True, eigenvalues="product"),
    "ekfac": Strategy(eigenbasis=True, eigenvalues="moment"),
}


def get_strategy(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy={name!r} is not known; choose one of {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]
