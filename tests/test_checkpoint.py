"""Train states on disk: every bit comes back, what does not fit is named, a kill leaves a state to go on from."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import folders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import random_rollout, running

from ppo_jax.checkpoint import Checkpointer, CheckpointError, free
from ppo_jax.errors import InputError
from ppo_jax.optim import make_optimizer
from ppo_jax.sharding import make_mesh, make_shardings
from ppo_jax.types import TrainState

TX = make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.1)


def make_state(seed: int, step: int = 3, dtype=jnp.float32, config=None, impl: str | None = None, full=False):
    """A state of a tiny actor-critic with random numbers everywhere, also in the optimizer, also odd ones; a full one
    has a moving average and rollouts that wait.
    """
    config = config or folders.llama_config(32)
    head = {"kernel": np.zeros((config.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    params = jax.tree.map(
        lambda x: jnp.asarray(x, dtype), {"decoder": folders.random_params(config), "value_head": head}
    )
    rng = np.random.default_rng(seed)

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 1000, x.shape), x.dtype)
        values = rng.normal(0, 1, x.shape) * 10.0 ** rng.integers(-30, 30, x.shape)
        flat = values.reshape(-1)
        flat[: min(4, flat.size)] = [-0.0, 1e-40, float(jnp.finfo(x.dtype).max), -1e-3][: flat.size]
        return jnp.asarray(values, x.dtype)

    with np.errstate(over="ignore", under="ignore"):
        params, opt_state = jax.tree.map(fill, (params, TX.init(params)))
    carried = running(0.05 + seed / 1e9, baseline=rng.normal(), score_mean=1e-40, score_count=1e6)
    rest = {}
    if full:
        rollouts = [random_rollout(rng, (1, 3), (2, 0), 3, 4) for _ in range(2)]
        rest = {"ema_params": jax.tree.map(lambda x: fill(x.astype(jnp.float32)), params["decoder"]),
                "pending": tuple(rollouts)}  # fmt: skip
    return TrainState(jnp.int32(step), params, opt_state, jax.random.key(seed, impl=impl), carried, **rest)


@pytest.fixture(params=["cpu", "gpu"])  # a save in the foreground, and one in the background
def open_folder(tmp_path, request, monkeypatch):
    """Opens the checkpoints of the test, and closes them again: at its end, or before they are opened once more."""
    opened = []
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)

    def close() -> None:
        while opened:
            opened.pop().close()

    def open_it(**options) -> Checkpointer:
        close()
        opened.append(Checkpointer(tmp_path / "checkpoints", **options))
        return opened[-1]

    yield open_it
    close()


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_bit_comes_back(open_folder, seed, dtype, full):
    state = make_state(seed, dtype=dtype, full=full)
    open_folder().save(state)
    # By another object, as in another process.
    restored = open_folder().restore(make_state(seed + 1, dtype=dtype, full=full))
    assert folders.bits(restored) == folders.bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    np.testing.assert_array_equal(jax.random.uniform(jax.random.fold_in(restored.key, 1), (3,)),
                                  jax.random.uniform(jax.random.fold_in(state.key, 1), (3,)))  # fmt: skip


def test_a_restored_state_is_fit_for_a_compiled_step(open_folder):
    """Donated, and without a second trace: the tree, the dtypes and the weak types are those of a fresh state."""
    traces = []

    def step(state: TrainState) -> TrainState:
        traces.append(1)
        return state.replace(step=state.step + 1, params=jax.tree.map(lambda x: x * 0.5, state.params))

    compiled = jax.jit(step, donate_argnums=0)
    open_folder().save(make_state(1))
    compiled(make_state(1))
    compiled(open_folder().restore(make_state(2)))
    assert len(traces) == 1


def test_the_newest_few_stay(open_folder, tmp_path):
    checkpoints = open_folder(max_to_keep=2)
    assert checkpoints.latest_step() is None
    states = {step: make_state(step, step) for step in (2, 4, 6, 10)}
    for step, state in states.items():
        checkpoints.save(state)
        assert checkpoints.latest_step() == step
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [6, 10]
    again = open_folder(max_to_keep=2)
    assert again.latest_step() == 10
    assert folders.bits(again.restore(states[2])) == folders.bits(states[10])


def test_one_can_be_enough_and_more_can_be_kept(open_folder, tmp_path):
    checkpoints = open_folder(max_to_keep=1)
    for step in (1, 2):
        checkpoints.save(make_state(1, step))
    assert checkpoints.latest_step() == 2
    assert os.listdir(tmp_path / "checkpoints") == ["2"]
    checkpoints = open_folder(max_to_keep=3)  # a restart may change it
    for step in (3, 4, 5):
        checkpoints.save(make_state(1, step))
    assert checkpoints.latest_step() == 5
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4", "5"]


def test_a_saved_state_may_be_donated_at_once(open_folder, seed):
    """What is written in the background is the state as it was."""
    state = make_state(seed)
    before = folders.bits(state)
    checkpoints = open_folder()
    checkpoints.save(state)
    jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)(state)
    assert folders.bits(checkpoints.restore(make_state(seed + 1))) == before


def test_an_older_state_can_be_asked_for(open_folder):
    checkpoints, states = open_folder(max_to_keep=3), {step: make_state(step, step) for step in (2, 4, 6)}
    for state in states.values():
        checkpoints.save(state)
    for before, step in ((7, 6), (6, 4), (5, 4), (3, 2)):
        assert folders.bits(checkpoints.restore(make_state(9), before=before)) == folders.bits(states[step])
    with pytest.raises(CheckpointError, match="nothing is saved in"):
        checkpoints.restore(make_state(9), before=2)


def test_the_memory_of_a_replaced_state_is_given_back():
    state = make_state(1, full=True)
    free(state)
    large = (state.params, state.opt_state, state.ema_params, state.pending)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(large))


def test_a_step_that_is_there_is_left_as_it_is(open_folder):
    checkpoints, first, second = open_folder(), make_state(1, step=5), make_state(2, step=5)
    checkpoints.save(first)
    checkpoints.save(second)
    assert folders.bits(checkpoints.restore(second)) == folders.bits(first)


def test_nothing_to_restore_is_told(open_folder, tmp_path):
    with pytest.raises(CheckpointError, match=f"nothing is saved in {tmp_path}") as error:
        open_folder().restore(make_state(1))
    assert isinstance(error.value, InputError)


def change(state: TrainState, part: str, function) -> TrainState:
    """The state with one of its parameters exchanged."""
    attention = state.params["decoder"]["layer_0"]["attention"]
    attention = {k: v for k, v in (attention | {part: function(attention.get(part))}).items() if v is not None}
    layer = state.params["decoder"]["layer_0"] | {"attention": attention}
    return state.replace(params=state.params | {"decoder": state.params["decoder"] | {"layer_0": layer}})


QUERY = "params/decoder/layer_0/attention/query/kernel"


def kernel(function):
    """A change of the query's kernel."""
    return lambda state: change(state, "query", lambda layer: {"kernel": function(layer["kernel"])})


MISFITS = {
    "shape": (kernel(lambda x: x[:, :8]), rf"{QUERY}: got float32\[16, 16\], expected float32\[16, 8\]"),
    "same size": (kernel(lambda x: x.reshape(8, 32)), rf"{QUERY}: got float32\[16, 16\], expected float32\[8, 32\]"),
    "dtype": (kernel(lambda x: x.astype(jnp.bfloat16)), rf"{QUERY}: got float32\[16, 16\], expected bfloat16"),
    "left over": (lambda s: change(s, "query", lambda _: None), rf"{QUERY}: got float32\[16, 16\], expected nothing"),
    "missing": (
        lambda s: change(s, "lora", lambda _: {"kernel": jnp.zeros((2, 3))}),
        r"params/decoder/layer_0/attention/lora/kernel: got nothing, expected float32\[2, 3\]",
    ),
    "scalar": (
        lambda s: s.replace(running=s.running.replace(kl_coef=jnp.zeros(2))),
        r"running/kl_coef: got float32\[\], expected float32\[2\]",
    ),
    "average": (lambda s: s.replace(ema_params=s.params["decoder"]), "ema_params/.*: got nothing, expected float32"),
    "queue": (
        lambda s: s.replace(pending=(random_rollout(np.random.default_rng(0), (1,), (2,), 3, 4),)),
        r"pending/0/\w+: got nothing, expected \w+\[1, ",
    ),
    "step": (lambda s: s.replace(step=jnp.float32(3)), r"step: got int32\[\], expected float32\[\]"),
    "optimizer": (
        lambda s: s.replace(opt_state=optax.sgd(1.0).init(s.params)),
        r"opt_state/.*: got .*, expected nothing",
    ),
    "key": (lambda s: s.replace(key=jax.random.key(0, impl="rbg")), r"key_data: got uint32\[2\], expected uint32\[4\]"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(open_folder, name):
    like, told = MISFITS[name]
    state = make_state(1)
    open_folder().save(state)
    with pytest.raises(CheckpointError, match=told) as error:
        open_folder().restore(like(make_state(2)))
    assert "\n" not in str(error.value)
    assert f"{os.sep}3: " in str(error.value)  # the folder with the step


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_a_state_moves_to_another_mesh(open_folder, seed, sizes):
    config = folders.llama_config(32, num_heads=4)
    state = make_state(seed, config=config)
    state = jax.device_put(state, make_shardings(make_mesh(1, 1, 1), state).state)
    open_folder().save(state)
    like = make_state(seed + 1, config=config)
    like = jax.device_put(like, make_shardings(make_mesh(*sizes), like).state)
    restored = open_folder().restore(like)
    assert folders.bits(restored) == folders.bits(state)
    for old, new in zip(jax.tree.leaves(like), jax.tree.leaves(restored), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        assert new.sharding.device_set == old.sharding.device_set
    kernel = restored.params["decoder"]["layer_0"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    # And back again, from eight devices to one.
    open_folder().save(restored.replace(step=restored.step + 1))
    back = open_folder().restore(
        jax.device_put(make_state(1, config=config), make_shardings(make_mesh(1, 1, 1), state).state)
    )
    assert folders.bits(back.replace(step=state.step)) == folders.bits(state)


SAVER = """
import itertools, sys
import jax, jax.numpy as jnp
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.types import Running, TrainState

jax.config.update("jax_platforms", "cpu")
# Many arrays, so that a save takes long enough to be hit in its middle.
def state(step):
    params = {f"p{i}": jnp.full((64, 64), step, jnp.float32) for i in range(40)}
    zero = jnp.float32(0)
    running = Running(jnp.float32(step), zero, zero, zero, zero, jnp.int32(0))
    return TrainState(jnp.int32(step), params, {"mu": params}, jax.random.key(step), running)

checkpoints = Checkpointer(sys.argv[1], max_to_keep=2)
first = (checkpoints.latest_step() or 0) + 1
print("ready", flush=True)
for step in itertools.count(first):
    checkpoints.save(state(step))
    print(step, flush=True)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_an_older_state(tmp_path, rng):
    """SIGKILL at random moments of a process that does nothing but save; what it reported as saved is there, whole."""
    folder = tmp_path / "checkpoints"
    durable = 0
    for attempt in range(4):
        with open(tmp_path / "out", "w+") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", SAVER, str(folder)],
                cwd=Path(__file__).parents[1],
                stdout=out,
                stderr=subprocess.PIPE,
            )
            wanted = 3 + attempt
            wait_for(lambda wanted=wanted: len((tmp_path / "out").read_text().splitlines()) >= wanted, process)
            # Hit the writing of a step, its renaming, or the removal of an old one.
            if attempt % 2:
                wait_for(lambda: any("tmp" in name for name in os.listdir(folder)), process)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stderr.close()
        steps = [int(line) for line in (tmp_path / "out").read_text().split() if line.isdigit()]
        durable = max([durable, *steps])
        checkpoints = Checkpointer(folder, max_to_keep=2)
        latest = checkpoints.latest_step()
        # The last report may have been lost on its way, hence one more.
        assert latest in (durable, durable + 1)
        params = {f"p{i}": jnp.zeros((64, 64)) for i in range(40)}
        like = TrainState(jnp.int32(0), params, {"mu": params}, jax.random.key(0), running(0))
        restored = checkpoints.restore(like)
        assert int(restored.step) == latest
        for leaf in (*jax.tree.leaves(restored.params), *jax.tree.leaves(restored.opt_state), restored.running.kl_coef):
            np.testing.assert_array_equal(leaf, np.float32(latest))
        # What the interrupted save left is gone, and one can go on.
        assert not [name for name in os.listdir(folder) if "tmp" in name]
        checkpoints.save(restored.replace(step=restored.step))
        checkpoints.close()
        durable = latest


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(random.random() * 2e-3)
