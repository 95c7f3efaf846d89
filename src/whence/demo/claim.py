"""The folder of a demo, marked as its own: nothing else in it is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whence.attributor import Attributor
from whence.errors import ConfigError
from whence.storage.run import explain_write_errors, read_json, write_json_atomic

_MARKER = "demo.json"


def claim(out: Path, name: str, settings: Mapping[str, Any]) -> bool:
    """Make the folder and mark it as the demo's; return whether it is there with these settings already.

    Raises:
        ConfigError: the folder holds something else, or another demo.
    """
    others = out.is_file() or (out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()))
    mark = {"demo": name, **settings}
    before = read_json(out / _MARKER) if (out / _MARKER).is_file() else None
    if others and before is None:
        raise ConfigError(
            f"{out} holds something that is no demo, which would be replaced. Choose a new or empty folder with out=..., or --out."
        )
    if before is not None and before.get("demo") != name:
        raise ConfigError(f"{out} holds the demo {before.get('demo')!r}, which would be replaced. Choose another folder with --out.")
    with explain_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / _MARKER, mark)
    return before == mark


def tell(attributor: Attributor) -> None:
    """Write the stage table and the coverage to standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    console.print(attributor.stages.table())
    console.print(str(attributor.coverage), markup=False, highlight=False)
