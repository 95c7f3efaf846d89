"""Which scores stand out from the many that mean little."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

_FEWEST = 20
# Where more rows than this stand out, the scores are no bulk with a few exceptions, such as where two classes pull two ways.
_MOST_OUTSIDE = 0.25
# The median absolute deviation of a normal distribution, times this, is its standard deviation.
_MAD_TO_DEVIATION = 1.4826
CHANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far the scores of one query reach by chance, if those of rows that do not matter are normally distributed.

    Center and width are those of the bulk: median, and median absolute deviation. Real scores have heavier tails than a normal
    distribution, so this is a rule of thumb and no test.

    Attributes:
        center: the median score.
        level: distance from the center that all of `rows` normal scores keep with probability 1 - `CHANCE` (Bonferroni).
        above, below: how many scores lie beyond it on each side.
        rows: how many scores there are.
    """

    center: float
    level: float
    above: int
    below: int
    rows: int

    @property
    def low(self) -> float:
        """The lowest score that is noise."""
        return self.center - self.level

    @property
    def high(self) -> float:
        """The highest score that is noise."""
        return self.center + self.level


def noise_level(scores: Tensor) -> Noise | None:
    """Return the noise among the scores of one query, `[row]`; None where there is no bulk to tell it by.

    That is so with too few rows, with half of them equal, and where a quarter of them would stand out.
    """
    values = scores.double()
    if len(values) < _FEWEST:
        return None
    center = values.quantile(0.5) if len(values) < 1 << 24 else values.median()  # quantile takes no more
    deviation = _MAD_TO_DEVIATION * float((values - center).abs().median())
    if deviation == 0:
        return None
    level = deviation * NormalDist().inv_cdf(1 - CHANCE / (2 * len(values)))
    above, below = (int(side.sum()) for side in (values > center + level, values < center - level))
    if above + below > _MOST_OUTSIDE * len(values):
        return None
    return Noise(center=float(center), level=level, above=above, below=below, rows=len(values))
