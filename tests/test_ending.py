"""How scripts end: asked by a signal or by the clock they finish what they do, save, and say that they can go on."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import folders
import jax
import pytest

from experiments import train_dpo, train_ppo, train_reward, train_sft
from experiments.ending import STOPPED, StoppedEarly, asked_to_end, told_in_one_line
from experiments.settings import DPOExperiment, PPOExperiment, RewardExperiment, SFTExperiment
from ppo_jax.metrics import read_jsonl

CONFIGS = folders.ROOT / "experiments" / "configs"


def wait_for(asked) -> str:
    deadline = time.monotonic() + 10
    while not asked():
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    return asked()


@pytest.fixture
def as_in_a_terminal():
    """A shell's background jobs ignore SIGINT, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(number):
    before = signal.getsignal(number)
    with asked_to_end() as asked:
        assert asked() == ""
        os.kill(os.getpid(), number)
        assert wait_for(asked) == number.name
    assert signal.getsignal(number) is before
    with asked_to_end() as asked:
        assert asked() == "", "asked in an earlier run"


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGINT is in a shell script's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asked_to_end() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            assert asked() == ""
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_signals_alone():
    found = []

    def work():
        with asked_to_end(1e-9) as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == ["max_hours=1e-09"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_clock_asks_and_the_first_signal_after_it_does_no_harm():
    with asked_to_end(1.0) as asked:
        assert asked() == ""
    with asked_to_end(1e-9) as asked:
        assert asked() == "max_hours=1e-09"
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(lambda: asked() == "SIGTERM")


def test_a_forked_childs_signals_are_its_own():
    """A process pool ends its workers by SIGTERM: nobody asked the parent."""
    script = """
import os, signal, time
from experiments.ending import asked_to_end
with asked_to_end() as asked:
    for _ in range(4):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.1)
    assert asked() == ""
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True, timeout=60)


def test_a_notebook_keeps_its_signals(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    before = signal.getsignal(signal.SIGINT)
    with asked_to_end(1e-9) as asked:
        assert signal.getsignal(signal.SIGINT) is before
        assert asked() == "max_hours=1e-09"


def test_a_run_that_was_stopped_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end, told_in_one_line():
        raise StoppedEarly("SIGTERM; 3 of 8 steps are saved")
    assert end.value.code == STOPPED == 75
    assert capsys.readouterr().err == "stopped: SIGTERM; 3 of 8 steps are saved; the same command goes on from there\n"


BUSY = """
import ctypes, signal, sys
from experiments.ending import asked_to_end
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have

with asked_to_end():
    print("busy", flush=True)
    for _ in range(3):  # each signal ends one of them
        ctypes.CDLL(None).sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "busy\n"
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    process.stdout.close()


# Whole runs


def judgements(num: int = 24) -> list[dict]:
    return [{"prompt": f"the {('cat', 'dog')[i % 2]}", "chosen": f" is {('good', 'fine', 'great')[i % 3]}",
             "rejected": f" was {('bad', 'poor')[i // 2 % 2]}"} for i in range(num)]  # fmt: skip


def texts(num: int = 24) -> list[dict]:
    return [{"text": f"the {('cat', 'dog', 'film')[i % 3]} was {('good', 'bad')[i % 2]} here"} for i in range(num)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    folders.write_jsonl(root / "pairs.jsonl", judgements())
    folders.write_jsonl(root / "texts.jsonl", texts())
    return folders.make_world(root)


PAIRS = {
    "length": 16, "heldout_frac": 0.25, "batch_size": 4, "log_every": 2, "eval_every": 4,
    "checkpoint_every": 3, "mesh.data": 1,
}  # fmt: skip


def flags_of(world, name: str) -> list[str]:
    if name == "ppo":
        return world.flags("--config.num_iterations=5", "--config.checkpoint_every=3")
    data = {"model": world.model, "data": world.root / ("texts.jsonl" if name == "sft" else "pairs.jsonl")}
    own = {"sft": {"num_steps": 5, "heldout": ""}, "reward": {"normalize": False}}
    fields = PAIRS | data | own.get(name, {})
    fields |= {} if name == "sft" else {"num_epochs": 2}
    config = {"sft": "sft_chat.py", "dpo": "dpo.py", "reward": "reward.py"}[name]
    return [f"--config={CONFIGS / config}", *(f"--config.{key}={value}" for key, value in fields.items())]


SCRIPTS = {
    "ppo": (train_ppo, PPOExperiment),
    "sft": (train_sft, SFTExperiment),
    "reward": (train_reward, RewardExperiment),
    "dpo": (train_dpo, DPOExperiment),
}


def keep_programs(monkeypatch, script) -> None:
    """All starts of a test share what the first compiles."""
    known, prepare = [], script.prepare

    def prepared(settings):
        setup = prepare(settings)
        known.append(setup.step)
        return setup._replace(step=known[0])

    monkeypatch.setattr(script, "prepare", prepared)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_that_trains_can_be_asked_to_end(world, tmp_path, capsys, monkeypatch, name):
    """Each start does one turn and is stopped by the clock: the same run, the same bits, no row of metrics more."""
    script, kind = SCRIPTS[name]
    keep_programs(monkeypatch, script)
    flags, whole, run = flags_of(world, name), tmp_path / "whole", tmp_path / "run"
    outcome = folders.call_script(script, kind, [*flags, f"--workdir={whole}"], capsys)
    assert (outcome.status, outcome.err) == (0, "")
    for start in range(1, 9):
        outcome = folders.call_script(script, kind, [*flags, "--config.max_hours=1e-9", f"--workdir={run}"], capsys)
        if outcome.status == 0:
            break
        assert outcome.status == STOPPED, outcome.err
        told = re.fullmatch(r"stopped: max_hours=1e-09; (\d+) of (\d+) \w+ are saved; .*\n", outcome.err)
        assert (int(told[1]), int(told[2]) >= start) == (start, True), outcome.err
    assert start > 3, "it was to be stopped some times"
    check_same(run, whole)


def check_same(run: Path, whole: Path) -> None:
    assert folders.without_time(run / "metrics.jsonl") == folders.without_time(whole / "metrics.jsonl")
    assert set(os.listdir(run)) == set(os.listdir(whole))
    for name in ("policy", "model"):
        assert folders.contents(run / name) == folders.contents(whole / name)
    assert (run / "results.json").read_text() == (whole / "results.json").read_text()


def test_no_signal_loses_an_iteration(world, tmp_path, capsys, monkeypatch, rng, times):
    """A SIGTERM at a random moment of the training, again and again: each start does at least one iteration more."""
    keep_programs(monkeypatch, train_ppo)
    total = 50 * times
    changes = (f"--config.num_iterations={total}", "--config.checkpoint_every=7", "--config.samples_every=1")
    whole, run = tmp_path / "whole", tmp_path / "run"

    def start(workdir):
        return folders.call_script(train_ppo, PPOExperiment, world.flags(*changes, f"--workdir={workdir}"), capsys)

    assert start(whole).status == 0
    rows = read_jsonl(whole / "metrics.jsonl")
    seconds, stops = sum(row["time/iteration_s"] for row in rows[5:]) / (total - 5), 0
    announce = train_ppo.announce

    def signalled(setup, reporter, done):
        announce(setup, reporter, done)
        wait = rng.random() * seconds  # from within the training on, where a signal ends nothing
        threading.Timer(wait, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(train_ppo, "announce", signalled)
    for _ in range(total + 1):
        before = len(read_jsonl(run / "metrics.jsonl")) if run.exists() else 0
        if before >= total - 3:  # the signal is not to come after the training
            monkeypatch.setattr(train_ppo, "announce", announce)
        outcome = start(run)
        if outcome.status == 0:
            break
        assert outcome.status == STOPPED, outcome.err
        done = len(read_jsonl(run / "metrics.jsonl"))
        assert f"stopped: SIGTERM; {done} of {total} iterations are saved" in outcome.err
        assert before < done
        assert max(int(name) for name in os.listdir(run / "checkpoints")) == done
        stops += 1
    assert stops >= 20 * times
    check_same(run, whole)
    assert folders.bits(folders.saved_state(run)) == folders.bits(folders.saved_state(whole))
    assert jax.device_count() == 8
