"""Models, batches and train steps that compile in seconds, and what one full forward pass says of a rollout.

The full pass knows nothing of padding on the left or of caches: it gets each sequence without its padding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracles import log_softmax

from ppo_jax.config import PPOConfig
from ppo_jax.models import ActorCritic, ModelConfig
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.ppo import TrainStep, init_state, make_train_step, policy_sampling
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sharding import Shardings, make_mesh, make_shardings
from ppo_jax.types import Params, Prompts, Rollout, TrainState

V = 37  # a number that no other axis has
PAD = 0
LLAMA = ModelConfig(
    vocab_size=V, num_layers=2, num_heads=4, num_kv_heads=2, width=16, mlp_width=24, max_positions=40, rope_theta=100.0
)
GPT2 = ModelConfig(
    vocab_size=V,
    num_layers=2,
    num_heads=2,
    width=16,
    mlp_width=24,
    max_positions=40,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    attention_bias=True,
    mlp_bias=True,
)
MODELS = {"gpt2": GPT2, "llama": LLAMA}


def shapes(config: ModelConfig) -> Params:
    """Shapes of the actor-critic's parameters."""
    init = functools.partial(ActorCritic(config).init, jax.random.key(0))
    return jax.eval_shape(init, jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))["params"]


def random_params(rng: np.random.Generator, config: ModelConfig, scale: float = 0.4) -> Params:
    """Parameters of an actor-critic, every one random and, at this scale, large enough to matter; norms around one."""

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.3 * drawn if "scale" in str(path[-1]) else scale * drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(config))


def left_padded(rng: np.random.Generator, sizes, width: int) -> Prompts:
    """Random prompts of these sizes; the padding is garbage too."""
    tokens = rng.integers(0, V, (len(sizes), width)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.asarray(np.arange(width) >= width - np.array(sizes)[:, None]))


def random_rollout(rng: np.random.Generator, prompt_sizes, response_sizes, prompt_width: int, width: int) -> Rollout:
    """Random tokens everywhere, padding included; logprobs and values are 0 where masked, as `generate` leaves them."""
    prompts = left_padded(rng, prompt_sizes, prompt_width)
    batch = len(prompt_sizes)
    mask = np.arange(width) < np.array(response_sizes)[:, None]
    tokens = rng.integers(0, V, (batch, width)).astype(np.int32)
    logprobs = np.where(mask, -rng.uniform(0.5, 4.0, mask.shape), 0.0).astype(np.float32)
    values = np.where(mask, rng.normal(size=mask.shape), 0.0).astype(np.float32)
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, tokens], 1),
        mask=jnp.concatenate([prompts.mask, mask], 1),
        logprobs=jnp.asarray(logprobs),
        values=jnp.asarray(values),
    )


@functools.cache
def _full_pass(config: ModelConfig):
    return jax.jit(ActorCritic(config).apply)


def full_pass(config: ModelConfig, params: Params, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """(logits [B, R, V], values [B, R]) before each real response token, float64; 0 where masked."""
    tokens, mask, response = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.response_mask))
    sequences, filled = np.zeros_like(tokens), np.zeros_like(mask)
    for row, real in enumerate(mask):
        sequences[row, : real.sum()], filled[row, : real.sum()] = tokens[row, real], True
    all_logits, all_values = _full_pass(config)({"params": params}, jnp.asarray(sequences), jnp.asarray(filled))
    logits, values = np.zeros((*response.shape, config.vocab_size)), np.zeros(response.shape)
    for row, t in np.argwhere(response):
        before = mask[row].sum() - response[row].sum() + t - 1
        logits[row, t], values[row, t] = all_logits[row, before], all_values[row, before]
    return logits, values


def policy_logprobs(logits: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Log-probabilities [B, R, V] of the policy: its temperature, and no EOS before its time; float64."""
    logits = np.array(logits) / (sampling.temperature or 1.0)
    for t in range(sampling.min_new_tokens):
        logits[:, t, list(sampling.eos_ids)] = -np.inf
    return np.array([[log_softmax(row) for row in rows] for rows in logits])


def taken(logprobs: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Those of the response tokens, [B, R]."""
    return np.take_along_axis(logprobs, np.asarray(rollout.response_tokens)[..., None], 2)[..., 0]


class Bench(NamedTuple):
    """A train step with everything that it is called with."""

    model: ActorCritic
    config: PPOConfig
    sampling: SamplingConfig
    shardings: Shardings
    step: TrainStep
    params: Params  # host copies
    tx: object

    def state(self, seed: int = 0) -> TrainState:
        """A fresh state, on its devices; its buffers are its own."""
        decoder = jax.tree.map(jnp.array, self.params["decoder"])
        state = init_state(decoder, self.model, self.tx, self.config, jax.random.key(seed))
        head = jax.tree.map(jnp.array, self.params["value_head"])
        return jax.device_put(state.replace(params={"decoder": decoder, "value_head": head}), self.shardings.state)

    def reference(self) -> Params:
        """Reference parameters, on their devices."""
        return jax.device_put(jax.tree.map(jnp.array, self.params["decoder"]), self.shardings.ref_params)

    def prompts(self, rng: np.random.Generator, sizes=None) -> Prompts:
        """Random prompts of random sizes, on their devices."""
        width = self.config.prompt_length
        sizes = rng.integers(1, width + 1, self.config.batch_size) if sizes is None else sizes
        return jax.device_put(left_padded(rng, sizes, width), self.shardings.batch)


def make_bench(
    params: Params, model: ModelConfig, config: PPOConfig, eos_ids=(1,), mesh=(1, 1, 1), score=None, num_iterations=50
) -> Bench:
    """The train step of these settings, as the experiments put it together."""
    sampling = policy_sampling(config, tuple(eos_ids), PAD)
    warmup_steps, num_steps = (n * config.updates_per_iteration for n in (config.warmup_iterations, num_iterations))
    schedule = make_schedule(config.lr, config.lr_schedule, warmup_steps, num_steps)
    tx = make_optimizer(
        schedule, config.adam_b1, config.adam_b2, config.adam_eps, config.weight_decay, config.max_grad_norm
    )
    actor_critic = ActorCritic(model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda p, key: init_state(p["decoder"], actor_critic, tx, config, key), params, key)
    shardings = make_shardings(make_mesh(*mesh), state)
    judge = None if score is None else lambda params, rollout: score(rollout)
    step = make_train_step(actor_critic, tx, config, sampling, shardings, judge)
    return Bench(actor_critic, config, sampling, shardings, step, jax.device_get(params), tx)


def token_set_score(rollout: Rollout) -> jax.Array:
    """The share of the response's tokens that are 20 or more, in [0, 1]."""
    mask = rollout.response_mask
    hits = jnp.sum(mask & (rollout.response_tokens >= 20), axis=1, dtype=jnp.float32)
    return hits / jnp.maximum(jnp.sum(mask, axis=1), 1)


def assert_consumed(state: TrainState) -> None:
    """Parameters and moments were donated: nobody holds two copies of them."""
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
