"""The optimizer: Adam with decoupled weight decay, a clipped gradient and a schedule."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ppo_jax.errors import InputError, check
from ppo_jax.types import Params, Running, TrainState

LR_SCHEDULES = ("constant", "linear", "cosine")
ADAM_EPS_FORMS = ("pytorch", "tensorflow")
CRITIC_KEYS = ("critic", "value_head")


def make_schedule(lr: float, kind: str, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Learning rate by gradient step: linear over the warm-up (1/w of the peak in the first of w steps), then constant,
    or down to 0 at `num_steps`.

    Args:
        lr: the peak.
        kind: one of `LR_SCHEDULES`.
        warmup_steps: gradient steps of warm-up.
        num_steps: gradient steps of the whole run.

    Returns:
        `step -> learning rate`.

    Raises:
        ValueError: an unknown kind.
    """
    decay_steps = max(1, num_steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(lr, decay_steps),
    }
    if kind not in after:
        raise ValueError(f"lr_schedule: got {kind!r}, expected one of {', '.join(LR_SCHEDULES)}")
    # The first step after 0 of w has 1/w of the peak, not nothing: a step with learning rate zero is a step lost.
    warmup = optax.linear_schedule(lr / max(1, warmup_steps), lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after[kind]], [warmup_steps]) if warmup_steps else after[kind]


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_form: str = "pytorch"
) -> optax.GradientTransformation:
    """Adam's direction, with eps after the correction of the moments' bias (pytorch) or before it (tensorflow).

    pytorch:    m_hat / (sqrt(v_hat) + eps), with m_hat = m / (1 - b1^t) and v_hat = v / (1 - b2^t)
    tensorflow: sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    TensorFlow's is PyTorch's with eps / sqrt(1 - b2^t): for b2 = 0.999 that is 31.6 times eps in the first step, and
    eps in the end. Gradients of the size of eps then move their parameters less in the first steps.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: above 0, in the unit of the gradient.
        eps_form: one of `ADAM_EPS_FORMS`.

    Returns:
        A transformation of gradients into directions of descent of about unit size, not yet negated.

    Raises:
        InputError: an unknown form.

    Source: Kingma and Ba 2015, algorithm 1 (pytorch) and the last lines of section 2 (tensorflow, where eps is called
    epsilon hat); tensorflow/tensorflow, python/training/adam.py; Huang et al. 2024, "The N Implementation Details of
    RLHF with PPO", on what it does to a policy.
    """
    check("eps_form", eps_form, eps_form in ADAM_EPS_FORMS, "one of " + ", ".join(ADAM_EPS_FORMS))
    pytorch = optax.scale_by_adam(b1, b2, eps)
    if eps_form == "pytorch":
        return pytorch

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        grown = eps / jnp.sqrt(1 - b2 ** (state.count + 1))
        return optax.scale_by_adam(b1, b2, grown).update(updates, state, params)

    return optax.GradientTransformation(pytorch.init, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Multiplies gradients by max_norm / norm, norm that of all together, where that is less than one.

    As in `optax.clip_by_global_norm`, which divides each number by the norm: that is never fused into Adam's sums, so
    that a second copy of the gradients is written.
    """

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        scale = jnp.minimum(1.0, max_norm / optax.tree.norm(updates))
        return jax.tree.map(lambda x: x * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    schedule: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    *,
    eps_form: str = "pytorch",
    critic_schedule: optax.Schedule | None = None,
    critic_warmup_steps: int = 0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on matrices only, after clipping by the global norm of all gradients together.

    Parameters under the top-level keys `critic` and `value_head` are the critic's own, all others the policy's. Those
    in bfloat16 have a float32 copy in the optimizer's state, which is what learns; moments are float32. Updates are to
    be added by `optax.apply_updates`, which gives exactly that copy, rounded.

    Args:
        schedule: learning rate by gradient step.
        b1: decay of Adam's first moment, in [0, 1).
        b2: decay of Adam's second moment, in [0, 1).
        eps: added to the root of Adam's second moment.
        weight_decay: per unit of learning rate; norms and biases do not decay.
        max_grad_norm: largest global norm of a gradient, over both groups.
        eps_form: one of `ADAM_EPS_FORMS`, see `scale_by_adam`.
        critic_schedule: learning rate of the critic's own parameters; None: `schedule`.
        critic_warmup_steps: gradient steps in which the policy's parameters, moments and schedule stand still; its
            schedule begins after them.

    Returns:
        The optimizer. Its state is a tree in which the path of an array ends as its parameter's does.

    Raises:
        InputError: an unknown form; from its `init`, settings of a critic where no parameter is a critic's own.

    Source: Kingma and Ba 2015 (Adam); Loshchilov and Hutter 2019 (decoupled decay); Yuan et al. 2025, arXiv:2503.01491
    (a critic that learns before the policy moves); Micikevicius et al. 2018, section 3.1 (master copy).
    """

    def adam(schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_adam(b1, b2, eps, eps_form),
            optax.add_decayed_weights(weight_decay, _is_matrix),
            optax.scale_by_learning_rate(schedule),
        )

    has_settings_of_a_critic = critic_schedule is not None or critic_warmup_steps > 0

    def groups(params: Params) -> Params:
        labels = jax.tree_util.tree_map_with_path(lambda path, _: _group(path), params)
        if has_settings_of_a_critic and "critic" not in jax.tree.leaves(labels):
            names = " or ".join(CRITIC_KEYS)
            raise InputError(f"critic_schedule, critic_warmup_steps: got parameters without a critic, expected {names}")
        return labels

    policy = adam(schedule)
    if critic_warmup_steps:
        policy = optax.transforms.conditionally_mask(policy, _from_step(critic_warmup_steps))
    by_group = optax.partition({"policy": policy, "critic": adam(critic_schedule or schedule)}, groups)
    return _in_float32(optax.chain(clip_by_global_norm(max_grad_norm), by_group))


def _from_step(first: int) -> Any:
    """The condition that holds from a step on."""
    return lambda step: step >= first


class MasterState(NamedTuple):
    """The state of an optimizer of parameters some of which may be in bfloat16."""

    master: Params  # float32 copies of those, and None for the others
    inner: optax.OptState


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 gradients and parameters, whatever the precision of those that are given."""

    def init(params: Params) -> MasterState:
        master = jax.tree.map(lambda x: None if _float32(x).dtype == x.dtype else _float32(x), params)
        return MasterState(master, inner.init(jax.tree.map(_float32, params)))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        precise = jax.tree.map(lambda x, copy: x if copy is None else copy, params, state.master)
        steps, inner_state = inner.update(jax.tree.map(_float32, updates), state.inner, precise)
        visible = jax.tree.map(_visible, params, state.master, steps)
        master = jax.tree.map(_moved, params, state.master, steps, visible)
        return visible, MasterState(master, inner_state)

    return optax.GradientTransformation(init, update)


def _visible(param: jax.Array, copy: jax.Array | None, step: jax.Array) -> jax.Array:
    """What is to be added to a parameter, and then rounded, so that it is its moved copy, rounded."""
    return step if copy is None else copy + step - param


def _moved(param: jax.Array, copy: jax.Array | None, step: jax.Array, update: jax.Array) -> jax.Array | None:
    """The next copy. No update of float32 takes a parameter from 1 to -1e-8, say: where it falls beside its copy, the
    copy follows, by less than the rounding error of the step.
    """
    if copy is None:
        return None
    shown = param + update
    return jnp.where(_rounded(shown, param.dtype) == _rounded(copy + step, param.dtype), copy + step, shown)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    # Not a cast and back, which XLA may leave out.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _group(path: tuple) -> str:
    top_level_key = jax.tree_util.keystr(path[:1], simple=True)
    return "critic" if top_level_key in CRITIC_KEYS else "policy"


def _is_matrix(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def fresh_state(
    params: Params, tx: optax.GradientTransformation, key: jax.Array, kl_coef: float = 0.0, ema: bool = False
) -> TrainState:
    """The state before the first step.

    Args:
        params: what is trained; the state takes it over.
        tx: from `make_optimizer`.
        key: a typed key.
        kl_coef: PPO's, and 0 where there is no KL penalty.
        ema: keep a moving average of `params["decoder"]`, which begins at a copy of it.
    """
    zero = functools.partial(jnp.zeros, (), jnp.float32)  # a new one each time: a buffer cannot be donated twice
    running = Running(jnp.float32(kl_coef), zero(), zero(), zero(), zero(), jnp.int32(0))
    average = jax.tree.map(lambda x: jnp.array(x, _float32(x).dtype, copy=True), params["decoder"]) if ema else None
    return TrainState(jnp.int32(0), params, tx.init(params), key, running, average)


def ema_update(ema: Params, params: Params, decay: float) -> Params:
    """The moving average after one more set of parameters: ema + (1 - decay) (params - ema), in float32.

    Args:
        ema: the average so far, float32.
        params: the same tree, of any precision.
        decay: weight of the average so far, in [0, 1).

    Returns:
        The tree of `ema`.

    Source: Ouyang et al. 2022, arXiv:2203.02155, appendix C.4 (decay 0.992 of PPO's policy).
    """
    return jax.tree.map(lambda average, x: average + (1 - decay) * (_float32(x) - average), ema, params)


def noise_scale(small_sq_norm: jax.Array, big_sq_norm: jax.Array, small: float, big: float) -> jax.Array:
    """The simple gradient noise scale: the batch size at which the noise of a gradient is as large as the gradient.

    B_simple = tr(Sigma) / |G|^2, with the unbiased estimates
    |G|^2 = (big |G_big|^2 - small |G_small|^2) / (big - small)
    tr(Sigma) = (|G_small|^2 - |G_big|^2) / (1 / small - 1 / big)

    Both estimates are noisy, and a ratio of means is far better than a mean of ratios: give means of the squared norms
    over many gradient steps. A negative result says that these were too few to tell gradient from noise.

    Args:
        small_sq_norm: squared norm of the mean gradient of `small` samples, averaged over all such parts of a batch.
        big_sq_norm: squared norm of the mean gradient of `big` samples.
        small: samples in a part, at least 1.
        big: samples in a batch, more than `small`.

    Returns:
        B_simple in samples, the shape of the norms; 0 where |G|^2 is 0.

    Raises:
        InputError: sizes that give no estimate.

    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    check("small, big", (small, big), 1 <= small < big, "1 <= small < big")
    signal = (big * big_sq_norm - small * small_sq_norm) / (big - small)
    noise = (small_sq_norm - big_sq_norm) / (1 / small - 1 / big)
    return jnp.where(signal == 0, 0.0, noise / jnp.where(signal == 0, 1.0, signal))
