"""Seconds and bytes of a pass, measured on parts of a batch and carried on to whole batches."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from whence.capture.passes import Rows
from whence.curvature.basis import eigenbasis
from whence.plan.live import peak_of
from whence.plan.samples import Sample

LONGEST_S = 1.0
"""Seconds that one measured run may be expected to take; a larger one is inferred from smaller ones."""
ENOUGH_S = 0.2
LARGEST_EIGEN = 1100
"""Largest matrix that is decomposed in a rehearsal; larger ones are taken to cost as the cube of their size."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass costs: seconds per batch and, at each width, per row; bytes of a batch `bytes_fixed + rows * bytes_row`."""

    fixed: float
    widths: tuple[float, ...]
    per_row: tuple[float, ...]
    bytes_fixed: float
    bytes_row: float

    def seconds(self, sample: Sample) -> float:
        """Return the seconds of a whole pass."""
        shares = sample.shares(self.widths)
        return self.fixed * sample.batches + len(sample.rows) * sum(s * t for s, t in zip(shares, self.per_row, strict=True))

    def transient(self, rows: int) -> float:
        """Return the bytes that a batch of so many rows holds at once."""
        return self.bytes_fixed + rows * self.bytes_row

    def beyond(self, start: Cost, times: float) -> Cost:
        """Return this cost plus so many times what it has more than `start`, of which the widest batch is known."""
        slower = times * max(0.0, self.per_row[-1] - start.per_row[-1])
        return Cost(
            fixed=self.fixed + times * max(0.0, self.fixed - start.fixed),
            widths=self.widths,
            per_row=tuple(seconds + slower for seconds in self.per_row),
            bytes_fixed=self.bytes_fixed + times * max(0.0, self.bytes_fixed - start.bytes_fixed),
            bytes_row=self.bytes_row + times * max(0.0, self.bytes_row - start.bytes_row),
        )

    def scaled(self, ratio: float) -> Cost:
        """Return the cost of a pass with that many times the work per row and the same memory."""
        per_row = tuple(ratio * seconds for seconds in self.per_row)
        return Cost(fixed=self.fixed, widths=self.widths, per_row=per_row, bytes_fixed=self.bytes_fixed, bytes_row=self.bytes_row)


def cost_of(sample: Sample, run: Callable[[Rows], object], *, own: Callable[[int], float] = lambda rows: 0.0, widths: bool = True) -> Cost:
    """Measure `run` on an eighth of the widest batch, and on as much of it as is quick; on an eighth of narrower ones.

    Args:
        sample: the batches of the pass.
        run: what the pass does with the rows of one batch.
        own: bytes that `run` holds which a pass holds once for all batches, by number of rows; they are taken off.
        widths: whether to look at narrower batches.
    """
    device, typical = sample.rows.device, sample.typical()
    widest, whole = typical[-1], len(typical[-1].indices)
    few = max(1, whole // 8)
    part = sample.part(widest, few)
    run(part)  # a first run sets up more than later ones
    first = seconds_of(lambda: run(part), device)
    many = whole
    while many > 2 * few and first * many / few > LONGEST_S:
        many //= 2
    large = sample.part(widest, many)
    peaks = [peak_of(lambda: run(part), device) - own(few)]
    fixed, slope, growth = 0.0, first / few, peaks[0] / few
    if many > few:
        second, peak = _both(lambda: run(large), device, expected=first * many / few)
        peaks.append(peak - own(many))
        slope = (second - first) / (many - few)
        # Where few rows took longer than they should, all is put on the rows.
        fixed = first - few * slope
        if slope <= 0 or fixed < 0:
            fixed, slope = 0.0, second / many
        growth = max(0.0, (peaks[1] - peaks[0]) / (many - few))
    known = {widest.width: slope}
    for load in typical[:-1] if widths else []:
        narrow = sample.part(load, min(few, len(load.indices)))
        seconds = seconds_of(lambda rows=narrow: run(rows), device)  # type: ignore[misc]
        own_part = max(first - fixed, 1e-9) / few
        known[load.width] = slope * max(0.0, (seconds - fixed) / len(narrow.indices)) / own_part
    order = sorted(known)
    return Cost(
        fixed=fixed,
        widths=tuple(order),
        per_row=tuple(known[width] for width in order),
        bytes_fixed=max(0.0, peaks[0] - few * growth),
        bytes_row=growth,
    )


def _both(run: Callable[[], object], device: torch.device, *, expected: float) -> tuple[float, int]:
    """Return seconds and bytes; of one run where that is so long that counting bytes does not slow it."""
    if expected < ENOUGH_S:
        return seconds_of(run, device), peak_of(run, device)
    start = time.perf_counter()
    peak = peak_of(run, device)
    return time.perf_counter() - start, peak


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a few runs, of one if it is long."""
    taken: list[float] = []
    while not taken or (sum(taken) < ENOUGH_S and len(taken) < 7):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def eigen_seconds(sizes: Mapping[int, int], device: torch.device) -> float:
    """Return the seconds of so many eigendecompositions of each size."""
    total, measured = 0.0, dict[int, float]()
    for size in sorted(sizes):
        if size <= LARGEST_EIGEN or not measured:
            tried = min(size, LARGEST_EIGEN)
            factor = torch.randn(tried, 2 * tried, generator=torch.Generator().manual_seed(0)).to(device)
            matrix = factor @ factor.mT
            measured[tried] = seconds_of(lambda matrix=matrix: eigenbasis(matrix), device)  # type: ignore[misc]
        nearest = max(size_ for size_ in measured if size_ <= size)
        total += sizes[size] * measured[nearest] * (size / nearest) ** 3
    return total


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of what is no pass: each size's eigendecompositions, a number added to totals, a byte written."""

    eigen: float
    add: float
    store: float


def rates(sizes: Mapping[int, int], device: torch.device) -> Rates:
    """Measure them, for so many matrices of each size."""
    block, totals, some = torch.zeros(2**20), torch.zeros(2**20, dtype=torch.float64), bytes(2**20)
    cpu = torch.device("cpu")
    return Rates(
        eigen=eigen_seconds(sizes, device),
        add=seconds_of(lambda: totals.add_(block), cpu) / len(block),
        # Checksums are the larger part of writing.
        store=seconds_of(lambda: hashlib.sha256(some).hexdigest(), cpu) / len(some),
    )
