import importlib
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from ppo_jax.errors import InputError
from ppo_jax.metrics import (
    PPO_COLUMNS,
    JsonlWriter,
    MetricWriters,
    Reporter,
    TensorBoardMetrics,
    atomic_write,
    make_writers,
    read_jsonl,
    truncate_jsonl,
)
from ppo_jax.plots import PPO_PANELS, Panel, plot_curves

ROOT = Path(__file__).resolve().parents[1]


def write_rows(path, rows):
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)


def start_python(code, *arguments, **options):
    """A fresh interpreter that treats warnings as errors and finds this checkout."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


# --- JSON Lines ---


def test_jsonl_round_trip_appends_one_line_each(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    write_rows(path, [{"iteration": 0, "a/b": 0.1, "text": "naïve\n日本 \u2028"}])
    write_rows(path, [{"iteration": 1, "a/b": 1e-30, "text": ""}])
    assert path.read_bytes().count(b"\n") == 2
    assert "naïve" in path.read_text(encoding="utf-8")  # readable, not escaped
    assert read_jsonl(path) == [
        {"iteration": 0, "a/b": 0.1, "text": "naïve\n日本 \u2028"},
        {"iteration": 1, "a/b": 1e-30, "text": ""},
    ]


def test_not_a_number_becomes_null_at_any_depth_and_the_file_is_strict_json(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [{"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": np.float32("nan")}])

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": None}


def test_arrays_and_scalars_become_plain_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [{"a": np.float32(0.5), "b": np.int32(3), "c": np.array([[1, 2]]), "d": np.bool_(True)}])
    assert read_jsonl(path) == [{"a": 0.5, "b": 3, "c": [[1, 2]], "d": True}]


def test_jax_scalars_become_plain_numbers(tmp_path):
    import jax.numpy as jnp

    path = tmp_path / "m.jsonl"
    write_rows(path, [{"a": jnp.float32(0.5), "b": jnp.bfloat16(2.0), "c": jnp.arange(2)}])
    assert read_jsonl(path) == [{"a": 0.5, "b": 2.0, "c": [0, 1]}]


def test_a_lone_surrogate_survives_the_round_trip(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [{"text": "a\ud83dz"}])
    assert read_jsonl(path) == [{"text": "a\ud83dz"}]


def test_what_has_no_json_form_is_an_error_and_writes_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer, pytest.raises(TypeError):
        writer.write({"a": 1, "b": object()})
    assert path.read_bytes() == b""


def test_a_line_torn_at_any_byte_is_skipped_and_then_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"iteration": i, "text": "é{}", "x": {"y": [i, 0.5]}} for i in range(3)]
    write_rows(path, rows)
    data = path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        whole = end == len(data) - 1  # all but the newline: the object is complete
        assert read_jsonl(path) == (rows if whole else rows[:2]), end
        write_rows(path, [{"iteration": 9}])  # must not be glued to the torn line
        assert read_jsonl(path) == [*(rows if whole else rows[:2]), {"iteration": 9}], end


@pytest.mark.parametrize("bad", [b'{"iteration": 1', b"[1, 2]", b"\xff\xfe", b"NONE"])
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"iteration": 0}\n\n' + bad + b'\n{"iteration": 2}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:3: expected a JSON object"):
        read_jsonl(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"m\.jsonl:3"):
        truncate_jsonl(path, "iteration", 1)
    assert path.read_bytes() == before


def test_truncate_drops_rows_from_the_limit_on_and_the_torn_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_rows(path, [{"iteration": i, "text": "é"} for i in (0, 0, 1, 1, 2, 2, 3)])
    kept = path.read_bytes().splitlines(keepends=True)[:4]
    with open(path, "ab") as file:
        file.write(b'{"iteration": 3, "te')
    assert truncate_jsonl(path, "iteration", 2) == 3
    assert path.read_bytes() == b"".join(kept)  # untouched to the byte
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]  # no temporary file stays


def test_truncate_with_nothing_to_drop_leaves_the_file_alone(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [{"iteration": 0}])
    inode = path.stat().st_ino
    assert truncate_jsonl(path, "iteration", 1) == 0
    assert path.stat().st_ino == inode
    assert truncate_jsonl(path, "iteration", 0) == 1
    assert path.read_bytes() == b""


def test_truncate_of_a_missing_file_does_nothing(tmp_path):
    assert truncate_jsonl(tmp_path / "m.jsonl", "iteration", 0) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", ['{"step": 1}', '{"iteration": null}', '{"iteration": "1"}'])
def test_truncate_refuses_a_row_without_the_number(tmp_path, row):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 0}\n' + row + "\n")
    with pytest.raises(InputError, match=r"m\.jsonl:2: expected a number under 'iteration'"):
        truncate_jsonl(path, "iteration", 1)


def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_):
        raise OSError("no replace today")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no replace today"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sigkill_while_writing_loses_no_finished_row(tmp_path):
    path = tmp_path / "m.jsonl"
    code = """
import sys
from ppo_jax.metrics import JsonlWriter
writer = JsonlWriter(sys.argv[1])
for i in range(10**9):
    writer.write({"iteration": i, "text": "x" * (i % 5000)})
    print(i, flush=True)
"""
    process = start_python(code, path, stdout=subprocess.PIPE)
    try:
        while int(process.stdout.readline()) < 200:
            pass
        process.send_signal(signal.SIGKILL)
        last_said = [int(line) for line in process.stdout if line.endswith("\n")][-1:]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    rows = read_jsonl(path)
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    assert all(len(row["text"]) == row["iteration"] % 5000 for row in rows)
    assert len(rows) > max([200, *last_said])
    truncate_jsonl(path, "iteration", 100)
    write_rows(path, [{"iteration": 100}])
    assert [row["iteration"] for row in read_jsonl(path)] == list(range(101))


def test_a_full_disk_is_an_error_and_the_next_start_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    code = """
import resource, sys
from ppo_jax.metrics import JsonlWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
writer = JsonlWriter(sys.argv[1])
writer.write({"iteration": 0})
try:
    writer.write({"iteration": 1, "text": "x" * 100})
except OSError as error:
    print(error)
writer.close()
"""
    process = start_python(code, path, stdout=subprocess.PIPE)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "wrote 33 of 129 bytes; is the disk full?" in said  # 50 - 17 for the first line
    assert path.stat().st_size == 50
    write_rows(path, [{"iteration": 1}])
    assert read_jsonl(path) == [{"iteration": 0}, {"iteration": 1}]


# --- writers ---


def read_events(folder):
    """All events of a TensorBoard folder, file after file: little-endian length, its checksum, data, its checksum."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    files = []
    for path in sorted(folder.iterdir()):
        data, offset, events = path.read_bytes(), 0, []
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            events.append(event_pb2.Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
        assert offset == len(data)
        files.append(events)
    return files


def shown_by_tensorboard(files):
    """(step, tag, value) that remain when a session's start hides earlier events from its step on."""
    shown = []
    for event in (event for events in files for event in events):
        if event.HasField("session_log"):
            assert event.session_log.status == 1  # START
            shown = [row for row in shown if row[0] < event.step]
        shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


class FakeTracker(types.ModuleType):
    """A module with the part of wandb's interface that is used; keeps what it was called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def init(self, **arguments):
        self.calls.append(("init", arguments))

    def log(self, metrics, step):
        self.calls.append(("log", step, metrics))

    def finish(self):
        self.calls.append(("finish",))

    @property
    def steps(self):
        return [call[1] for call in self.calls if call[0] == "log"]

    @property
    def inits(self):
        return [call[1] for call in self.calls if call[0] == "init"]


@pytest.fixture
def trackers(monkeypatch):
    modules = {name: FakeTracker(name) for name in ("wandb", "trackio")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path):
    with make_writers(tmp_path / "run", ("tensorboard",), {}, "name") as writers:
        writers.write(0, {"objective/score": 0.5, "policy/loss": math.nan})
        # On the disk before the writers are closed: a kill loses nothing.
        (events,) = read_events(tmp_path / "run" / "tensorboard")
        assert len(shown_by_tensorboard([events])) == 2
        writers.write(1, {"objective/score": np.float32(0.75), "left/out": None})
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [
        {"iteration": 0, "objective/score": 0.5, "policy/loss": None},
        {"iteration": 1, "objective/score": 0.75, "left/out": None},
    ]
    (events,) = read_events(tmp_path / "run" / "tensorboard")
    assert events[0].file_version == "brain.Event:2"
    assert abs(events[-1].wall_time - time.time()) < 3600
    first, second, third = shown_by_tensorboard([events])
    assert (first, third) == ((0, "objective/score", 0.5), (1, "objective/score", 0.75))
    assert second[:2] == (0, "policy/loss")
    assert math.isnan(second[2])


def test_tensorboard_records_carry_valid_checksums(tmp_path):
    writer = TensorBoardMetrics(tmp_path)
    writer.write(3, {"a": 1.0})
    writer.close()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    (length, checksum) = struct.unpack_from("<QI", data)

    def masked_crc32c(message):  # bitwise Castagnoli, then TensorFlow's rotation and constant
        crc = 0xFFFFFFFF
        for byte in message:
            crc ^= byte
            for _ in range(8):
                crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    assert checksum == masked_crc32c(data[:8])
    assert struct.unpack_from("<I", data, 12 + length)[0] == masked_crc32c(data[12 : 12 + length])


def test_a_resumed_run_shows_no_step_twice(tmp_path, trackers):
    def run(start, end, source):
        writers = make_writers(tmp_path, ("tensorboard", "wandb", "trackio"), {}, "name", start_step=start)
        for step in range(start, end):
            writers.write(step, {"source": source})
        writers.close()

    run(0, 6, 1.0)  # killed after step 5, its last checkpoint at 3
    run(3, 4, 2.0)  # killed again
    run(3, 8, 3.0)
    expected = [(step, 1.0 if step < 3 else 3.0) for step in range(8)]
    assert [(row["iteration"], row["source"]) for row in read_jsonl(tmp_path / "metrics.jsonl")] == expected
    files = read_events(tmp_path / "tensorboard")
    assert len(files) == 3
    assert [(step, value) for step, _, value in shown_by_tensorboard(files)] == expected
    # These cannot take back what they have: steps 3 to 5 stay as first logged.
    assert trackers["wandb"].steps == list(range(8))
    assert trackers["trackio"].steps == list(range(8))


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    for value in (1.0, 2.0):
        with make_writers(tmp_path, ("tensorboard",), {}, "name") as writers:
            writers.write(0, {"a": value})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"iteration": 0, "a": 2.0}]
    assert shown_by_tensorboard(read_events(tmp_path / "tensorboard")) == [(0, "a", 2.0)]


def test_wandb_continues_the_same_run(tmp_path, trackers):
    config = {"seed": 1, "ppo": {"lr": 1e-5}}
    for start in (0, 1):
        with make_writers(tmp_path / "a", ("wandb",), config, "My run: 1/2", start_step=start) as writers:
            writers.write(start, {"objective/score": 0.5})
    make_writers(tmp_path / "b", ("wandb",), config, "My run: 1/2").close()

    wandb = trackers["wandb"]
    first, second, other = wandb.inits
    assert first == second
    assert first["id"] != other["id"]
    assert first["id"].startswith("My-run-1-2-")
    assert not set(first["id"]) & set("/\\#?%: ")  # what wandb refuses in an id
    assert first["resume"] == "allow"
    assert first["config"] == config
    assert (first["project"], first["name"], first["dir"]) == ("ppo_jax", "My run: 1/2", str(tmp_path / "a"))
    assert json.loads((tmp_path / "a" / "trackers.json").read_text())["wandb"]["run_id"] == first["id"]
    one_start = ["init", "log", "finish"]
    assert [call[0] for call in wandb.calls] == [*one_start, *one_start, "init", "finish"]
    assert wandb.calls[1] == ("log", 0, {"objective/score": 0.5})


def test_trackio_is_resumed_by_name(tmp_path, trackers):
    for start in (0, 1):
        make_writers(tmp_path, ("trackio",), {}, "name", start_step=start).close()
    first, second = trackers["trackio"].inits
    assert first == second
    assert set(first) == {"project", "config", "resume", "name"}  # trackio's init knows no id and no dir
    assert first["name"].startswith("name-")


def test_a_tracker_added_on_a_resume_begins_there(tmp_path, trackers):
    with make_writers(tmp_path, (), {}, "name") as writers:
        for step in range(4):
            writers.write(step, {})
    with make_writers(tmp_path, ("wandb",), {}, "name", start_step=2) as writers:
        for step in range(2, 4):
            writers.write(step, {})
    assert trackers["wandb"].steps == [2, 3]


def test_unknown_tracker_names_the_known_ones_and_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="unknown tracker 'mlflow'; the known ones are tensorboard, wandb, trackio"):
        make_writers(tmp_path / "run", ("tensorboard", "mlflow"), {}, "name")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("stand_in", [None, types.ModuleType("a folder of that name")])
def test_missing_package_says_what_to_install_and_writes_nothing(tmp_path, monkeypatch, name, stand_in):
    monkeypatch.setitem(sys.modules, name, stand_in)  # None: the import fails
    with pytest.raises(InputError, match=f"tracker '{name}' needs .* not installed: pip install {name}$"):
        make_writers(tmp_path / "run", ("tensorboard", name), {}, "name")
    assert not (tmp_path / "run").exists()


def test_when_a_tracker_fails_to_start_the_others_are_closed(tmp_path, trackers, monkeypatch):
    def fail(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr(trackers["trackio"], "init", fail)
    with pytest.raises(RuntimeError, match="no network"):
        make_writers(tmp_path, ("wandb", "trackio"), {}, "name")
    assert [call[0] for call in trackers["wandb"].calls] == ["init", "finish"]


def test_close_reaches_every_writer_and_can_be_repeated(tmp_path):
    closed = []

    class Writer:
        def __init__(self, name):
            self.name = name

        def write(self, step, metrics):
            pass

        def close(self):
            closed.append(self.name)
            if self.name == "b":
                raise RuntimeError("b fails")

    with pytest.raises(RuntimeError, match="b fails"):
        MetricWriters([Writer("a"), Writer("b"), Writer("c")]).close()
    assert sorted(closed) == ["a", "b", "c"]
    writers = make_writers(tmp_path, ("tensorboard",), {}, "name")
    writers.close()
    writers.close()


# --- terminal ---


class Clock:
    """Seconds from a list, one a call."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def __call__(self):
        return self.seconds.pop(0)


class FakeTerminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


METRICS = {"objective/score": 0.51234, "objective/kl": 3.14159, "time/tokens_per_s": 12345.6}


@pytest.mark.parametrize("force_color", [False, True])
def test_off_a_terminal_each_iteration_is_one_plain_line(capsys, monkeypatch, force_color):
    if force_color:  # set in many CI systems; must not bring the live line back
        monkeypatch.setenv("FORCE_COLOR", "1")
    # The first iteration ends at 100 s (it compiled), then two seconds each: after the third, 37 * 2 s = 1:14 are left.
    with Reporter(40, clock=Clock(100, 102, 104)) as reporter:
        for i in range(3):
            reporter.update(i, METRICS)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "iteration  1/40  score 0.512  KL 3.14  tokens/s 12,346  left -:--",
        "iteration  2/40  score 0.512  KL 3.14  tokens/s 12,346  left 1:16",
        "iteration  3/40  score 0.512  KL 3.14  tokens/s 12,346  left 1:14",
    ]
    assert "\x1b" not in out


def test_time_left_follows_the_last_ten_iterations_and_shows_hours(capsys):
    # 5 iterations of 1000 s, then 10 of 100 s: only the latter count. 80 left * 100 s = 8000 s = 2:13:20.
    ends = [1000 * i for i in range(1, 6)] + [5000 + 100 * i for i in range(1, 11)]
    with Reporter(95, clock=Clock(*ends)) as reporter:
        for i in range(15):
            reporter.update(i, {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("left 2:13:20")


def test_columns_are_a_parameter_and_odd_values_show(capsys):
    columns = (("loss", "loss", ".2f"), ("perplexity", "perplexity", ".1f"), ("b", "no/such", ".1f"))
    with Reporter(3, 2, columns, label="[b]step[/b]", clock=Clock(1)) as reporter:
        reporter.update(2, {"loss": math.nan, "perplexity": None})
    assert capsys.readouterr().out == "[b]step[/b] 3/3  loss nan  perplexity -  b -  left 0:00\n"


def test_on_a_terminal_there_is_a_live_line_and_prints_go_above(monkeypatch):
    file = FakeTerminal()
    console = Console(file=file, force_terminal=True, width=120, highlight=False)
    monkeypatch.setenv("TERM", "xterm")
    with Reporter(40, 10, console=console, clock=Clock(0, 2)) as reporter:
        assert reporter.live
        reporter.update(10, METRICS)
        reporter.print("saved [bold]checkpoint[/bold]")
        reporter.update(11, METRICS)
    out = file.getvalue()
    assert "iteration 11/40  score 0.512  KL 3.14  tokens/s 12,346  left -:--" in out
    assert "iteration 12/40  score 0.512  KL 3.14  tokens/s 12,346  left 0:56" in out
    assert "saved [bold]checkpoint[/bold]\n" in out
    assert out.count("\n") < 6  # the line is redrawn, not repeated
    assert "\x1b[?25h" in out  # the cursor is back


@pytest.mark.parametrize("width", [30, 60, 89, 90])
def test_the_live_line_stays_one_line_on_a_narrow_terminal(monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    file = FakeTerminal()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    with Reporter(40, console=console, columns=PPO_COLUMNS * 2) as reporter:
        reporter.update(0, METRICS)
    assert "iteration 1/40  score" in file.getvalue()
    assert file.getvalue().count("\n") == 1


def test_the_live_line_is_taken_down_on_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = FakeTerminal()
    with pytest.raises(KeyboardInterrupt):
        with Reporter(2, console=Console(file=file, force_terminal=True)):
            raise KeyboardInterrupt
    assert "\x1b[?25h" in file.getvalue()


def test_samples_are_shown_as_text(capsys):
    with Reporter(1) as reporter:
        reporter.samples_table(
            ["[red]Once[/red]", "\x1b[31mred\x07"],
            ["[bold] upon\na :smile: [/nonsense]", "tab\there \u202e日本"],
            [0.5, math.nan],
            title="[b]after 3[/b]",
        )
    out = capsys.readouterr().out
    for text in (
        "[b]after 3[/b]",
        "[red]Once[/red]",
        r"[bold] upon\na :smile: [/nonsense]",
        r"\x1b[31mred\x07",
        r"tab\there \u202e日本",
        "0.500",
        "nan",
    ):
        assert text in out
    assert "\x1b" not in out
    assert "\x07" not in out


def test_long_samples_are_cut_where_it_hurts_least(capsys):
    with Reporter(1) as reporter:
        reporter.samples_table(["a" * 100 + "END"] * 9, ["START" + "b" * 100] * 9, max_rows=2, max_chars=20)
    out = capsys.readouterr().out
    assert out.count("..." + "a" * 7 + "END ") == 2  # half of 20 characters, the last ones
    assert out.count("START" + "b" * 15 + "... ") == 2
    assert "score" not in out


def test_samples_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match=r"expected as many of each, got \[2, 2, 1\]"):
        Reporter(1).samples_table(["a", "b"], ["a", "b"], [1.0])


def test_texts_outside_the_encoding_of_the_output_do_not_stop_a_run():
    code = """
from ppo_jax.metrics import Reporter
with Reporter(1, columns=(("ΔKL", "kl", ".1f"),)) as reporter:
    reporter.samples_table(["日本 caf\\u00e9"], ["\\ud83d"], [1.0], title="→")
    reporter.print("…")
    reporter.update(0, {"kl": 1.0})
"""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start_python(code, stdout=subprocess.PIPE, env=environment)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "?? caf?" in out
    assert r"\ud83d" in out
    assert "iteration 1/1  ?KL 1.0" in out


# --- curves ---

BLUE = np.array([0x25, 0x63, 0xA8])


def full_rows(count):
    keys = [key for panel in PPO_PANELS for key, _ in panel.lines]
    rows = [{"iteration": i, "objective/score_std": 0.1} for i in range(count)]
    for row in rows:
        row.update({key: 1e-6 * (1 + row["iteration"]) for key in keys})
    return rows


def drawn_cells(path, across, down):
    """For each cell of the grid of panels, whether something in the first line's colour is drawn there."""
    picture = np.round(imread(path)[..., :3] * 255).astype(int)
    blue = (picture == BLUE).all(-1)
    return [[bool(cell.any()) for cell in np.array_split(row, across, axis=1)] for row in np.array_split(blue, down)]


def test_curves_of_a_run_show_all_panels(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", full_rows(30))
    out = tmp_path / "curves.png"
    plot_curves(tmp_path / "metrics.jsonl", out, title="run $1")
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert drawn_cells(out, across=4, down=3) == [[True] * 4] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_panels_without_data_are_left_out(tmp_path):
    rows = [{"iteration": i, "objective/score": i, "policy/loss": None, "time/tokens_per_s": 5.0} for i in range(3)]
    rows.append({"iteration": 3, "objective/score": math.nan})
    plot_curves([*rows, {"no": "iteration"}], tmp_path / "c.png")
    assert drawn_cells(tmp_path / "c.png", across=2, down=1) == [[True, True]]


@pytest.mark.parametrize("count", [1, 2, 250])
def test_short_and_long_runs_zeros_and_gaps_can_be_drawn(tmp_path, count):
    rows = full_rows(count)
    for row in rows:
        row["policy/first_ratio_dev"] = 0.0  # has no logarithm
        if row["iteration"] % 2:
            row["objective/kl"] = None
    plot_curves(rows, tmp_path / "c.png")
    assert drawn_cells(tmp_path / "c.png", across=4, down=3) == [[True] * 4] * 3


def test_own_panels_and_step_key(tmp_path):
    rows = [{"step": i, "loss": 3.0 - i, "other": i} for i in range(3)]
    panel = Panel("loss", (("loss", "train"), ("other", "test")), "nats per token", limit=1.0)
    plot_curves(rows, tmp_path / "c.png", (panel, Panel("gone", (("gone", ""),), "")), step_key="step")
    assert drawn_cells(tmp_path / "c.png", across=1, down=1) == [[True]]


@pytest.mark.parametrize("rows", [[], [{"iteration": 0, "x": 1.0}], [{"objective/score": 1.0}]])
def test_nothing_to_draw_is_an_error_and_makes_no_file(tmp_path, rows):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_curves(rows, tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_logging_brings_in_neither_jax_nor_pyplot():
    code = """
import sys
import ppo_jax.metrics
assert not {"matplotlib", "wandb", "trackio", "tensorboardX"} & set(sys.modules)
import ppo_jax.plots
assert not {"jax", "matplotlib.pyplot"} & set(sys.modules)
"""
    process = start_python(code)
    assert process.wait(timeout=60) == 0
