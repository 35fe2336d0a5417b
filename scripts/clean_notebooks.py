"""Takes out of notebooks what differs from run to run, and keeps texts and pictures.

    python scripts/clean_notebooks.py [--check] notebooks/*.ipynb

What goes: times of execution and other metadata of cells and outputs, versions of kernel and language, stderr, outputs
that show nothing. Cells are numbered from the top, in their ids and in their counts. With --check nothing is written,
and the exit status is 1 if a file would change.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def clean(notebook: Notebook) -> Notebook:
    """The same notebook without noise, as nbformat 4.5; a second time changes nothing."""
    cells, count = [], 0
    for number, cell in enumerate(notebook["cells"]):
        kept: dict[str, Any] = {"cell_type": cell["cell_type"], "id": f"cell-{number}", "metadata": {}}
        if cell["cell_type"] == "code":
            count += 1
            kept |= {"execution_count": count, "outputs": clean_outputs(cell["outputs"], count)}
        if "attachments" in cell:
            kept["attachments"] = cell["attachments"]
        cells.append(kept | {"source": lines("".join(cell["source"]).strip("\n"))})
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def clean_outputs(outputs: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The outputs that show something; pieces of text that follow each other are one."""
    cleaned: list[dict[str, Any]] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream" and output["name"] == "stdout":
            before = "".join(cleaned.pop()["text"]) if cleaned and cleaned[-1]["output_type"] == "stream" else ""
            text = before + "".join(output["text"])
            cleaned += [{"name": "stdout", "output_type": kind, "text": lines(text)}] if text.strip() else []
        elif kind in ("display_data", "execute_result") and output["data"]:
            data = {name: value if "json" in name else lines("".join(value)) for name, value in output["data"].items()}
            data = {name: "".join(value) if name == "image/png" else value for name, value in data.items()}
            cleaned.append({"data": data, "metadata": {}, "output_type": kind})
            if kind == "execute_result":
                cleaned[-1]["execution_count"] = count
        elif kind == "error":
            cleaned.append(output)
    return cleaned


def lines(text: str) -> list[str]:
    """A text as notebooks store it."""
    return text.splitlines(keepends=True)


def encode(notebook: Notebook) -> str:
    """The text of the file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(arguments: list[str]) -> int:
    """Cleans the files that are named; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file would change")
    parser.add_argument("notebooks", nargs="+", type=Path)
    given = parser.parse_args(arguments)
    changed = 0
    for path in given.notebooks:
        before = path.read_text(encoding="utf-8")
        after = encode(clean(json.loads(before)))
        if after != before:
            changed += 1
            print(f"{path}: {'would be' if given.check else 'was'} cleaned")
            if not given.check:
                path.write_text(after, encoding="utf-8")
    return int(given.check and changed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
