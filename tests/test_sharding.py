"""Where arrays live: the table of rules, the mesh, and a training that does not notice on how many devices it runs."""

import dataclasses
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import (
    MODELS,
    assert_consumed,
    make_bench,
    random_params,
    random_rollout,
    random_texts,
    running,
    shapes,
    token_set_score,
)

from experiments.methods import resolve
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError
from ppo_jax.models import ActorCritic, LoRAConfig, init_adapter, overlay
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.ppo import init_state
from ppo_jax.sharding import RULES, by_minibatch, make_mesh, make_shardings, param_shardings
from ppo_jax.types import TrainState

pytestmark = pytest.mark.usefixtures("empty_caches")

# A vocabulary that an axis of two divides, so that every matrix is cut.
GPT2, LLAMA = (dataclasses.replace(MODELS[name], num_layers=1, vocab_size=40) for name in ("gpt2", "llama"))
UNTIED = dataclasses.replace(LLAMA, tie_embeddings=False, attention_bias=True, mlp_bias=True)
EXPERTS = dataclasses.replace(LLAMA, num_experts=3, experts_per_token=2)
STYLES = {"gpt2": GPT2, "llama": LLAMA, "untied": UNTIED, "experts": EXPERTS}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 2, 2)


def named(tree) -> dict[str, object]:
    """Leaves by path, with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def everything(config) -> dict[str, object]:
    """Shapes of an actor-critic's parameters, and of an adapter on each of its projections."""
    params = shapes(config)
    make = partial(init_adapter, config=LoRAConfig(dora=True))
    adapter = jax.eval_shape(make, params["decoder"], key=jax.random.key(0))
    return params | {"decoder": overlay(params["decoder"], adapter)}


# The table.


@pytest.mark.parametrize("style", STYLES)
def test_every_parameter_has_a_rule(style, mesh):
    params = everything(STYLES[style])
    placed = param_shardings(mesh, params)
    chex.assert_trees_all_equal_structs(placed, params)
    cut = {name.rsplit("/", 1)[-1] for name, x in named(placed).items() if any(x.spec)}
    assert {"embedding", "kernel", "lora_a", "lora_b", "lora_magnitude"} <= cut


@pytest.mark.parametrize("name", [name for pattern, _ in RULES for name in [pattern]])
def test_every_rule_matches_a_parameter(name):
    names = {path for style in STYLES.values() for path in named(everything(style))}
    assert any(re.search(name, path) for path in names)


def test_parameters_are_cut_as_the_table_says(mesh):
    expected = {
        "decoder/embed/embedding": (("tensor", "fsdp"), (20, 8)),  # [40, 16]
        "decoder/layer_0/attention/query/kernel": (("fsdp", "tensor"), (8, 8)),  # [16, 4 x 4]
        "decoder/layer_0/attention/key/kernel": (("fsdp", "tensor"), (8, 4)),  # [16, 2 x 4]
        "decoder/layer_0/attention/value/bias": (("tensor",), (4,)),  # [2 x 4]
        "decoder/layer_0/attention/output/kernel": (("tensor", "fsdp"), (8, 8)),  # [4 x 4, 16]
        "decoder/layer_0/mlp/gate/kernel": (("fsdp", "tensor"), (8, 12)),  # [16, 24]
        "decoder/layer_0/mlp/up/bias": (("tensor",), (12,)),  # [24]
        "decoder/layer_0/mlp/down/kernel": (("tensor", "fsdp"), (12, 8)),  # [24, 16]
        "decoder/layer_0/mlp/down/bias": ((), (16,)),
        "decoder/lm_head/kernel": (("fsdp", "tensor"), (8, 20)),  # [16, 40]
        "decoder/final_norm/scale": ((), (16,)),
        "value_head/kernel": ((), (16, 1)),
    }
    params = random_params(np.random.default_rng(0), UNTIED)
    placed = named(jax.device_put(params, param_shardings(mesh, params)))
    for name, (spec, shard) in expected.items():
        assert tuple(axis for axis in placed[name].sharding.spec if axis) == spec, name
        assert {piece.data.shape for piece in placed[name].addressable_shards} == {shard}, name
        assert len(placed[name].addressable_shards) == 8


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole():
    mesh = make_mesh(1, 2, 4)
    params = {"embed": {"embedding": jax.ShapeDtypeStruct((37, 6), "float32")}}
    assert param_shardings(mesh, params)["embed"]["embedding"].spec == PartitionSpec(None, "fsdp")
    params = {"query": {"kernel": jax.ShapeDtypeStruct((5, 8), "float32")}}
    assert param_shardings(mesh, params)["query"]["kernel"].spec == PartitionSpec(None, "tensor")


def test_an_unknown_parameter_is_an_error_that_names_it(mesh):
    params = {"decoder": {"rooter": {"kernel": jnp.zeros((4, 4))}}}
    with pytest.raises(ValueError, match=r"no rule for parameter decoder/rooter/kernel of shape \(4, 4\)"):
        param_shardings(mesh, params)


def test_moments_live_where_their_parameters_live(mesh):
    tx = make_optimizer(make_schedule(1e-3, "constant", 0, 9))
    model, params = ActorCritic(UNTIED), random_params(np.random.default_rng(0), UNTIED)
    state = init_state(params["decoder"], model, tx, resolve(PPOConfig(ema_decay=0.5)), jax.random.key(0))
    shardings = make_shardings(mesh, state)
    placed = named(shardings.state.opt_state)
    for name, sharding in named(shardings.state.params).items():
        moments = [x for path, x in placed.items() if path.endswith("/" + name)]
        assert len(moments) == 2, name
        assert all(x == sharding for x in moments), name
    assert shardings.ref_params == shardings.state.params["decoder"]
    # So does their moving average.
    assert shardings.state.ema_params == shardings.state.params["decoder"]
    for scalar in (shardings.state.step, shardings.state.key, shardings.state.running.kl_coef, shardings.replicated):
        assert scalar.spec == PartitionSpec()
    assert shardings.batch.spec == PartitionSpec(("data", "fsdp"))


def test_a_state_of_decoder_parameters_alone_has_shardings_too(mesh):
    params = shapes(LLAMA)["decoder"]
    scalar = jax.ShapeDtypeStruct((), "float32")
    shardings = make_shardings(mesh, TrainState(scalar, params, (), scalar, running()))
    assert shardings.ref_params == shardings.state.params


def test_rollouts_that_wait_are_cut_like_batches_and_a_reference_by_its_own_parameters(mesh):
    base, scalar = shapes(LLAMA)["decoder"], jax.ShapeDtypeStruct((), "float32")
    waits = random_rollout(np.random.default_rng(0), (1,) * 8, (2,) * 8, 3, 4)
    adapter = jax.eval_shape(partial(init_adapter, config=LoRAConfig()), base, key=jax.random.key(0))
    state = TrainState(scalar, {"decoder": adapter}, (), scalar, running(), pending=(waits, waits))
    shardings = make_shardings(mesh, state, judge_params={"embed": base["embed"]}, ref_params=base)
    assert all(x.spec == PartitionSpec(("data", "fsdp")) for x in jax.tree.leaves(shardings.state.pending))
    chex.assert_trees_all_equal_structs(shardings.ref_params, base)
    chex.assert_trees_all_equal_structs(shardings.state.params["decoder"], adapter)
    assert shardings.judge_params["embed"] == shardings.ref_params["embed"]
    placed = jax.device_put(waits, shardings.state.pending[0])
    assert {piece.data.shape for piece in placed.tokens.addressable_shards} == {(2, 7)}  # 8 rows over data x fsdp


# The mesh.


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((), (1, 1, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 2), (2, 2, 2)), ((-1,), (8, 1, 1)), ((1, 1, 3), (1, 1, 3))],
)
def test_mesh_sizes(sizes, expected):
    assert tuple(make_mesh(*sizes).shape[axis] for axis in ("data", "fsdp", "tensor")) == expected


@pytest.mark.parametrize(
    "sizes", [(9, 1, 1), (2, 2, 3), (-1, 3, 4), (0, 1, 1), (2, 0, 1), (-2, 1, 1), (-1, 0, 1), (-1, 3, 1)]
)
def test_a_mesh_that_cannot_be_is_refused(sizes):
    with pytest.raises(InputError, match=r"^mesh: got data x fsdp x tensor = .*, expected at most 8 devices"):
        make_mesh(*sizes)


# Training.

CONFIG = PPOConfig(
    batch_size=8,
    prompt_length=4,
    response_length=6,
    num_epochs=2,
    num_minibatches=2,
    lr=1e-2,
    kl_coef=0.1,
    adam_eps=1e-3,  # makes a step a smooth function of the gradient
)


# Parts of minibatches, groups, adapters, rollouts that wait, and texts: everything that adds an axis or a sum.
MANY = dataclasses.replace(
    CONFIG,
    batch_size=16,
    advantage="rloo",
    responses_per_prompt=2,
    whiten_advantages="minibatch",
    accumulation=2,
    noise_scale=True,
    kl_in="loss",
    kl_estimator="exact",
    stale_iterations=1,
    importance="truncate",
    ptx_coef=0.3,
    ema_decay=0.5,
)


def train(mesh, config=CONFIG, iterations: int = 2, texts=None, trained=lambda decoder: decoder, model=LLAMA):
    """(bench, state, one entry of (metrics, experience, scores) an iteration)."""
    traced = []

    def score(rollout):
        traced.append(rollout.tokens.shape)
        return token_set_score(rollout)

    rng = np.random.default_rng(3)
    bench = make_bench(
        random_params(rng, model), model, config, eos_ids=range(1, 7), mesh=mesh, score=score, trained=trained
    )
    # The sums of a device alone are far from those of all: half of the rows have prompts of one token.
    prompts = [bench.prompts(rng, sizes=(4, 4, 4, 4, 1, 1, 1, 1)) for _ in range(iterations)]
    state, reference, history = bench.state(), bench.reference(), []
    for i, batch in enumerate(prompts):
        before = state
        state, *results = bench.step.iterate(state, reference, batch, (), texts)
        assert_consumed(before)
        history.append(results)
        # Later JAX remembers a second way to call the same program on several devices: nothing is compiled again.
        assert bench.step.iterate._cache_size() == 1 or i > 1
    assert len(traced) == 1
    return bench, state, history


@pytest.mark.parametrize("model", [LLAMA, EXPERTS], ids=["llama", "experts"])
def test_eight_devices_train_as_one_does(model):
    _, state, history = train((1, 1, 1), model=model)
    bench, split_state, split_history = train((2, 2, 2), model=model)
    for (metrics, experience, scores), (split_metrics, split_experience, split_scores) in zip(
        jax.device_get(history), jax.device_get(split_history), strict=True
    ):
        np.testing.assert_array_equal(experience.tokens, split_experience.tokens)
        np.testing.assert_array_equal(experience.mask, split_experience.mask)
        np.testing.assert_allclose(scores.total, split_scores.total, rtol=1e-6)
        # Sums in another order: 1e-6 in logprobs, ten times that once advantages are divided by their deviation.
        chex.assert_trees_all_close(experience, split_experience, rtol=0, atol=1e-4)
        chex.assert_trees_all_close(metrics, split_metrics, rtol=1e-4, atol=1e-4)
        inside = split_experience.advantages[split_experience.response_mask]
        assert abs(np.mean(inside)) < 1e-5
        assert abs(np.var(inside) - 1) < 1e-4
        assert metrics["objective/kl_coef"] == np.float32(0.1)  # fixed
    # Errors of 1e-6 in the gradient, over eps of 1e-3 and times the rate of 1e-2, in eight steps.
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(split_state.params), rtol=0, atol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), split_state.params, bench.params)
    assert all(x > 1e-3 for x in jax.tree.leaves(moved))
    # The state comes out where it was told to live.
    for name, leaf in named(split_state.params).items():
        assert leaf.sharding == named(bench.shardings.state.params)[name], name


def test_eight_devices_train_as_one_does_with_all_that_can_be_added():
    given = {
        "config": MANY,
        "iterations": 3,
        "texts": random_texts(np.random.default_rng(4), rows=16),
        "trained": lambda base: init_adapter(base, LoRAConfig(rank=2), jax.random.key(5)),
    }
    _, state, history = train((1, 1, 1), **given)
    bench, split_state, split_history = train((2, 2, 1), **given)
    for one, split in zip(jax.device_get(history), jax.device_get(split_history), strict=True):
        np.testing.assert_array_equal(one[1].tokens, split[1].tokens)
        chex.assert_trees_all_close(one[1:], split[1:], rtol=0, atol=1e-4)
        # The noise scale is a quotient of differences of nearly equal numbers.
        for metrics in (one[0], split[0]):
            metrics.pop("optim/noise_scale")
        chex.assert_trees_all_close(one[0], split[0], rtol=1e-3, atol=1e-4)
    assert history[-1][1].response_mask.any()
    for name in ("params", "ema_params", "pending"):
        ours, theirs = (jax.device_get(getattr(x, name)) for x in (state, split_state))
        chex.assert_trees_all_close(ours, theirs, rtol=0, atol=2e-4)
    for name, leaf in named(split_state).items():
        assert leaf.sharding == named(bench.shardings.state)[name], name
    assert split_state.params.keys() == {"decoder"}


def test_by_minibatch_gives_what_one_call_gives_row_by_row(rng):
    rollout = random_rollout(rng, (5, 1, 3, 4, 2, 5), (3,) * 6, 5, 7)
    seen = []

    def function(part):
        seen.append(part.tokens.shape)
        return {"rows": part.tokens[:, :2] * 3, "sums": jnp.sum(part.logprobs, axis=1), "nothing": None}

    for num in (1, 2, 3, 6):
        found = jax.jit(lambda rollout, num=num: by_minibatch(function, rollout, num))(rollout)
        assert seen.pop() == (6 // num, 12)
        np.testing.assert_array_equal(found["rows"], np.asarray(rollout.tokens)[:, :2] * 3)
        np.testing.assert_allclose(found["sums"], np.sum(rollout.logprobs, axis=1), rtol=1e-5)
        assert found["nothing"] is None
