"""The script for control tasks: what it leaves, what it refuses, and environments on the host."""

import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from experiments import train_control
from experiments.configs import cartpole, pendulum, quadrants
from experiments.settings import ControlExperiment, from_config_dict
from ppo_jax.config import ControlConfig
from ppo_jax.envs.host import HostEnvironments
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl
from ppo_jax.runs import RunError

TINY = ControlConfig(num_envs=4, num_steps=16, num_epochs=2, width=8)
SHORT = ControlExperiment(env="quadrants", num_iterations=4, eval_every=2, eval_episodes=5, ppo=TINY)
needs_gymnasium = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium") is None, reason="gymnasium is not installed (pip install 'ppo_jax[control]')"
)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    ("env", "pictures"),
    [
        ("quadrants", {"choices.png", "maps.png"}),
        ("CartPole-v1", {"maps.png", "pole.gif"}),
        ("Pendulum-v1", {"maps.png"}),
    ],
)
def test_each_task_runs_and_leaves_its_pictures(env, pictures, tmp_path, capsys):
    settings, folder = dataclasses.replace(SHORT, env=env), tmp_path / "run"
    train_control.main(settings, folder)
    written = {path.name for path in folder.iterdir()}
    always = {"config.json", "metrics.jsonl", "curves.png", "results.json", "agents.safetensors", ".lock"}
    assert written == always | pictures
    rows = read_jsonl(folder / "metrics.jsonl")
    assert [row["env_steps"] for row in rows] == [0, 128, 256]
    assert all(math.isfinite(row["eval/return_mean"]) for row in rows)
    assert all(math.isfinite(row["policy/loss"]) for row in rows[1:])
    assert results(folder)["settings"][0]["returns"] == [pytest.approx(rows[-1]["eval/return_mean"])]
    for name in written:
        if name.endswith((".png", ".gif")):
            with Image.open(folder / name) as picture:
                assert min(picture.size) > 100
    shown = capsys.readouterr().out
    # The same command again shows what is there.
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    train_control.main(settings, folder)
    assert capsys.readouterr().out == shown
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="it holds another configuration"):
        train_control.main(dataclasses.replace(settings, seed=1), folder)


def test_a_sweep_over_seeds_and_settings(tmp_path, seed):
    sweep = "lr=1e-3,0.1 gamma=0.0,0.9"
    settings = dataclasses.replace(SHORT, sweep=sweep, num_seeds=3, seed=seed % 1000)
    assert list(settings.settings()) == [
        "lr=0.001 gamma=0", "lr=0.001 gamma=0.9", "lr=0.1 gamma=0", "lr=0.1 gamma=0.9"
    ]  # fmt: skip
    with jax.debug_key_reuse(False):  # it takes the transposed keys of a scan under vmap for a second use
        train_control.main(settings, tmp_path / "all")
    rows = read_jsonl(tmp_path / "all" / "metrics.jsonl")
    assert [row["setting"] for row in rows] == [name for name in settings.settings() for _ in range(3)]
    for row in rows:
        assert len(row["eval/returns"]) == 3
        assert row["eval/return_mean"] == pytest.approx(np.mean(row["eval/returns"]))
        spread = np.std(row["eval/returns"], ddof=1) / math.sqrt(3)
        assert row["eval/return_se"] == pytest.approx(spread, abs=1e-6)
    told = results(tmp_path / "all")
    assert told["agents"] == 12
    saved = load_file(tmp_path / "all" / "agents.safetensors")
    assert saved["action.kernel"].shape == (12, 8, 2)
    assert len(np.unique(saved["action.kernel"].round(6), axis=0)) == 12
    # The last setting alone, one agent of it: the same but for rounding, which has little time to grow.
    ppo = dataclasses.replace(TINY, lr=1e-3, gamma=0.9)
    alone = dataclasses.replace(settings, sweep="", num_seeds=1, seed=settings.seed + 2, ppo=ppo)
    train_control.main(alone, tmp_path / "alone")
    one = load_file(tmp_path / "alone" / "agents.safetensors")["action.kernel"][0]
    np.testing.assert_allclose(one, saved["action.kernel"][5], atol=2e-3)


def test_seed_and_plan_are_what_the_run_has(tmp_path):
    found = {}
    for name, changes in {
        "a": {},
        "seed": {"seed": 1},
        "more": {"num_iterations": 6},
        "often": {"eval_every": 1},
    }.items():
        train_control.main(dataclasses.replace(SHORT, **changes), tmp_path / name)
        found[name] = read_jsonl(tmp_path / name / "metrics.jsonl")
    steps = {name: [row["env_steps"] for row in rows] for name, rows in found.items()}
    assert steps == {"a": [0, 128, 256], "seed": [0, 128, 256], "more": [0, 128, 256, 384],
                     "often": [0, 64, 128, 192, 256]}  # fmt: skip
    assert found["a"][1]["policy/loss"] != found["seed"][1]["policy/loss"]


def test_a_gradient_that_is_not_finite_ends_the_run_in_words(tmp_path):
    settings = dataclasses.replace(SHORT, ppo=dataclasses.replace(TINY, lr=1e38))
    with pytest.raises(RunError, match=r"agent 0: got \d+ gradient steps that were not finite.*lower config.ppo.lr"):
        train_control.main(settings, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("config", [cartpole, pendulum, quadrants])
def test_shipped_settings_can_be_read(config):
    settings = from_config_dict(ControlExperiment, config.get_config())
    assert settings.env in config.__doc__


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"env": "Cartpole"}, "env: got 'Cartpole', expected one of CartPole-v1, Pendulum-v1, quadrants, or gym:NAME"),
        ({"env": "gym:"}, "env: got 'gym:'"),
        ({"num_iterations": 5}, r"num_iterations: got 5, expected a multiple of eval_every \(2\)"),
        ({"num_seeds": 0}, "num_seeds: got 0"),
        ({"sweep": "width=3,4"}, "sweep: got 'width', expected some of lr, gamma"),
        ({"sweep": "lr=1,x"}, "sweep: lr: got 'x', expected numbers"),
        ({"sweep": "lr=1,1"}, "sweep: lr: got '1,1', expected values that differ"),
        ({"sweep": "lr=1 lr=2"}, "sweep: got 'lr', expected each field once"),
        ({"sweep": "gamma=0.9,2"}, "gamma: got 2.0"),
        ({"env": "gym:CartPole-v1", "num_seeds": 2}, "num_seeds: got 2, expected 1 with an environment on the host"),
        ({"env": "gym:CartPole-v1", "sweep": "lr=1,2"}, "sweep: got 'lr=1,2', expected nothing"),
    ],
)
def test_settings_that_cannot_be(fields, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(SHORT, **fields)


# On the host


@needs_gymnasium
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_an_environment_of_gymnasium_is_trained_in(name, tmp_path):
    ppo = dataclasses.replace(TINY, num_steps=128 if name == "CartPole-v1" else 16)
    settings = dataclasses.replace(SHORT, env=f"gym:{name}", ppo=ppo, eval_greedy=name == "CartPole-v1")
    train_control.main(settings, tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3
    assert all(row["policy/first_ratio_dev"] < 1e-5 for row in rows[1:])
    low, high = (8, 500) if name == "CartPole-v1" else (-2000, 0)
    assert all(low <= row["eval/return_mean"] <= high for row in rows)
    if name == "CartPole-v1":
        assert all(8 <= row["episode/return_mean"] == row["episode/length_mean"] <= 500 for row in rows[1:])
    first = load_file(tmp_path / "run" / "agents.safetensors")
    train_control.main(settings, tmp_path / "again")
    again = load_file(tmp_path / "again" / "agents.safetensors")
    assert all(np.array_equal(first[key], again[key]) for key in first)


@needs_gymnasium
def test_what_was_reached_is_told_before_the_reset(rng):
    envs = HostEnvironments("CartPole-v1", 3, 0)
    ends = 0
    for _ in range(200):
        before = envs.observations
        rewards, terminated, truncated, reached = envs.step(rng.integers(0, 2, 3).astype(np.int32))
        done = terminated | truncated
        ends += done.sum()
        assert np.all(rewards == 1)
        np.testing.assert_array_equal(envs.observations[~done], reached[~done])
        assert np.all(np.abs(envs.observations[done]) <= 0.05)
        # x moves by its speed, in the last step as well: 0.02 s of it.
        np.testing.assert_allclose(reached[:, 0], before[:, 0] + 0.02 * before[:, 1], atol=1e-6)
        beyond = (np.abs(reached[:, 0]) > 2.4) | (np.abs(reached[:, 2]) > 12 * math.pi / 180)
        np.testing.assert_array_equal(beyond, terminated)
    assert ends > 3
    envs.close()


@needs_gymnasium
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NoSuchTask-v1", "env: gym:NoSuchTask-v1: "),
        ("FrozenLake-v1", "env: gym:FrozenLake-v1: observations: got Discrete"),
    ],
)
def test_environments_that_cannot_be_used(name, told):
    with pytest.raises(InputError, match=told):
        HostEnvironments(name, 2, 0)
