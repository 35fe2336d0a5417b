"""The benchmark: sides in processes of their own, measured in turn; ratios; what is missing or fails is told."""

import dataclasses
import functools
import json
import types

import folders
import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import control, decode, iteration, memory, starting, update
from experiments.benchmarks.models import SHAPES, random_params, weights
from experiments.benchmarks.sides import Comparison, Limits, Side, SideError, compare, in_turn
from experiments.methods import bind_control
from experiments.settings import BenchmarkExperiment
from ppo_jax import hub
from ppo_jax.config import ControlConfig
from ppo_jax.control import architecture
from ppo_jax.envs import ENVIRONMENTS
from ppo_jax.metrics import read_jsonl
from ppo_jax.models import Decoder, ModelConfig
from ppo_jax.models.control import init_networks

CONFIG = folders.ROOT / "experiments" / "configs" / "benchmark.py"
SIDES = '''
import os

def told(values, log):
    """Gives these values in turn, and notes in a file that it did; prints, as libraries do."""
    left = iter(values)
    def measure():
        value = next(left)
        with open(log, "a") as file:
            print(os.getpid(), value, file=file)
        print("a library says this on the standard output")
        return {"value": value, "more": value + 1}
    return measure

def broken(when):
    if when == "preparing":
        raise ValueError("no such thing")
    def measure():
        if when == "exiting":
            os._exit(3)
        raise RuntimeError("it broke\\n")
    return measure
'''


@pytest.fixture(autouse=True)
def sides(tmp_path, monkeypatch):
    """A module of sides, found by the processes."""
    (tmp_path / "these_sides.py").write_text(SIDES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def told(tmp_path):
    """Makes a side that gives these values."""

    def make(*values, packages=("jax",), warm_up=False):
        given = {"values": values, "log": str(tmp_path / "log")}
        return Side("these_sides:told", given, packages, warm_up=warm_up)

    return make


def row(ours, peer, **fields):
    given = {"work": "work", "shape": "shape", "batch": 3, "unit": "steps/s", "lower_is_better": False}
    return Comparison(**(given | {"ours": ours, "peer": peer} | fields))


def broken(when):
    return Side("these_sides:broken", {"when": when}, ("jax",), warm_up=False)


def test_sides_are_measured_in_turn_each_in_one_process(told, tmp_path):
    seen = in_turn({"ours": told(1, 2, 3, 4, warm_up=True), "peer": told(10, 20, 30)}, 3)
    assert [one["value"] for one in seen["ours"]] == [2, 3, 4]  # the first was the warm-up
    assert [one["value"] for one in seen["peer"]] == [10, 20, 30]
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [int(value) for _, value in lines] == [1, 2, 10, 3, 20, 4, 30]
    assert len({process for process, _ in lines}) == 2


def test_the_ratio_is_of_rounds_and_says_how_many_times_better(told):
    # Of the rounds: 8/2 = 4, 9/9 = 1, 30/10 = 3; their median is not the ratio of the medians, 9/9.
    faster = compare(row(told(8, 9, 30), told(2, 9, 10)), 3)
    assert (faster["ours"], faster["peer"]) == (9, 9)
    assert (faster["ratio"], faster["ratio_min"], faster["ratio_max"]) == (3, 1, 4)
    assert faster["details"] == {"ours": {"more": 31}, "peer": {"more": 11}}
    assert faster["rounds"] == 3
    assert faster["versions"]["jax"]
    # Seconds: 2/8, 9/9, 10/30.
    slower = compare(row(told(8, 9, 30), told(2, 9, 10), lower_is_better=True), 3)
    assert slower["ratio"] == pytest.approx(1 / 3)
    assert (slower["ratio_min"], slower["ratio_max"]) == (0.25, 1)


def test_the_limit_is_what_the_machine_could_do(told):
    limits = Limits({"float32": 4000.0, "bfloat16": 8000.0}, bandwidth=100.0)

    def fraction(**fields):
        return compare(row(told(20), told(1), **fields), 1, limits)["fraction_of_limit"]

    assert fraction(flops=50.0) == 50 * 20 / 4000
    assert fraction(flops=50.0, dtype="bfloat16") == 50 * 20 / 8000
    assert fraction(flops=50.0, traffic=2.0) == 2 * 20 / 100  # the slower of the two
    assert fraction(flops=50.0, lower_is_better=True) == 50 / 4000 / 20  # seconds
    assert fraction() is None


def test_a_row_may_have_no_peer(told):
    found = compare(row(told(7), None), 1)
    assert (found["ours"], found["peer"], found["ratio"], found["note"]) == (7, None, None, None)


def test_without_a_peer_there_is_our_figure_and_the_reason(told):
    found = compare(row(told(7), told(1, packages=("jax", "no-such-package"))), 1)
    assert (found["ours"], found["peer"], found["ratio"]) == (7, None, None)
    assert found["note"] == 'no-such-package not installed: pip install -e ".[bench]"'


@pytest.mark.parametrize(
    ("when", "words"),
    {
        "preparing": "ValueError: no such thing",
        "measuring": "RuntimeError: it broke",
        "exiting": "it ended with exit status 3",
    }.items(),
)
def test_a_side_that_fails_is_told_by_its_last_words(when, words, told):
    with pytest.raises(SideError) as caught:
        compare(row(told(1), broken(when)), 1)
    assert str(caught.value) == f"peer: {words}"
    with pytest.raises(SideError, match=f"^ours: {words}$"):
        compare(row(broken(when), told(1)), 1)


def test_rows_are_measured_written_and_not_measured_again(told, tmp_path, monkeypatch, capsys):
    rows = [
        row(told(6, 6), told(3, 3), shape="fast", flops=1.0),
        row(told(1, 1), broken("measuring"), shape="broken"),
        row(told(5, 5), told(5, 5), shape="even"),
    ]
    monkeypatch.setitem(benchmark.WORKS, "control", lambda: rows)
    limits = {"float32": told(100.0), "bfloat16": told(200.0), "bandwidth": told(10.0)}
    monkeypatch.setattr(benchmark, "LIMITS", limits)
    workdir = tmp_path / "run"

    def call(*more):
        arguments = [f"--config={CONFIG}:control", f"--workdir={workdir}", "--config.rounds=2", *more]
        return folders.call_script(benchmark, BenchmarkExperiment, arguments, capsys)

    first = call("--config.only=^work; (fast|broken);")
    assert first.error() == "error: could not be measured: work; broken; 3; float32; peer: RuntimeError: it broke"
    assert "fast" in first.out
    (fast,) = read_jsonl(workdir / "benchmark.jsonl")
    assert (fast["ours"], fast["ratio"], fast["rounds"], fast["fraction_of_limit"]) == (6, 2, 2, 0.06)

    measured = len((tmp_path / "log").read_text().splitlines())
    second = call("--config.only=fast|even")
    assert second.status == 0, second.err
    assert [one["shape"] for one in read_jsonl(workdir / "benchmark.jsonl")] == ["fast", "even"]
    more = len((tmp_path / "log").read_text().splitlines()) - measured
    assert more == 7  # the machine's three limits, and two rounds of one row
    (line,) = [line for line in second.out.splitlines() if line.startswith("2/2 ")]
    assert json.loads(line.removeprefix("2/2 "))["shape"] == "even"

    assert "config.only: got 'nothing', which no row of control contains" in call("--config.only=nothing").error()
    assert "rounds" in call("--config.rounds=3").error()  # another benchmark
    works = "decode, update, iteration, memory, compile, control"
    assert f"work: got 'weather', expected one of {works}" in call("--config.work=weather").error()
    assert "only: got '(', expected a regular expression" in call("--config.only=(").error()
    assert "--dry_run: a benchmark has none" in call("--dry_run").error()


def test_the_rows_of_control_count_what_they_do():
    names = [benchmark.name_of(one._asdict()) for one in control.comparisons()]
    assert len(set(names)) == len(names)
    env = ENVIRONMENTS[control.ENV]
    for settings in control.SETTINGS.values():
        config = ControlConfig(**settings)
        bind_control(config)
        net = architecture(env, config)
        shapes = jax.eval_shape(functools.partial(init_networks, net=net), jax.random.key(0))
        weights = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim == 2)
        assert control.flops(config) == weights * (2 + 6 * config.num_epochs)


def test_our_side_counts_the_steps_of_all_agents_and_shows_what_was_learned(monkeypatch):
    tiny = {"num_envs": 2, "num_steps": 4, "num_epochs": 1, "width": 4}
    monkeypatch.setitem(control.SETTINGS, "tiny", tiny)
    clock = iter(range(100))  # a second at each look
    monkeypatch.setattr(control, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    rate = control.ours("tiny", 160, agents=3, seconds=False, seed=0, warm=True)()
    assert rate == {"value": 3 * 160 / 2}  # looks: before, after compiling, at the end
    run = control.ours("tiny", 160, agents=1, seconds=True, seed=0, warm=False)()
    assert (run["value"], run["compile_s"]) == (2, 1)
    assert 5 < run["return"] <= 500


def test_the_first_evaluation_that_is_solved():
    ten = [10.0] * 4 + [480.0, 100.0, 475.0, 475.0, 475.0, 470.0]
    assert control._learned(ten, 1000) == {"return": 470.0, "solved_after_steps": 500}
    assert control._learned([20.0, *ten], 1000) == {"return": 470.0, "solved_after_steps": 500}  # one before the start
    assert control._learned([474.9] * 10, 1000) == {"return": 474.9, "solved_after_steps": None}


def test_the_machine_is_measured():
    limits = benchmark.measure_limits()
    assert all(1e8 < flops < 1e16 for flops in limits.flops.values())
    assert 1e8 < limits.bandwidth < 1e14


def test_rows_have_names_of_their_own():
    for comparisons in benchmark.WORKS.values():
        names = [benchmark.name_of(one._asdict()) for one in comparisons()]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weights_that_a_token_is_multiplied_by_are_counted(shape):
    config = SHAPES[shape]
    params = jax.eval_shape(functools.partial(random_params, Decoder(config)))
    layers = {name: part for name, part in params.items() if name.startswith("layer_")}
    matrices = sum(x.size for x in jax.tree.leaves(layers) if x.ndim == 2)
    assert weights(config) == (matrices, params["embed"]["embedding"].size)


@pytest.fixture
def small(monkeypatch):
    """A shape that runs in no time."""
    tiny = ModelConfig(vocab_size=300, num_layers=1, num_heads=2, width=8, mlp_width=16, max_positions=128)
    monkeypatch.setitem(SHAPES, "small", tiny)


def test_our_sides_of_decode_and_update_count_tokens(small, monkeypatch):
    monkeypatch.setattr(decode, "seconds", lambda work: work() and 2.0)
    monkeypatch.setattr(update, "seconds", lambda work: work() or 2.0)
    assert decode.ours("small", 3, "float32")() == {"value": 3 * 64 / 2, "step_ms": 2000 / 64}
    assert update.ours("small", "bfloat16")() == {"value": 8 * 96 / 2}


def test_our_iteration_tells_seconds_and_memory(small):
    with jax.debug_key_reuse(False):
        work = iteration.Work("small", batch=16, response=4, critic="separate", vocabulary=310)
        given = dataclasses.asdict(work)
        told = iteration.ours(measured="iteration_s", **given)()
        assert told["value"] == told["iteration_s"] > 0
        assert told["peak_gb"] > 0.05
        assert told["predicted_gb"] > 0
        assert iteration.ours(measured="peak_gb", **given)()["value"] > 0.05
        assert starting.compiling(**given)()["value"] > 0
    assert iteration.flops(work) > iteration.flops(dataclasses.replace(work, critic="shared"))


def test_the_peak_of_memory_is_that_of_the_block():
    before = memory.resident_bytes()
    with memory.peak_bytes() as peak:
        np.ones(2**25)  # 256 MB, and gone again
    assert before + 2**27 < peak() < before + 2**29
    with memory.peak_bytes() as peak:
        pass
    assert peak() < before + 2**27


def test_what_a_start_reads_is_a_model_and_its_prompts(tmp_path, small, monkeypatch):
    monkeypatch.setattr(starting, "SHAPE", "small")
    given = starting.write_inputs(tmp_path)
    assert hub.load_config(given["model"]).vocab_size == 300
    assert len(read_jsonl(tmp_path / "prompts.jsonl")) == 256
