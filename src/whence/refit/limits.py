"""What a selection of groups must keep to: a budget, so many examples of each class, and groups that are not all alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from whence.errors import ConfigError, DataError
from whence.refit.linear import Linearised
from whence.refit.subsets import Groups

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What is asked of a selection.

    Attributes:
        examples: at most so many; None: any number.
        tokens: at most so many trained tokens.
        minimum: at least so many examples of each class named.
        most_alike: two chosen groups have mean gradients with a cosine of at most this; None: may be as alike as they are.
    """

    examples: int | None = None
    tokens: int | None = None
    minimum: Mapping[str, int] = field(default_factory=dict)
    most_alike: float | None = None

    def __post_init__(self) -> None:
        for name in ("examples", "tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value!r}: give a budget of 1 or more, or None.")
        if self.most_alike is not None and not -1 <= self.most_alike < 1:
            raise ConfigError(f"most_alike={self.most_alike!r}: give a cosine from -1 up to, but not, 1.")
        if any(count < 1 for count in self.minimum.values()):
            raise ConfigError(f"minimum={dict(self.minimum)!r}: give 1 example or more for a class, or leave the class out.")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"examples": self.examples, "tokens": self.tokens, "minimum": dict(self.minimum), "most_alike": self.most_alike}


class Limits:
    """Constraints on given groups: which groups may be added to a selection, or taken from it.

    Args:
        groups: the groups.
        constraints: what is asked.
        tokens: trained tokens of each example, `[example]`; for a budget in tokens.
        classes: class of each example; for minima.
        linear: training rows; for `most_alike`.

    Raises:
        ConfigError: what a constraint needs was not given, or nothing can meet it. DataError: sizes do not fit.
    """

    def __init__(
        self,
        groups: Groups,
        constraints: Constraints,
        *,
        tokens: Tensor | None = None,
        classes: Sequence[Any] | None = None,
        linear: Linearised | None = None,
    ) -> None:
        self.constraints, examples = constraints, len(groups.numbers)
        for name, given in (("tokens", tokens), ("classes", classes)):
            if given is not None and len(given) != examples:
                raise DataError(f"{name} has {len(given)} entries for {examples} examples; give one for each.")
        self._budgets: list[tuple[str, Tensor, int]] = []
        if constraints.examples is not None:
            self._budgets.append(("examples", groups.sizes, constraints.examples))
        if constraints.tokens is not None:
            self._budgets.append(("tokens", groups.totals(_needed(tokens, "tokens").long()), constraints.tokens))
        for name, sizes, most in self._budgets:
            if int(sizes.min()) > most:
                raise ConfigError(f"a budget of {most} {name} holds no group: the smallest has {int(sizes.min())}.")
        self._counts, self._least = self._minima(groups, classes)
        self._alike = torch.zeros(len(groups), len(groups), dtype=torch.bool)
        if constraints.most_alike is not None:
            self._alike = alike(groups, _needed(linear, "linear")) > constraints.most_alike
            self._alike.fill_diagonal_(False)

    def _minima(self, groups: Groups, classes: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
        """Return examples of each class with a minimum in each group, `[group, class]`, and the minima, `[class]`."""
        wanted = dict(self.constraints.minimum)
        named = [str(one) for one in _needed(classes, "classes")] if wanted else []
        columns = [groups.totals(torch.tensor([own == name for own in named]).long()) for name in wanted]
        for (name, least), column in zip(wanted.items(), columns, strict=True):
            if int(column.sum()) < least:
                raise ConfigError(f"minimum of {least} examples of class {name!r}: there are {int(column.sum())}.")
        counts = torch.stack(columns, 1) if columns else torch.zeros(len(groups), 0, dtype=torch.int64)
        return counts, torch.tensor(list(wanted.values()), dtype=torch.int64)

    def lacking(self, chosen: Tensor) -> bool:
        """Return whether a class has fewer examples in the chosen groups, bool `[group]`, than it must."""
        return bool((self._counts[chosen].sum(0) < self._least).any())

    def exceeded(self, chosen: Tensor) -> bool:
        """Return whether chosen groups are over a budget, or two of them too alike."""
        over = any(int(sizes[chosen].sum()) > most for _, sizes, most in self._budgets)
        return over or bool(self._alike[chosen][:, chosen].any())

    def may_add(self, chosen: Tensor) -> Tensor:
        """Return which groups may be added, bool `[group]`; while a class lacks examples, only groups that have some.

        Raises:
            ConfigError: a class lacks examples and nothing that has some may be added.
        """
        allowed = ~chosen & ~self._alike[chosen].any(0)
        for _, sizes, most in self._budgets:
            allowed &= sizes <= most - int(sizes[chosen].sum())
        short = self._counts[chosen].sum(0) < self._least
        if short.any():
            allowed &= (self._counts[:, short] > 0).any(1)
            if not allowed.any():
                names = [name for name, lacks in zip(self.constraints.minimum, short.tolist(), strict=True) if lacks]
                raise ConfigError(
                    f"the minimum of {', '.join(map(repr, names))} cannot be met within the other limits; raise the budget or most_alike, "
                    "lower the minimum, or make smaller groups."
                )
        return allowed

    def may_remove(self, chosen: Tensor) -> Tensor:
        """Return which groups may be taken away, bool `[group]`; while two are too alike, only groups of such pairs.

        Raises:
            ConfigError: the selection is over its limits and nothing may be taken away.
        """
        left = self._counts[chosen].sum(0) - self._counts
        allowed = chosen & (left >= self._least).all(1)
        pairs = (self._alike & chosen[:, None] & chosen).any(0)
        if pairs.any():
            allowed &= pairs
        if not allowed.any() and self.exceeded(chosen):
            raise ConfigError("the limits cannot be met by leaving groups out one by one; lower the minimum or raise the other limits.")
        return allowed


def alike(groups: Groups, linear: Linearised) -> Tensor:
    """Return the cosines of the groups' mean gradients, float32 `[group, group]`."""
    sums = linear.group_sums(linear.gradients.T, groups.numbers.to(linear.gradients.device), len(groups)).T
    directions = F.normalize(sums, dim=1)
    return (directions @ directions.T).cpu()


def _needed(value: T | None, name: str) -> T:
    if value is None:
        raise ConfigError(f"a constraint needs {name}, which was not given.")
    return value
