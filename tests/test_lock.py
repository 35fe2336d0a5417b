"""One process a folder: the second is told who has it, a dead one's is taken over."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppo_jax.errors import InputError
from ppo_jax.lock import LockedError, lock_folder
from ppo_jax.runs import open_run

HOLDER = """
import sys, time
from pathlib import Path
from ppo_jax.lock import lock_folder

lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_with_the_first(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(LockedError) as error:
        lock_folder(tmp_path)
    assert time.monotonic() - began < 1
    assert isinstance(error.value, InputError)
    told = str(error.value)
    assert told.startswith(f"workdir {tmp_path}: in use by process {holder.pid} on {socket.gethostname()} since 20")
    assert told.endswith("; expected its end, or another workdir")
    with pytest.raises(LockedError):
        open_run(tmp_path, {"seed": 1})
    assert os.listdir(tmp_path) == [".lock"], "a refused start changed the folder"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owners_folder_is_taken_over(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    lock_folder(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()


def test_the_same_process_may_take_it_again(tmp_path):
    for path in (tmp_path, tmp_path, tmp_path / ".." / tmp_path.name):
        lock_folder(path)
    assert not open_run(tmp_path, {"seed": 1})
    assert open_run(str(tmp_path), {"seed": 1})


def refused_elsewhere(folder: Path) -> bool:
    """Whether another process is refused."""
    script = HOLDER.replace("time.sleep(600)", "")
    command = [sys.executable, "-c", script, str(folder)]
    outcome = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "held" in outcome.stdout or "LockedError" in outcome.stderr
    return "LockedError" in outcome.stderr


def test_a_folder_that_was_moved_away_and_made_anew_is_another(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock_folder(folder)
    folder.rename(tmp_path / "old")
    folder.mkdir()
    lock_folder(folder)
    assert refused_elsewhere(folder)
    assert refused_elsewhere(tmp_path / "old")


def test_a_child_does_not_keep_it(tmp_path):
    """A process that outlives its parent, a labelling page's server say, is no owner."""
    script = HOLDER.replace("time.sleep(600)", "import subprocess; subprocess.Popen(['sleep', '60'])")
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.DEVNULL)
    lock_folder(tmp_path)


FORKER = HOLDER.replace(
    "time.sleep(600)",
    """
import os
if os.fork() == 0:
    os.close(1)
    try:
        lock_folder(Path(sys.argv[1]))
        status = 1
    except Exception as error:
        status = 0 if "in use by process" in str(error) else 2
    Path(sys.argv[1], "child").write_text(str(status))
    time.sleep(60)
    os._exit(0)
time.sleep(600)
""",
)


def test_a_forked_child_is_no_owner(tmp_path):
    """Neither while the parent lives, nor for it after its death."""
    command = [sys.executable, "-c", FORKER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        deadline = time.monotonic() + 20
        while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (tmp_path / "child").read_text() == "0"
        process.kill()
        process.wait()
        lock_folder(tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_an_owner_that_has_not_said_who_it_is(tmp_path, holder):
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(LockedError, match="in use by another process; expected"):
        lock_folder(tmp_path)


def test_a_read_only_folder_is_told(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        lock_folder(folder)
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    with pytest.raises(OSError, match="No such file"):
        lock_folder(tmp_path / "none")
