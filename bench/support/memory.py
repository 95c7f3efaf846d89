"""Peak resident memory of one stage of one library, measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MIB = 2**20


def peak_bytes() -> int:
    """Return this process's peak resident memory so far.

    Linux keeps it per address space; `getrusage`, the fallback, also counts what the parent held before it started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(prepare: Callable[[], Callable[[], object]]) -> None:
    """In the measured process: build the model, run the stage, print `{baseline, peak}` in bytes."""
    stage = prepare()
    baseline = peak_bytes()
    stage()
    print(json.dumps({"baseline": baseline, "peak": peak_bytes()}))


def measure(arguments: list[str]) -> dict[str, int]:
    """Run this same script with other arguments in a fresh process and return what it reported.

    Raises:
        RuntimeError: the process failed; with the end of its standard error.
    """
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
