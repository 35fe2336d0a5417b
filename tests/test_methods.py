"""Names of methods become functions; a setting that none of them reads is refused by name, with the reason."""

import dataclasses
import inspect
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.methods import METHODS, idle, resolve
from ppo_jax import advantages, losses
from ppo_jax.advantages import Targets
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError

DEFAULTS = {field.name: field.default for field in dataclasses.fields(PPOConfig)}
CRITIC_FREE = [name for name in METHODS["advantage"] if name != "gae"]


def named(advantage: str, **changes) -> PPOConfig:
    """A configuration with this estimator, and with groups where it needs them."""
    grouped = advantage in ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")
    return PPOConfig(advantage=advantage, responses_per_prompt=4 if grouped else 1, **changes)


def refused(config: PPOConfig) -> str:
    with pytest.raises(InputError) as error:
        resolve(config)
    return str(error.value)


@pytest.mark.parametrize(("kind", "names"), [
    ("advantage", "gae, rloo, grpo, dr_grpo, reinforce, reinforce_pp, reinforce_pp_baseline, remax"),
    ("policy_loss", "clip, gspo, cispo, none"),
    ("value_loss", "clip, squared, huber"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_those_there_are(kind, names):
    assert refused(PPOConfig(**{kind: "best"})) == f"ppo.{kind}: got 'best', expected one of {names}"


def test_every_estimator_surrogate_and_error_of_the_mathematics_has_a_name():
    """What is written and tested below can be chosen here; helpers of other kinds do not end like this."""
    endings = {"advantage": (advantages, "_advantages"), "policy_loss": (losses, "_surrogate"),
               "value_loss": (losses, "_value_error")}  # fmt: skip
    for kind, (module, ending) in endings.items():
        written = {x for name, x in inspect.getmembers(module, inspect.isfunction) if name.endswith(ending)}
        assert written == set(METHODS[kind].values())
    parameters = {
        name
        for functions in METHODS.values()
        for function in functions.values()
        for name, x in inspect.signature(function).parameters.items()
        if x.kind is x.KEYWORD_ONLY
    }
    assert parameters <= DEFAULTS.keys()


@pytest.mark.parametrize("advantage", METHODS["advantage"])
def test_a_named_method_has_its_functions_with_their_settings(advantage):
    method = resolve(named(advantage))
    assert method.advantages.func is METHODS["advantage"][advantage]
    assert method.critic == (advantage == "gae")
    assert method.greedy == (advantage == "remax")
    assert method.whitening == ("batch" if "reinforce_pp" in advantage or advantage == "gae" else "none")
    assert method.config == named(advantage)


def test_settings_are_bound_by_their_names():
    config = PPOConfig(gamma=0.9, gae_lambda=0.5, critic_lambda=1.0, clip_eps=0.1, clip_eps_high=0.3, dual_clip=2.0,
                       value_loss="huber", huber_delta=0.25)  # fmt: skip
    method = resolve(config)
    assert method.advantages.keywords == {"gamma": 0.9, "gae_lambda": 0.5, "critic_lambda": 1.0,
                                          "lambda_length_scale": 0.0}  # fmt: skip
    # Ratio 1.5 with advantage 1 is clipped at 1.3; ratio 3 with advantage -1 at the dual clip of 2.
    logprobs, advantages = jnp.log(jnp.array([[1.5, 3.0]])), jnp.array([[1.0, -1.0]])
    loss, _ = method.surrogate(logprobs, jnp.zeros((1, 2)), advantages, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(loss, [[-1.3, 2.0]], rtol=1e-6)
    # Huber at 0.25 of an error of 2: 0.25 x (2 - 0.125).
    error, _ = method.value_error(jnp.array([[2.0]]), *[jnp.zeros((1, 1))] * 2, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(error, [[0.25 * 1.875]], rtol=1e-6)
    # Reward 1 on the last of two tokens, values 0: 1 x 0.9 x 0.5 for the policy, 0.9 for the critic.
    rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
    targets = Targets(rewards, mask, jnp.zeros((1, 2)), jnp.zeros(1), jnp.float32(0))
    found, returns = method.advantages(targets)
    np.testing.assert_allclose([found[0, 0], returns[0, 0]], [0.45, 0.9], rtol=1e-6)


@pytest.mark.parametrize("whitening", ["none", "batch", "minibatch"])
@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_a_whitening_that_is_named_is_taken(whitening, advantage):
    assert resolve(named(advantage, whiten_advantages=whitening)).whitening == whitening


# What nothing reads.

IDLE = [
    *((f"advantage={name}", named(name), "gae_lambda", 0.5) for name in CRITIC_FREE),
    *((f"advantage={name}", named(name), "critic_lambda", 1.0) for name in CRITIC_FREE),
    *((f"advantage={name}", named(name), "lambda_length_scale", 0.05) for name in CRITIC_FREE),
    *((f"advantage={name}", named(name), "gamma", 0.9) for name in ("rloo", "grpo", "dr_grpo",
                                                                    "reinforce_pp_baseline")),
    *((f"advantage={name}, which has no critic", named(name), field, value) for name in CRITIC_FREE
      for field, value in (("vf_coef", 0.2), ("value_loss", "clip"), ("value_clip_eps", 0.3), ("critic_lr", 1e-4),
                           ("huber_delta", 2.0), ("critic_warmup_iterations", 1))),
    *((f"advantage={name}", named(name), "baseline_decay", 0.5) for name in METHODS["advantage"]
      if name != "reinforce"),
    *(("where advantages are not whitened", named(name), "whiten_shift", False)
      for name in ("rloo", "grpo", "remax", "reinforce")),
    ("where advantages are not whitened", PPOConfig(whiten_advantages="none"), "whiten_shift", False),
    ("policy_loss=none", PPOConfig(policy_loss="none"), "clip_eps", 0.1),
    ("policy_loss=none", PPOConfig(policy_loss="none"), "clip_eps_high", 0.1),
    ("policy_loss=gspo", PPOConfig(policy_loss="gspo"), "dual_clip", 3.0),
    ("policy_loss=cispo", PPOConfig(policy_loss="cispo", clip_eps_high=4.0), "clip_eps", 0.1),
    ("policy_loss=cispo", PPOConfig(policy_loss="cispo", clip_eps_high=4.0), "dual_clip", 3.0),
    ("value_loss=clip", PPOConfig(value_loss="clip"), "huber_delta", 2.0),
    ("value_loss=squared", PPOConfig(), "value_clip_eps", 0.1),
    ("value_loss=huber", PPOConfig(value_loss="huber"), "value_clip_eps", 0.1),
    ("without overlong_buffer", PPOConfig(), "overlong_penalty", 2.0),
    ("without score_scale", PPOConfig(score_scale="none"), "score_shift", False),
    *(("with kl_coef=0", PPOConfig(kl_coef=0.0), field, value) for field, value in (
        ("kl_estimator", "k3"), ("kl_in", "loss"), ("kl_clamp", 5.0), ("kl_target", 6.0))),
    ("with vf_coef=0", PPOConfig(vf_coef=0.0), "critic_lr", 1e-4),
    ("with kl_in=reward and kl_estimator=exact", PPOConfig(kl_estimator="exact"), "exact_kl", True),
    ("without kl_target", PPOConfig(), "kl_horizon", 10.0),
    ("without importance", PPOConfig(), "importance_cap", 3.0),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "config", "field", "value"), IDLE, ids=[f"{x[2]} {x[0]}" for x in IDLE])
def test_a_setting_that_nothing_reads_is_refused(reason, config, field, value):
    resolve(config)
    told = refused(dataclasses.replace(config, **{field: value}))
    expected = f"ppo.{field}: got {value!r}, expected the default {DEFAULTS[field]!r}: nothing reads it"
    assert told.startswith(expected)
    assert reason.split(",")[0] in told


READ = [
    PPOConfig(gamma=0.9, gae_lambda=0.5, critic_lambda=1.0, whiten_shift=False),
    PPOConfig(gae_lambda=0.5, lambda_length_scale=0.05),
    PPOConfig(critic_lambda=1.0, lambda_length_scale=0.05),
    PPOConfig(clip_eps=0.1, clip_eps_high=0.3, dual_clip=3.0),
    PPOConfig(value_loss="clip", value_clip_eps=math.inf, vf_coef=1.0, critic_lr=1e-4),
    PPOConfig(policy_loss="gspo", clip_eps=3e-4, clip_eps_high=4e-4),
    PPOConfig(policy_loss="cispo", clip_eps_high=4.0),
    PPOConfig(value_loss="huber", huber_delta=2.0, critic_warmup_iterations=2, responses_per_prompt=4),
    PPOConfig(overlong_buffer=4, overlong_penalty=2.0, score_scale="running", score_shift=False),
    PPOConfig(kl_target=6.0, kl_horizon=10.0, importance="mask", importance_cap=3.0, stale_iterations=1),
    named("reinforce", gamma=0.9, baseline_decay=0.5, whiten_advantages="batch", whiten_shift=False),
    PPOConfig(vf_coef=0.0, weight_decay=0.1, critic_lr=1e-4),
    PPOConfig(kl_in="loss", kl_estimator="exact", exact_kl=True),
    named("grpo", whiten_advantages="batch", whiten_shift=False),
    named("reinforce_pp", gamma=0.9),
    named("remax", gamma=0.9),
]


@pytest.mark.parametrize("config", READ, ids=range(len(READ)))
def test_the_same_settings_are_accepted_where_they_are_read(config):
    resolve(config)


def test_a_setting_is_idle_by_what_the_others_are():
    assert idle(PPOConfig()).keys() == {
        "huber_delta", "value_clip_eps", "overlong_penalty", "kl_horizon", "importance_cap", "baseline_decay",
    }  # fmt: skip


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "dr_grpo", "reinforce_pp_baseline"])
def test_groups_of_one_are_refused_where_responses_are_compared(advantage):
    told = refused(PPOConfig(advantage=advantage))
    assert told == f"ppo.responses_per_prompt: got 1, expected at least 2 with advantage={advantage}"


REFUSED = {
    "ppo.stale_iterations: got 1, expected 0 with advantage=remax": named("remax", stale_iterations=1),
    "ppo.clip_eps_high: got 0.0, expected above 0 with policy_loss=cispo": PPOConfig(policy_loss="cispo"),
    "ppo.gae_lambda: got 0.5, expected the default": PPOConfig(
        gae_lambda=0.5, lambda_length_scale=0.05, critic_lambda=1.0
    ),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_go_together_is_refused(told):
    assert re.match(re.escape(told), refused(REFUSED[told]))
