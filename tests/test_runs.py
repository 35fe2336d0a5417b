"""The folder of a run: made once, entered again by the same configuration only, never half written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppo_jax.errors import InputError
from ppo_jax.runs import RunError, open_run, write_json

CONFIG = {
    "model": "x",
    "seed": 0,
    "num_iterations": 4,
    "ppo": {"lr": 1e-3, "value_clip_eps": float("inf")},
    "names": ("a",),
}


def changed(**changes) -> dict:
    return json.loads(json.dumps(CONFIG)) | changes


def refused(folder, config=CONFIG, may_change=()) -> str:
    before = contents(folder)
    with pytest.raises(RunError) as error:
        open_run(folder, config, may_change)
    assert isinstance(error.value, InputError)
    assert "\n" not in str(error.value)
    assert contents(folder) == before, "a refused start changed the folder"
    return str(error.value)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_run_writes_its_configuration(tmp_path, exists):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    assert not open_run(folder, CONFIG)
    assert json.loads((folder / "config.json").read_text()) == changed()
    assert os.listdir(folder) == ["config.json"]


def test_a_path_as_text_is_as_good(tmp_path):
    assert not open_run(str(tmp_path / "run"), CONFIG)
    assert open_run(str(tmp_path / "run"), CONFIG)


def test_the_same_configuration_enters_again(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = contents(tmp_path / "run")
    assert open_run(tmp_path / "run", CONFIG)
    assert contents(tmp_path / "run") == before


def test_another_configuration_is_refused_by_its_fields(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    text = refused(tmp_path / "run", changed(seed=1, ppo={"lr": 2e-3, "value_clip_eps": float("inf")}))
    assert str(tmp_path / "run") in text
    assert "seed was 0 and is 1" in text
    assert "ppo.lr was 0.001 and is 0.002" in text
    assert "model" not in text.removeprefix(str(tmp_path))
    assert "value_clip_eps" not in text


def test_a_field_that_came_or_went_is_a_difference(tmp_path):
    open_run(tmp_path / "run", CONFIG)
    assert "extra" in refused(tmp_path / "run", changed(extra=1))
    less = changed()
    del less["seed"]
    assert "seed" in refused(tmp_path / "run", less)


def test_fields_that_may_change_may_change(tmp_path):
    """The file stays: a start that enters may still be refused. The caller writes it once it goes on."""
    open_run(tmp_path / "run", CONFIG)
    longer = changed(num_iterations=8)
    assert "num_iterations was 4 and is 8" in refused(tmp_path / "run", longer)
    assert open_run(tmp_path / "run", longer, may_change=["num_iterations"])
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == changed()
    write_json(tmp_path / "run" / "config.json", longer)
    assert open_run(tmp_path / "run", longer)
    assert "seed" in refused(tmp_path / "run", changed(num_iterations=8, seed=1), may_change=["num_iterations"])


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"seed": 0', b"\xff\xfe", b"[]", b"null", b"3", b'"text"'],
    ids=["empty", "brace", "cut", "binary", "list", "null", "number", "text"],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(tmp_path, content):
    folder = tmp_path / "run"
    open_run(folder, CONFIG)
    (folder / "config.json").write_bytes(content)
    assert "config.json" in refused(folder)


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds files but no config.json; expected an empty folder or one of this run" in refused(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="it is a file, expected a folder"):
        open_run(tmp_path / "run", CONFIG)
    # A file in the middle of the path: Python's own error, which the scripts tell in one line as well.
    with pytest.raises((InputError, OSError)):
        open_run(tmp_path / "run" / "deeper", CONFIG)


def test_what_a_kill_in_the_first_write_leaves_is_taken_over(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"seed"')
    assert not open_run(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == changed()


WRITER = """
import itertools, sys
from pathlib import Path
from ppo_jax.runs import write_json

path = Path(sys.argv[1])
print("ready", flush=True)
for i in itertools.count():
    write_json(path, {"number": i, "filling": ["x" * 50] * 2000})
"""


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, rng):
    """SIGKILL while a file of 100 kB is written over and over; a mixture of two versions would not match."""
    path = tmp_path / "config.json"
    root = Path(__file__).parents[1]
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=root, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        seen = set()
        deadline = time.monotonic() + 0.2 + rng.random() * 0.1
        while time.monotonic() < deadline:
            if path.exists():
                seen.add(check_whole(path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check_whole(path)
        assert len(seen) > 1, "it was not written while it was read"
        assert set(os.listdir(tmp_path)) <= {"config.json", ".config.json.tmp"}


def check_whole(path: Path) -> int:
    value = json.loads(path.read_text())
    assert value["filling"] == ["x" * 50] * 2000
    return value["number"]


def test_json_stays_readable(tmp_path):
    write_json(tmp_path / "a.json", {"text": "naïve 猫", "n": [1, 2.5, None, True]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "naïve 猫" in text
    assert text.endswith("}\n")
    assert json.loads(text) == {"text": "naïve 猫", "n": [1, 2.5, None, True]}
