"""Execute the tutorials and keep what they show.

    python docs/tutorials/make.py                                      # both; stdlib trains a model for some minutes
    python docs/tutorials/make.py stdlib --run runs/stdlib             # with what `whence demo stdlib` left

Needs the extras `tutorials`, `report` and, for stdlib, `hf`. Each runs in a folder of its own, which goes afterwards.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("digits", "stdlib")


def execute(source: Path, *, run: Path | None = None, timeout: int = 3600) -> Any:
    """Return an executed notebook; a run of the demo is copied to where it looks for one."""
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        if run is not None:
            shutil.copytree(run, Path(folder) / "runs/stdlib")
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False
        )
        client.execute()
        scrub(notebook, folder)
    return notebook


def scrub(notebook: Any, folder: str) -> None:
    """Take out what is of one machine or one run: the folder, kernel and Python versions, messages on standard error."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.pop("metadata", None) if output.output_type == "stream" else output.update(metadata={})
            if "text" in output:
                output["text"] = clean(output["text"], folder)
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output["data"][kind] = clean(value, folder)


def clean(text: str, folder: str) -> str:
    """Return text without the folder, addresses of objects, and the file of a temporary run folder."""
    text = text.replace(f"{folder}/", "").replace(folder, ".")
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def write(notebook: Any, path: Path) -> None:
    """Write a notebook; cells are numbered, so that a new execution changes no ids."""
    import nbformat

    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Execute the notebooks that are named."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="default: both")
    parser.add_argument("--run", type=Path, help="folder of the demo of stdlib")
    options = parser.parse_args()
    for name in options.names or NAMES:
        path = HERE / f"{name}.ipynb"
        write(execute(path, run=options.run if name == "stdlib" else None), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
