"""What a plan says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

Call = Literal["fit", "scores", "self_influence"]


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage of the stage table, before it runs.

    Attributes:
        call: the call that it belongs to.
        name: its name in the stage table.
        passes: passes over the data; 0 for one that reads none.
        rows: rows of one pass.
        flops: counted floating-point operations of products and convolutions, the model's and ours.
        model_flops: the model's part of them: forward, and backward without gradients of parameters.
        seconds: predicted wall-clock time.
        peak_bytes: predicted peak memory on the device, model included.
        host_bytes: the same of the CPU's memory where the device is a GPU; else 0.
        state_bytes: the part of `peak_bytes` that is there whatever the batch: model, sums, factors, queries.
    """

    call: Call
    name: str
    passes: int
    rows: int
    flops: float
    model_flops: float
    seconds: float
    peak_bytes: int
    host_bytes: int
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What would make it fit or be faster: a sentence, and what it is about: options of a plan, or `"queries at a time"`.

    `fits`: whether the plan with these options fits. Empty options: something that is no option of a plan.
    """

    text: str
    options: Mapping[str, Any]
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What fit, scores and self-influence will cost.

    Attributes:
        strategy, device: what is planned, and where.
        stages: in the order they run.
        model_bytes: the model's share of every peak; it is in memory already.
        free_bytes, free_host_bytes: what was free when the plan was made, with the model in memory.
        disk_bytes: what will be written, by kind.
        advice: what would make it fit or be faster; empty where there is nothing to say.
        calibration_s: seconds that the rehearsal took.
    """

    strategy: str
    device: str
    stages: tuple[PlannedStage, ...]
    model_bytes: int
    free_bytes: int
    free_host_bytes: int
    disk_bytes: Mapping[str, int]
    advice: tuple[Advice, ...] = ()
    calibration_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """Counted FLOPs of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Peak memory on the device over all stages, model included."""
        return max((stage.peak_bytes for stage in self.stages), default=self.model_bytes)

    @property
    def host_bytes(self) -> int:
        """Peak memory of the CPU over all stages where the device is a GPU."""
        return max((stage.host_bytes for stage in self.stages), default=0)

    @property
    def fits(self) -> bool:
        """Whether the peaks are within what is free."""
        return self.peak_bytes - self.model_bytes <= self.free_bytes and self.host_bytes <= self.free_host_bytes

    def table(self) -> Table:
        """Return the stages as a table that ends in a row of totals."""
        table = Table("Stage", title=f"Plan: {self.strategy} on {escape(self.device)}")
        for heading in ("Passes", "Rows", "FLOPs", "Time", "Peak memory"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            numbers = (str(stage.passes), str(stage.rows)) if stage.passes else ("", "")
            table.add_row(escape(stage.name), *numbers, f"{stage.flops:.2g}", duration(stage.seconds), size(stage.peak_bytes))
        table.add_section()
        passes = sum(stage.passes for stage in self.stages)
        table.add_row("Total", str(passes), "", f"{self.flops:.2g}", duration(self.seconds), size(self.peak_bytes), style="bold")
        return table

    def lines(self) -> list[str]:
        """Return what stands below the table: memory, disk, advice."""
        need = self.peak_bytes - self.model_bytes
        verdict = "fits" if self.fits else "does not fit"
        lines = [f"Memory: {size(need)} beside the model, {size(self.free_bytes)} free on {self.device}: it {verdict}."]
        if self.host_bytes:
            lines.append(f"Memory of the CPU: {size(self.host_bytes)}, {size(self.free_host_bytes)} free.")
        disk = ", ".join(f"{kind.replace('_', '-')} {size(count)}" for kind, count in self.disk_bytes.items())
        return [*lines, f"Disk: {disk or 'nothing'}.", *(f"Advice: {advice.text}" for advice in self.advice)]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        totals = {"seconds": self.seconds, "flops": self.flops, "peak_bytes": self.peak_bytes, "host_bytes": self.host_bytes}
        return {**asdict(self), "disk_bytes": dict(self.disk_bytes), "total": totals, "fits": self.fits}


def size(count: float) -> str:
    """Return bytes for people: `3.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count / 1024:.3g} TiB"


def duration(seconds: float) -> str:
    """Return seconds for people: `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
