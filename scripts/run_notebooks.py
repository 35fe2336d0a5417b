"""Runs notebooks from top to bottom, and stores them with their outputs, cleaned (for authors).

    python scripts/run_notebooks.py [notebooks/02_one_iteration.ipynb ...]

Without names: all of them. What they write goes to a temporary folder.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from scripts.clean_notebooks import clean, encode

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600  # of one cell


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of a new run; the file stays as it is.

    Args:
        path: the notebook.
        folder: where it runs.

    Raises:
        CellExecutionError: a cell failed, with its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    # The kernel finds `experiments`, which is no installed package, where this process does.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources)
    return client.execute(env=os.environ | {"PYTHONPATH": paths})


def main(arguments: list[str]) -> None:
    """Runs and stores the notebooks that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    for path in parser.parse_args(arguments).notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = clean(execute(path, Path(folder)))
        path.write_text(encode(notebook), encoding="utf-8")
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, {size:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
