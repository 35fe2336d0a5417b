"""Models, batches and train steps that compile in seconds, and what one full forward pass says of a rollout.

The full pass knows nothing of padding on the left or of caches: it gets each sequence without its padding.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from oracles import log_softmax

from experiments.methods import resolve
from experiments.ppo_setup import optimizer
from ppo_jax.config import PPOConfig
from ppo_jax.experience import Method
from ppo_jax.models import ActorCritic, ModelConfig
from ppo_jax.optim import fresh_state
from ppo_jax.policy import policy_sampling, response_hidden
from ppo_jax.ppo import TrainStep, init_state, make_train_step
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sharding import Shardings, make_mesh, make_shardings
from ppo_jax.types import Examples, Experience, Params, Prompts, Rollout, Running, Scores, TrainState
from ppo_jax.update import make_minibatch, ppo_loss, update

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
ONE_LAYER = {name: dataclasses.replace(config, num_layers=1) for name, config in MODELS.items()}

# The experience of one iteration of PPO, as small as it can be and still have everything.
P, R = 5, 20  # R is more than a chunk of 16 logits
PROMPT_SIZES = (5, 1, 3, 4, 2, 5)
LENGTHS = (R, 1, 0, 7, R - 1, 2)  # full, EOS first, nothing at all, ...
COLD = SamplingConfig(R, (1, 2), PAD, temperature=0.7)
PPO = PPOConfig(
    batch_size=16,
    prompt_length=P,
    response_length=R,
    num_epochs=2,
    num_minibatches=2,
    lr=2e-2,
    adam_eps=1e-4,
    kl_coef=0.01,
    score_scale="none",
)
SIX = dataclasses.replace(PPO, batch_size=6)  # as many as there are prompt sizes


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


def close(actual, expected, scale: float = 1.0) -> None:
    """A logprob that comes by two ways through the model differs by some 1e-6 (see test_sampling.py); what follows from
    it in a few sums keeps that size: 1e-5 times the size of the quantity.
    """
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


def running(kl_coef: float = 0.3, **changes) -> Running:
    """The scalars of a fresh state, and others."""
    zeros = {name: jnp.float32(0) for name in ("baseline", "score_count", "score_mean", "score_m2")}
    changes = {name: jnp.float32(x) for name, x in changes.items()}
    return Running(**{"kl_coef": jnp.float32(kl_coef), "skipped": jnp.int32(0)} | zeros | changes)


def experience_of(rng, params: Params, model: ModelConfig, lengths=LENGTHS, sampling=COLD) -> Experience:
    """An experience whose ratios under these parameters are between 0.5 and 1.8, none near a clip boundary of 0.2."""
    rollout = random_rollout(rng, PROMPT_SIZES, lengths, P, R)
    logits, values = full_pass(model, params, rollout)
    mask, new = np.asarray(rollout.response_mask), taken(policy_logprobs(logits, sampling), rollout)
    new = np.where(np.isfinite(new), new, -3.0)

    def away(x, boundary):
        return np.where(np.abs(np.abs(x) - boundary) < 0.1, 0.0, x)

    ratio = 1 + away(rng.uniform(-0.5, 0.8, mask.shape), 0.2)
    move = away(rng.uniform(-0.6, 0.6, mask.shape), 0.2)
    # The value loss has a second kink, where the return is as far from the value as from its clipped move.
    error = rng.normal(size=mask.shape)
    error = np.where(np.abs(error - (move - np.clip(move, -0.2, 0.2)) / 2) < 0.1, 1.0, error)
    masked = functools.partial(np.where, mask)
    return Experience(
        tokens=rollout.tokens,
        mask=rollout.mask,
        logprobs=jnp.asarray(masked(new - np.log(ratio), 0), jnp.float32),
        values=jnp.asarray(masked(values - move, 0), jnp.float32),
        advantages=jnp.asarray(masked(rng.normal(size=mask.shape), 0), jnp.float32),
        returns=jnp.asarray(masked(values - error, 0), jnp.float32),
    )


def with_reference(rng, params: Params, model: ModelConfig, batch: Experience, exact: bool):
    """(the experience with a random reference's opinion, that reference, log-probabilities [B, R, V] of both)."""
    reference = random_params(rng, model)
    ours, theirs = (policy_logprobs(full_pass(model, p, batch)[0], COLD) for p in (params, reference))
    given = {"ref_logprobs": jnp.asarray(taken(theirs, batch), jnp.float32)}
    if exact:
        given["ref_hidden"] = jax.jit(response_hidden, static_argnums=0)(ActorCritic(model), reference, batch)
    return batch.replace(**given), reference["decoder"], ours, theirs


def random_texts(rng, rows: int = 6, width: int = 9) -> Examples:
    """Texts of random lengths, the first token of each not to be learned, with garbage behind them."""
    sizes = rng.integers(2, width + 1, rows)[:, None]
    inside = np.arange(width) < sizes
    tokens = rng.integers(0, V, (rows, width)).astype(np.int32)
    return Examples(
        jnp.asarray(tokens), jnp.asarray(inside.astype(np.int32)), jnp.asarray(inside & (np.arange(width) > 0))
    )


@functools.cache
def loss_of(model: ModelConfig, config: PPOConfig, sampling: SamplingConfig = COLD) -> Callable:
    """(parameters, experience, the reference, a KL coefficient, texts) to (loss, metrics), compiled once for all tests.

    Without a reference everything is trained.
    """

    def loss(params, experience, ref_params=None, kl_coef=0.3, texts=None):
        batch = make_minibatch(experience, texts, resolve(config))
        return ppo_loss(
            params, ref_params or {}, ActorCritic(model), batch, jnp.float32(kl_coef), resolve(config), sampling
        )

    return jax.jit(loss)


class Bigram:
    """Stands for an `ActorCritic`: logits and value of the next token depend on the newest token alone. It compiles at
    once, and notes the first token of each row that it learns from.
    """

    config = LLAMA

    def __init__(self):
        self.batches = []

    def apply(self, variables, *args, method):
        return getattr(self, method)(variables["params"], *args)

    def trunk(self, params, tokens, positions, mask):
        jax.debug.callback(lambda rows: self.batches.append(rows.tolist()), tokens[:, 0], ordered=True)
        return jax.nn.one_hot(tokens, V), None

    def logits(self, params, hidden):
        return hidden @ params["decoder"]["table"]

    def value(self, params, hidden):
        return hidden @ params["value_head"]["kernel"]

    @staticmethod
    def params() -> Params:
        """A uniform policy, and a critic that says zero."""
        return {"decoder": {"table": jnp.zeros((V, V))}, "value_head": {"kernel": jnp.zeros(V)}}


def bigram_update(config: PPOConfig, tx=None, model=Bigram):
    """(experience, key[, parameters]) to (new parameters, metrics, minibatches as lists of row numbers, what broke)."""
    model, tx = model(), tx or optax.sgd(config.lr)
    shardings = SimpleNamespace(batch=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    others = {"method": resolve(config), "sampling": COLD, "shardings": shardings}
    compiled = jax.jit(functools.partial(update, model, tx, ref_params={}, texts=None, **others))

    def run(experience, key, params=None):
        state = fresh_state(params or model.params(), tx, jax.random.key(0), config.kl_coef)
        after, broken, metrics = compiled(state=state, experience=experience, key=key)
        jax.effects_barrier()
        batches, model.batches = model.batches, []
        return after.params, jax.device_get(metrics), batches, np.asarray(broken)

    return run


def numbered_experience(rng, batch: int, lengths=None) -> Experience:
    """Rows whose first token is their number, sampled by a uniform policy; full ones unless lengths are given."""
    rollout = random_rollout(rng, [P] * batch, [R] * batch if lengths is None else lengths, P, R)
    mask = rollout.response_mask
    return Experience(
        tokens=rollout.tokens.at[:, 0].set(jnp.arange(batch)),
        mask=rollout.mask,
        logprobs=jnp.where(mask, -math.log(V), 0.0),
        values=jnp.zeros((batch, R)),
        advantages=rollout.values,
        returns=jnp.where(mask, jnp.flip(rollout.values), 0.0),
    )


class Bench(NamedTuple):
    """A train step with everything that it is called with."""

    model: ActorCritic
    config: PPOConfig
    method: Method
    sampling: SamplingConfig
    shardings: Shardings
    step: TrainStep
    params: Params  # host copies, of the whole model
    tx: object
    trained: Callable[[Params], Params]  # of the decoder

    def state(self, seed: int = 0) -> TrainState:
        """A fresh state, on its devices; its buffers are its own."""
        decoder = self.trained(jax.tree.map(jnp.array, self.params["decoder"]))
        head = {"value_head": jax.tree.map(jnp.array, self.params["value_head"])} if self.method.critic else None
        state = init_state(decoder, self.model, self.tx, self.method, jax.random.key(seed), head)
        return jax.device_put(state, self.shardings.state)

    def reference(self) -> Params:
        """Reference parameters, on their devices."""
        return jax.device_put(jax.tree.map(jnp.array, self.params["decoder"]), self.shardings.ref_params)

    def prompts(self, rng: np.random.Generator, sizes=None) -> Prompts:
        """Random prompts of random sizes, on their devices."""
        width = self.config.prompt_length
        num = self.config.batch_size // self.config.responses_per_prompt
        sizes = rng.integers(1, width + 1, num) if sizes is None else sizes
        return jax.device_put(left_padded(rng, sizes, width), self.shardings.batch)


def make_bench(
    params: Params, model: ModelConfig, config: PPOConfig, eos_ids=(1,), mesh=(1, 1, 1), score=None, num_iterations=50,
    trained: Callable[[Params], Params] = lambda decoder: decoder,
) -> Bench:  # fmt: skip
    """The train step of these settings, as the experiments put it together; `score` is a function of the rollout."""
    sampling, method = policy_sampling(config, tuple(eos_ids), PAD), resolve(config)
    _, tx = optimizer(config, num_iterations)
    actor_critic = ActorCritic(model)

    def fresh(decoder, key):
        return init_state(trained(decoder), actor_critic, tx, method, key)

    state = jax.eval_shape(fresh, params["decoder"], jax.eval_shape(lambda: jax.random.key(0)))
    shardings = make_shardings(make_mesh(*mesh), state, ref_params=params["decoder"])
    judge = None if score is None else lambda params, rollout: Scores(score(rollout))
    step = make_train_step(actor_critic, tx, method, sampling, shardings, judge)
    return Bench(actor_critic, config, method, sampling, shardings, step, jax.device_get(params), tx, trained)


def token_set_score(rollout: Rollout) -> jax.Array:
    """The share of the response's tokens that are 20 or more, in [0, 1]."""
    mask = rollout.response_mask
    hits = jnp.sum(mask & (rollout.response_tokens >= 20), axis=1, dtype=jnp.float32)
    return hits / jnp.maximum(jnp.sum(mask, axis=1), 1)


def assert_consumed(state: TrainState) -> None:
    """Parameters and moments were donated: nobody holds two copies of them."""
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
