"""What became of queries when rows were removed: every measurement, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from whence.errors import ConfigError
from whence.evaluate.estimates import Estimate, bootstrap_weights, interval_of, share_estimate

BASE = "nothing removed"
"""The name of the models trained on all rows."""


@dataclass(frozen=True, kw_only=True)
class RemovalEffect:
    """What removing rows in one order did.

    Attributes:
        method: name of the order, or `BASE`.
        removed: how many rows were to be removed.
        mean_removed: how many were, mean over queries: only helpful rows are.
        short: queries whose order calls fewer than `removed` rows helpful; with mode `"sum"` 1 or 0.
        rise: mean over queries and repeats of the measurement over that of the model trained on all rows with the same seed;
            positive: removal hurt. The interval is a bootstrap over queries and repeats, both drawn anew.
        flipped: share of queries that more than half of the models misclassify, from 0 to 1, with Wilson's interval over
            queries; None with mode `"sum"`.
        perplexity: `exp(losses / tokens)` over all queries and repeats; None without tokens. The interval is that of its
            difference from the base's perplexity, put on the base's perplexity.
    """

    method: str
    removed: int
    mean_removed: float
    short: int
    rise: Estimate
    flipped: Estimate | None
    perplexity: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what there is not is null."""
        estimates = {"rise": self.rise, "flipped": self.flipped, "perplexity": self.perplexity}
        plain = {"method": self.method, "removed": self.removed, "mean_removed": self.mean_removed, "short": self.short}
        return plain | {name: None if found is None else found.to_json() for name, found in estimates.items()}


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """Measurements of models that were trained again without the rows that orders call helpful.

    Attributes:
        mode: `"each"`: every query lost its own rows; `"sum"`: all lost those with the highest sum of scores.
        methods: names of the orders, the random one last.
        removed: numbers of rows, rising, without the base's 0.
        queries: those that were taken; left_out: those that a base model misclassifies, with mode `"each"`.
        base: models trained on all rows, float64 `[base repeat, query]`.
        after: models trained without the rows, float64 `[method, removal, repeat, query]`; repeat r has the seed of base
            repeat r.
        helpful: rows with a positive score, int64 `[method, query]`, with mode `"sum"` `[method, 1]`; all for the random order.
        tokens: trained tokens `[query]`, or None.
        resamples: bootstrap samples for the intervals.
        settings: what it was made with, JSON; its seed is the bootstrap's too.
    """

    mode: Literal["each", "sum"]
    methods: tuple[str, ...]
    removed: tuple[int, ...]
    queries: tuple[int, ...]
    left_out: tuple[int, ...]
    base: Tensor
    after: Tensor
    helpful: Tensor
    tokens: Tensor | None = None
    resamples: int = 1000
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def effects(self) -> list[RemovalEffect]:
        """The base first, then every method with every number of rows."""
        return [self.effect(BASE, 0), *(self.effect(method, count) for method in self.methods for count in self.removed)]

    def effect(self, method: str, removed: int) -> RemovalEffect:
        """Return what removing so many rows in this order did; 0 rows is the base, whatever the method.

        Raises:
            ConfigError: there is no such order or number of rows.
        """
        after, base = self._after(method, removed), self._paired_base
        flipped = int(((after > 0).double().mean(0) > 0.5).sum())
        # Of the base every row could have been removed.
        helpful = torch.zeros(1) if removed == 0 else self.helpful[self.methods.index(method)]
        return RemovalEffect(
            method=BASE if removed == 0 else method,
            removed=removed,
            mean_removed=float(helpful.clamp(max=removed).double().mean()),
            short=int((helpful < removed).sum()),
            rise=self._mean(after - base),
            flipped=share_estimate(flipped, len(self.queries)) if self.mode == "each" else None,
            perplexity=None if self.tokens is None else self._perplexity(after, base, self.tokens),
        )

    def difference(self, method: str, other: str, removed: int) -> Estimate:
        """Return how much more the measurement rises in one order than in another, in the same bootstrap samples.

        An interval above 0 says that `method` finds rows that matter more than those that `other` finds; it is narrower than
        the two orders' own intervals suggest, since queries and seeds are the same.

        Raises:
            ConfigError: there is no such order or number of rows.
        """
        return self._mean(self._after(method, removed) - self._after(other, removed))

    def to_json(self) -> dict[str, Any]:
        """Return the effects, and the orders' differences from the last one (random), as JSON values."""
        last = self.methods[-1]
        over = [
            {"method": method, "over": last, "removed": count, "rise": self.difference(method, last, count).to_json()}
            for method in self.methods[:-1]
            for count in self.removed
        ]
        return {
            "mode": self.mode,
            "queries": list(self.queries),
            "left_out": list(self.left_out),
            "repeats": self.after.shape[2],
            "base_repeats": len(self.base),
            "resamples": self.resamples,
            "settings": self.settings,
            "effects": [effect.to_json() for effect in self.effects],
            "differences": over,
        }

    def table(self) -> Table:
        """Return the effects as a table with intervals."""
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        table = Table("Order", title=f"Rows removed, trained again: {len(self.queries)} queries{left}, repeats: {self.after.shape[2]}")
        for heading in ("Removed", "Flipped", "Rise", "Perplexity"):
            if heading == "Removed" or getattr(self.effect(BASE, 0), heading.lower()) is not None:
                table.add_column(heading, justify="right")
        for effect in self.effects:
            few = f" (mean {effect.mean_removed:.4g})" if effect.short else ""
            shown = [str(found) for found in (effect.flipped, effect.rise, effect.perplexity) if found is not None]
            table.add_row(escape(effect.method), f"{effect.removed}{few}", *shown, end_section=effect.removed in (0, self.removed[-1]))
        return table

    @property
    def _paired_base(self) -> Tensor:
        return self.base[: self.after.shape[2]]

    def _after(self, method: str, removed: int) -> Tensor:
        """Return `[repeat, query]`."""
        if removed == 0:
            return self._paired_base
        if method not in self.methods or removed not in self.removed:
            raise ConfigError(
                f"there is no removal of {removed} rows by {method!r}; there are removals of {', '.join(map(str, self.removed))} rows by "
                f"{', '.join(map(repr, self.methods))}."
            )
        return self.after[self.methods.index(method), self.removed.index(removed)]

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Return the bootstrap's weights of repeats and queries: models and queries are both a sample of what could have been."""
        seed = int(self.settings.get("seed", 0))
        repeats = bootstrap_weights(self.after.shape[2], resamples=self.resamples, seed=seed + 1)
        return repeats, bootstrap_weights(len(self.queries), resamples=self.resamples, seed=seed)

    def _samples(self, values: Tensor) -> Tensor:
        """Return the mean of `[repeat, query]` in each bootstrap sample, `[resample]`."""
        repeats, queries = self._weights()
        return ((repeats @ values) * queries).sum(1)

    def _mean(self, values: Tensor) -> Estimate:
        return interval_of(float(values.mean()), self._samples(values), queries=len(self.queries))

    def _perplexity(self, after: Tensor, base: Tensor, tokens: Tensor) -> Estimate:
        ends, start = float((after.mean(0).sum() / tokens.sum()).exp()), float((base.mean(0).sum() / tokens.sum()).exp())
        counted = self._samples(tokens.expand_as(after))
        rises = (self._samples(after) / counted).exp() - (self._samples(base) / counted).exp()
        return interval_of(ends, start + rises, queries=len(self.queries))
