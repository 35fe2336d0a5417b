"""Stored notebooks: what goes, what stays, and what --check says."""

import json

import pytest

from scripts.clean_notebooks import clean, encode, main

PICTURE = "aGVsbG8="
CELLS = [
    {"cell_type": "markdown", "id": "8f3a", "metadata": {"collapsed": True}, "source": "# Title\n\nText\n"},
    {
        "cell_type": "code",
        "id": "77c1",
        "execution_count": 12,
        "metadata": {"execution": {"iopub.execute_input": "2026-11-30T04:00:00Z"}},
        "source": ["print(1)\n", "plot()"],
        "outputs": [
            {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
            {"output_type": "stream", "name": "stderr", "text": ["a warning\n"]},
            {"output_type": "stream", "name": "stdout", "text": "2\n"},
            {"output_type": "display_data", "data": {"image/png": PICTURE}, "metadata": {"needs": "x"}},
            {"output_type": "display_data", "data": {}, "metadata": {}},
            {"output_type": "stream", "name": "stdout", "text": [" \n"]},
            {"output_type": "execute_result", "data": {"text/plain": "3"}, "metadata": {}, "execution_count": 12},
        ],
    },
    {"cell_type": "code", "id": "99", "execution_count": None, "metadata": {}, "source": "", "outputs": []},
]
NOTEBOOK = {
    "cells": CELLS,
    "metadata": {"kernelspec": {"name": "my-venv"}, "language_info": {"name": "python", "version": "3.11.7"}},
    "nbformat": 4,
    "nbformat_minor": 2,
}


@pytest.fixture
def path(tmp_path):
    """A notebook as an editor leaves it."""
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps(NOTEBOOK))
    return path


def test_cells_are_numbered_and_have_no_metadata():
    cells = clean(NOTEBOOK)["cells"]
    assert [cell["id"] for cell in cells] == ["cell-0", "cell-1", "cell-2"]
    assert [cell.get("execution_count") for cell in cells] == [None, 1, 2]
    assert not any(cell["metadata"] for cell in cells)
    assert cells[0]["source"] == ["# Title\n", "\n", "Text"]
    assert cells[1]["source"] == ["print(1)\n", "plot()"]


def test_outputs_that_show_something_stay():
    assert clean(NOTEBOOK)["cells"][1]["outputs"] == [
        {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]},
        {"output_type": "display_data", "data": {"image/png": PICTURE}, "metadata": {}},
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}, "metadata": {}, "execution_count": 1},
    ]


def test_versions_go():
    cleaned = clean(NOTEBOOK)
    assert "3.11" not in encode(cleaned)
    assert cleaned["metadata"]["kernelspec"]["name"] == "python3"
    assert (cleaned["nbformat"], cleaned["nbformat_minor"]) == (4, 5)


def test_a_second_time_changes_nothing():
    once = clean(NOTEBOOK)
    assert clean(json.loads(encode(once))) == once


def test_nbformat_accepts_it():
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    nbformat.validate(nbformat.reads(encode(clean(NOTEBOOK)), as_version=4))


def test_check_writes_nothing(path, capsys):
    before = path.read_text()
    assert main(["--check", str(path)]) == 1
    assert path.read_text() == before
    assert "would be cleaned" in capsys.readouterr().out


def test_a_cleaned_file_passes_the_check(path):
    assert main([str(path)]) == 0
    assert main(["--check", str(path)]) == 0
