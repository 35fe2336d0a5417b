"""From experience to new parameters: epochs over minibatches, each one gradient step on the loss of PPO."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from ppo_jax.config import DescentOptions
from ppo_jax.experience import Method, token_kl
from ppo_jax.guard import broken_leaves, is_broken
from ppo_jax.losses import aggregation_weights, ratio_metrics
from ppo_jax.models import ActorCritic, load_balance
from ppo_jax.numerics import masked_whiten, with_its_gradient
from ppo_jax.optim import noise_scale
from ppo_jax.policy import policy_params, response_kl, response_logprobs, response_trunk, response_values
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sft import predicted, token_logprobs
from ppo_jax.sharding import Shardings, minibatches
from ppo_jax.types import Examples, Experience, Metrics, Params, TrainState

Rows = TypeVar("Rows")

BROKEN = ("broken/logprob", "broken/value", "broken/loss")  # metrics of a gradient step, in the order of guard.LOSS


class Minibatch(NamedTuple):
    """What one gradient step learns from. Every mean over it is a weighted sum, so that parts of it add up to it."""

    experience: Any  # an Experience; of a control task its Steps
    policy_weights: jax.Array  # [b, R]: as `loss_aggregation` says
    token_weights: jax.Array  # [b, R]: the mean over all tokens
    texts: Examples | None  # for the auxiliary next-token loss
    text_weights: jax.Array | None  # [b', S - 1]


def make_minibatch(experience: Experience, texts: Examples | None, method: Method) -> Minibatch:
    """A minibatch with its weights, and its advantages whitened if that is done minibatch by minibatch."""
    mask = experience.response_mask
    if method.whitening == "minibatch":
        whitened = masked_whiten(experience.advantages, mask, shift_mean=method.config.whiten_shift)
        experience = experience.replace(advantages=whitened)
    return Minibatch(
        experience,
        aggregation_weights(mask, method.config.loss_aggregation),
        aggregation_weights(mask, "token"),
        texts,
        None if texts is None else aggregation_weights(predicted(texts), "token"),
    )


def ppo_loss(
    params: Params,
    ref_params: Params,
    model: ActorCritic,
    batch: Minibatch,
    kl_coef: jax.Array,
    method: Method,
    sampling: SamplingConfig,
) -> tuple[jax.Array, Metrics]:
    """Surrogate of the policy + vf_coef x error of the critic - ent_coef x entropy, and what else the settings add.

    Args:
        params: what is trained; see `policy_params`.
        ref_params: the reference's decoder.
        model: the actor-critic.
        batch: a minibatch or a part of one.
        kl_coef: `[]`, weight of a KL penalty in the loss.
        method: the settings.
        sampling: the policy's distribution.

    Returns:
        (loss `[]`, `policy/*`, `value/*` and `router/*` metrics, and as `broken/*` what is not finite).
    """
    params = policy_params(params, ref_params)
    of_critic = partial(critic_terms, model=model, method=method)
    values, value_loss, value_metrics = None, jnp.zeros(()), {}
    if "critic" in params:  # it has its turn first, forward and backward: two trunks need the memory of one
        own = {name: params[name] for name in ("critic", "value_head")}
        value_loss, (values, value_metrics) = with_its_gradient(of_critic)(own, batch)
        _, batch = jax.lax.optimization_barrier((jax.lax.stop_gradient(value_loss), batch))
    config, data, mask = method.config, batch.experience, batch.experience.response_mask
    hidden, routed = response_trunk(model, params, data)
    logprobs, entropy = response_logprobs(model, params, hidden, data, sampling)

    loss, metrics = policy_terms(logprobs, entropy, batch, mask, method)
    if config.kl_in == "loss":
        assert data.ref_logprobs is not None
        kl = None
        if data.ref_hidden is not None:  # the exact KL
            kl = response_kl(model, params, hidden, ref_params, data.ref_hidden, sampling)
        kl = token_kl(logprobs, data.ref_logprobs, kl, mask, config)
        metrics["policy/kl_loss"] = jnp.sum(batch.policy_weights * kl)
        loss += kl_coef * metrics["policy/kl_loss"]
    if batch.texts is not None:
        text_logprobs = token_logprobs(model, params, batch.texts)
        metrics["policy/ptx_loss"] = -jnp.sum(batch.text_weights * text_logprobs, where=predicted(batch.texts))
        loss += config.ptx_coef * metrics["policy/ptx_loss"]
    if routed:
        metrics["router/load_balance"] = load_balance(routed, model.config.experts_per_token, data.mask)
    if method.critic and "critic" not in params:
        value_loss, (values, value_metrics) = of_critic(params, batch, hidden)
    loss += value_loss
    return loss, metrics | value_metrics | broken_flags(logprobs, values, loss, mask)


def critic_terms(
    params: Params, batch: Minibatch, hidden: jax.Array | None = None, *, model: ActorCritic, method: Method
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """What the critic adds to the loss; (`[]`, (its values `[B, R]`, `value/*` metrics)). See `response_values`."""
    data = batch.experience
    values = response_values(model, params, hidden, data)
    loss, metrics = value_terms(values, batch, data.response_mask, method)
    return loss, (values, metrics)


def policy_terms(
    logprobs: jax.Array, entropy: jax.Array, batch: Minibatch, mask: jax.Array, method: Any
) -> tuple[jax.Array, Metrics]:
    """Surrogate of the policy - ent_coef x entropy; (loss `[]`, `policy/*` metrics). Arrays have the mask's shape."""
    config, data = method.config, batch.experience
    surrogate, clipped = method.surrogate(logprobs, data.logprobs, data.advantages, mask)
    if data.importance is not None:
        surrogate = surrogate * data.importance
    loss = jnp.sum(batch.policy_weights * surrogate)
    metrics = ratio_metrics(logprobs, data.logprobs, mask, batch.token_weights)
    metrics |= {"loss": loss, "entropy": _mean(entropy, batch, mask), "clip_frac": _share(clipped, batch, mask)}
    if not is_zero(config.ent_coef):  # without the bonus the entropy is only reported, and needs no backward pass
        loss -= config.ent_coef * metrics["entropy"]
    return loss, {f"policy/{name}": x for name, x in metrics.items()}


def value_terms(values: jax.Array, batch: Minibatch, mask: jax.Array, method: Any) -> tuple[jax.Array, Metrics]:
    """vf_coef x error of the critic; (loss `[]`, `value/*` metrics)."""
    data = batch.experience
    errors, clipped = method.value_error(values, data.values, data.returns, mask)
    metrics = {"value/loss": _mean(errors, batch, mask), "value/clip_frac": _share(clipped, batch, mask)}
    return method.config.vf_coef * metrics["value/loss"], metrics


def broken_flags(logprobs: jax.Array, values: jax.Array | None, loss: jax.Array, mask: jax.Array) -> Metrics:
    """What of `guard.LOSS` is not finite, as `broken/*` metrics of 0 or 1."""
    values = jnp.zeros(()) if values is None else jnp.where(mask, values, 0.0)
    broken = (is_broken(jnp.where(mask, logprobs, 0.0)), is_broken(values), is_broken(loss))
    return {name: x.astype(jnp.float32) for name, x in zip(BROKEN, broken, strict=True)}


def is_zero(coef: float | jax.Array) -> bool:
    """Whether a coefficient is known to be 0 before the program runs; one that is swept over is not."""
    return not isinstance(coef, jax.Array) and coef == 0


def _mean(x: jax.Array, batch: Minibatch, mask: jax.Array) -> jax.Array:
    return jnp.sum(batch.token_weights * x, where=mask)


def _share(x: jax.Array, batch: Minibatch, mask: jax.Array) -> jax.Array:
    return _mean(x.astype(jnp.float32), batch, mask)


def gradient(
    params: Params, batch: Minibatch, loss: Callable[[Params, Minibatch], tuple[jax.Array, Metrics]], parts: int
) -> tuple[Params, Metrics]:
    """The gradient of a minibatch, in `parts` that need the memory of one, and its metrics."""
    grad = jax.grad(loss, has_aux=True)
    if parts == 1:
        return grad(params, batch)

    def add(total: Params, part: Minibatch) -> tuple[Params, Metrics]:
        grads, metrics = grad(params, part)
        metrics["noise/small"] = jnp.square(parts * optax.tree.norm(grads))  # of a batch that is this part alone
        return jax.tree.map(jnp.add, total, grads), metrics

    grads, history = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), minibatches(batch, parts))
    every = jnp.ones(parts, bool)
    metrics = {name: gathered(name, x, every) for name, x in history.items()}
    metrics["noise/big"] = jnp.square(optax.tree.norm(grads))
    return grads, {name: x * parts if is_share(name) else x for name, x in metrics.items()}


def is_share(name: str) -> bool:
    """Whether a metric of a part of a minibatch is its share of a mean over the whole."""
    return not name.endswith(("_max", "_min", "_dev")) and not name.startswith(("broken/", "noise/", "router/"))


def gathered(name: str, x: jax.Array, valid: jax.Array) -> jax.Array:
    """One metric out of several values of it: the largest or smallest where its name says so, else the mean."""
    if name.endswith(("_max", "_dev")) or name.startswith("broken/"):
        return jnp.max(jnp.where(valid, x, 0.0))
    if name.endswith("_min"):
        return jnp.min(jnp.where(valid, x, jnp.finfo(jnp.float32).max))
    return jnp.sum(jnp.where(valid, x, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def update(
    model: ActorCritic,
    tx: optax.GradientTransformation,
    state: TrainState,
    ref_params: Params,
    experience: Experience,
    texts: Examples | None,
    key: jax.Array,
    method: Method,
    sampling: SamplingConfig,
    shardings: Shardings,
    spoilt: jax.Array | bool = False,
) -> tuple[TrainState, jax.Array, Metrics]:
    """`num_epochs` passes over the experience in `num_minibatches` gradient steps each, reshuffled every pass.

    A gradient that is not finite is not applied, and none of an experience that is `spoilt`. A minibatch whose
    approximate KL between the policies that act and learn is above `target_kl` ends the passes; one whose mean ratio is
    above `ratio_threshold` is passed over.

    Returns:
        (state with new parameters and optimizer state, what was not finite `[quantities]` bool without the
        experience's own, metrics averaged over the gradient steps).
    """
    config = method.config

    def loss(params: Params, batch: Minibatch) -> tuple[jax.Array, Metrics]:
        return ppo_loss(params, ref_params, model, batch, state.running.kl_coef, method, sampling)

    def part_gradient(params: Params, data: Experience, texts: Examples | None) -> tuple[Params, Metrics]:
        data, texts = jax.lax.with_sharding_constraint((data, texts), shardings.batch)
        return gradient(params, make_minibatch(data, texts, method), loss, config.accumulation)

    params, opt_state, broken, metrics = descend(
        part_gradient, tx, state.params, state.opt_state, experience, texts, key, config, spoilt
    )
    small, big = (metrics.pop(f"noise/{name}", jnp.zeros(())) for name in ("small", "big"))
    if config.noise_scale:
        size = len(experience.tokens) / config.num_minibatches
        metrics["optim/noise_scale"] = noise_scale(small, big, size / config.accumulation, size)
    return state.replace(params=params, opt_state=opt_state), broken, metrics


def shuffle(key: jax.Array, size: int) -> jax.Array:
    """A uniformly random order of so many rows, `[size]` int32.

    It is that of `jax.random.permutation`, which from 1,626 rows on sorts twice, in case two of its 32-bit numbers are
    equal. Here those rows stay in their order.
    """
    _, key = jax.random.split(key)
    return jnp.argsort(jax.random.bits(key, (size,)))


def descend(
    gradient: Callable[[Params, Rows, Any], tuple[Params, Metrics]],
    tx: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    experience: Rows,
    texts: Any,
    key: jax.Array,
    config: DescentOptions,
    spoilt: jax.Array | bool = False,
) -> tuple[Params, optax.OptState, jax.Array, Metrics]:
    """The passes of PPO over an experience of any kind: see `update`.

    Args:
        gradient: `gradient(params, rows, texts) -> (gradient, metrics)` of one minibatch.
        tx: the optimizer.
        params: what is trained.
        opt_state: the optimizer's.
        experience: rows, reshuffled every pass: a pytree of arrays `[B, ...]`.
        texts: rows that go along in the same order in every pass, or None.
        key: of the shuffles.
        config: passes, gradient steps a pass, and when to stop.
        spoilt: nothing is to be learned from this.

    Returns:
        (new parameters, the optimizer's new state, what was not finite `[quantities]` bool, metrics averaged over the
        gradient steps).
    """

    def gradient_step(carry: tuple, data: tuple[Rows, Any]) -> tuple[tuple, tuple]:
        params, opt_state, stopped = carry
        grads, metrics = gradient(params, *data)
        metrics["optim/grad_norm"] = optax.tree.norm(grads)
        broken = jnp.concatenate([jnp.stack([metrics.pop(name) > 0 for name in BROKEN]), broken_leaves(grads)])
        finite = ~jnp.any(broken) & jnp.logical_not(spoilt)
        if config.target_kl:
            stopped |= metrics["policy/approx_kl"] > config.target_kl

        def apply(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        go = finite & ~stopped & (metrics["policy/ratio_mean"] <= config.ratio_threshold)
        params, opt_state = jax.lax.cond(go, apply, lambda *same: same, params, opt_state)
        return (params, opt_state, stopped), (metrics, broken, finite, go)

    def epoch(carry: tuple, order: jax.Array) -> tuple[tuple, tuple]:
        shuffled = jax.tree.map(lambda x: x[order], experience)
        data = minibatches((shuffled, texts), config.num_minibatches)
        if not config.target_kl:
            return jax.lax.scan(gradient_step, carry, data)
        # Once the passes have ended, the rest costs nothing.
        shape = jax.eval_shape(gradient_step, carry, jax.tree.map(lambda x: x[0], data))[1]
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        nothing = (*nothing[:2], jnp.array(True), jnp.array(False))
        return jax.lax.scan(
            lambda carry, data: jax.lax.cond(carry[2], lambda c, d: (c, nothing), gradient_step, carry, data),
            carry,
            data,
        )

    keys = jax.random.split(key, config.num_epochs)
    size = len(jax.tree.leaves(experience)[0])
    orders = jax.vmap(lambda key: shuffle(key, size))(keys)
    start = (params, opt_state, jnp.array(False))
    (params, opt_state, _), (history, broken, finite, applied) = jax.lax.scan(
        epoch, start, orders
    )  # each [num_epochs, num_minibatches, ...]
    metrics = {name: gathered(name, x, applied) for name, x in history.items()}
    # Before the first gradient step the policy that learns is the old one, unless the rollout is stale: a ratio that
    # differs from one by more than rounding is a defect.
    metrics |= {f"policy/first_{name}": history[f"policy/{name}"][0, 0] for name in ("ratio_dev", "approx_kl")}
    del metrics["policy/ratio_dev"]
    metrics["policy/updates"] = jnp.sum(applied).astype(jnp.float32)
    metrics["guard/skipped"] = jnp.sum(~finite).astype(jnp.float32)
    return params, opt_state, jnp.any(broken, axis=(0, 1)), metrics
