"""Every notebook runs from top to bottom, and is stored with its pictures and without noise."""

import importlib.util
import json
import re
import socket

import folders
import pytest

MISSING = [name for name in ("ipykernel", "nbclient", "nbformat") if importlib.util.find_spec(name) is None]
NOTEBOOKS = sorted((folders.ROOT / "notebooks").glob("*.ipynb"))
NOISE = {
    "a path": r"/(home|root|tmp|work|Users|usr|var|opt)/",
    "a time": r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d",
    "an address": r"\b0x[0-9a-f]{6,}",
    "the host": rf"\b{re.escape(socket.gethostname())}\b",
}


def outputs_of(path):
    """The outputs of a stored notebook."""
    return [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]


def texts_of(output):
    """What an output says, pictures aside."""
    data = {name: text for name, text in output.get("data", {}).items() if not name.startswith("image/")}
    return "".join(["".join(text) for text in data.values()] + list(output.get("text", ())))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.skipif(bool(MISSING), reason=f"the extra `notebooks` is not installed: no {', '.join(MISSING)}")
def test_it_runs(path, tmp_path):
    from scripts.run_notebooks import execute

    execute(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_its_pictures(path):
    assert any("image/png" in output.get("data", {}) for output in outputs_of(path))
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_noise(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell["metadata"]
    for output in outputs_of(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        for what, pattern in NOISE.items():
            assert not re.search(pattern, texts_of(output)), what
