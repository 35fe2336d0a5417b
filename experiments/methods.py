"""The one place where the names of methods become functions.

A function's keyword-only parameters are named like the settings that it reads, and are bound to them here. A setting
that none of the chosen functions reads has to keep its default: nothing is accepted and ignored.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from ppo_jax.advantages import (
    dr_grpo_advantages,
    gae_advantages,
    grpo_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    remax_advantages,
    rloo_advantages,
)
from ppo_jax.config import ControlConfig, PPOConfig
from ppo_jax.control import ControlMethod
from ppo_jax.errors import check
from ppo_jax.experience import Method
from ppo_jax.losses import (
    cispo_surrogate,
    clip_surrogate,
    clipped_value_error,
    gspo_surrogate,
    huber_value_error,
    squared_value_error,
    unclipped_surrogate,
)

Methods = dict[str, dict[str, Callable]]

METHODS: Methods = {
    "advantage": {
        "gae": gae_advantages,
        "rloo": rloo_advantages,
        "grpo": grpo_advantages,
        "dr_grpo": dr_grpo_advantages,
        "reinforce": reinforce_advantages,
        "reinforce_pp": reinforce_pp_advantages,
        "reinforce_pp_baseline": reinforce_pp_baseline_advantages,
        "remax": remax_advantages,
    },
    "policy_loss": {
        "clip": clip_surrogate,
        "gspo": gspo_surrogate,
        "cispo": cispo_surrogate,
        "none": unclipped_surrogate,
    },
    "value_loss": {
        "clip": clipped_value_error,
        "squared": squared_value_error,
        "huber": huber_value_error,
    },
}
# A step of control is a response of one token: the sequence ratio of gspo is that of its token.
CONTROL_METHODS: Methods = {
    "policy_loss": {name: METHODS["policy_loss"][name] for name in ("clip", "cispo", "none")},
    "value_loss": METHODS["value_loss"],
}
WITH_CRITIC = ("gae",)
WITH_GREEDY = ("remax",)
WHITENED = ("gae", "reinforce_pp", "reinforce_pp_baseline")  # of "reinforce" it would take the baseline out again
GROUPS_OF = "responses_per_prompt"  # read by sampling as well
KL_OWN = ("kl_estimator", "kl_in", "kl_clamp", "kl_target")
CRITICS_OWN = tuple("value_loss value_clip_eps huber_delta vf_coef critic_lr critic_warmup_iterations".split())


def resolve(config: PPOConfig) -> Method:
    """The functions that a configuration names, with their settings bound.

    Raises:
        InputError: a name that nothing has, or a setting that nothing would read.
    """
    _check_names(config, METHODS)
    _refuse_changed(config, idle(config))
    grouped = GROUPS_OF in _settings_of(METHODS["advantage"][config.advantage])
    each = config.responses_per_prompt
    check(f"ppo.{GROUPS_OF}", each, each > 1 or not grouped, f"at least 2 with advantage={config.advantage}")
    greedy = config.advantage in WITH_GREEDY
    stale = config.stale_iterations
    check("ppo.stale_iterations", stale, not (stale and greedy), f"0 with advantage={config.advantage}")
    high, cispo = config.clip_eps_high, config.policy_loss == "cispo"
    check("ppo.clip_eps_high", high, high > 0 or not cispo, "above 0 with policy_loss=cispo: its largest weight less 1")
    return Method(
        config,
        *(_bound(functions[getattr(config, kind)], config) for kind, functions in METHODS.items()),
        whitening=_whitening(config),
        critic=config.advantage in WITH_CRITIC,
        greedy=greedy,
    )


def resolve_control(config: ControlConfig) -> ControlMethod:
    """The same for control tasks.

    Raises:
        InputError: a name that nothing has, or a setting that nothing would read.
    """
    _check_names(config, CONTROL_METHODS)
    unread = _unread(config, CONTROL_METHODS)
    if config.whiten_advantages == "none":
        unread["whiten_shift"] = "where advantages are not whitened"
    _refuse_changed(config, unread)
    return bind_control(config)


def bind_control(config: ControlConfig) -> ControlMethod:
    """`resolve_control` of settings that are known to be good, such as those that a program sweeps over."""
    return ControlMethod(config, *(_bound(at[getattr(config, kind)], config) for kind, at in CONTROL_METHODS.items()))


def idle(config: PPOConfig) -> dict[str, str]:
    """The settings that nothing reads, given the others, and why."""
    unread = _unread(config, METHODS)
    without = {
        "without overlong_buffer": (config.overlong_buffer > 0, "overlong_penalty"),
        "without score_scale": (config.score_scale != "none", "score_shift"),
        "without kl_target": (config.kl_target > 0, "kl_horizon"),
        "with vf_coef=0 and weight_decay=0": (config.vf_coef > 0 or config.weight_decay > 0, "critic_lr"),
        "with kl_in=reward and kl_estimator=exact, which logs it": (
            config.kl_in != "reward" or config.kl_estimator != "exact",
            "exact_kl",
        ),
        "without importance": (config.importance != "none", "importance_cap"),
        "where advantages are not whitened": (_whitening(config) != "none", "whiten_shift"),
        f"with advantage={config.advantage}": (config.advantage == "reinforce", "baseline_decay"),
        "with lambda_length_scale and critic_lambda": (
            config.lambda_length_scale == 0 or config.critic_lambda == -1,
            "gae_lambda",
        ),
    }
    unread |= {name: reason for reason, (read, name) in without.items() if not read}
    if not config.kl_coef:  # an adaptive coefficient is multiplied, and stays 0 as well
        unread |= dict.fromkeys(KL_OWN, "with kl_coef=0")
    if config.advantage not in WITH_CRITIC:
        unread |= dict.fromkeys(CRITICS_OWN, f"with advantage={config.advantage}, which has no critic")
    return unread


def _check_names(config: Any, methods: Methods) -> None:
    for kind, functions in methods.items():
        name = getattr(config, kind)
        check(f"ppo.{kind}", name, name in functions, "one of " + ", ".join(functions))


def _unread(config: Any, methods: Methods) -> dict[str, str]:
    """Settings of functions that were not chosen."""
    unread: dict[str, str] = {}
    for kind, functions in methods.items():
        chosen = getattr(config, kind)
        every = {name for function in functions.values() for name in _settings_of(function)} - {GROUPS_OF}
        unread |= dict.fromkeys(sorted(every - set(_settings_of(functions[chosen]))), f"with {kind}={chosen}")
    return unread


def _refuse_changed(config: Any, unread: dict[str, str]) -> None:
    for name, reason in unread.items():
        default = next(field.default for field in dataclasses.fields(config) if field.name == name)
        value = getattr(config, name)
        check(f"ppo.{name}", value, value == default, f"the default {default!r}: nothing reads it {reason}")


def _whitening(config: PPOConfig) -> str:
    if config.whiten_advantages != "auto":
        return config.whiten_advantages
    return "batch" if config.advantage in WHITENED else "none"


def _settings_of(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _bound(function: Callable, config: PPOConfig | ControlConfig) -> Callable:
    return partial(function, **{name: getattr(config, name) for name in _settings_of(function)})
