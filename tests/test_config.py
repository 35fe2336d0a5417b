"""`PPOConfig`: what is refused, with which words, and that every field is read by somebody."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest

from experiments.methods import METHODS
from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError

ROOT = Path(__file__).parents[1]
NUMBER_ABOVE_0 = "expected a number above 0"
FRACTION = r"expected a number in \[0, 1\]"

NOT_NEGATIVE = "expected 0 or more"

REFUSED = [
    *((name, 0, "expected at least 1") for name in "batch_size prompt_length response_length".split()),
    *((name, 0, "expected at least 1") for name in "num_epochs num_minibatches responses_per_prompt".split()),
    ("accumulation", 0, "expected at least 1"),
    *((name, 0.0, NUMBER_ABOVE_0) for name in "temperature lr clip_eps value_clip_eps max_grad_norm".split()),
    *((name, -1.0, NUMBER_ABOVE_0) for name in "temperature lr adam_eps kl_horizon score_clip kl_clamp".split()),
    *((name, x, NUMBER_ABOVE_0) for name in "ratio_threshold huber_delta".split() for x in (0.0, math.nan)),
    *((name, math.nan, NUMBER_ABOVE_0) for name in "temperature lr clip_eps score_clip kl_clamp".split()),
    *((name, -0.1, NOT_NEGATIVE) for name in "vf_coef ent_coef kl_coef kl_target weight_decay critic_lr".split()),
    *((name, -0.1, NOT_NEGATIVE) for name in "clip_eps_high ptx_coef target_kl missing_eos_penalty".split()),
    *((name, -0.1, NOT_NEGATIVE) for name in "overlong_penalty lambda_length_scale".split()),
    *((name, x, NOT_NEGATIVE) for name in "vf_coef kl_coef clip_eps_high target_kl".split() for x in (math.nan,
                                                                                                   math.inf)),
    *((name, -1, NOT_NEGATIVE) for name in "warmup_iterations critic_warmup_iterations max_skipped".split()),
    *((name, -1, NOT_NEGATIVE) for name in "stale_iterations overlong_buffer".split()),
    *((name, x, FRACTION) for name in ("gamma", "gae_lambda") for x in (-0.1, 1.1, math.nan)),
    *(("critic_lambda", x, FRACTION + ", or -1") for x in (-0.1, 1.1, math.nan)),
    *((name, x, r"expected a number in \[0, 1\)") for name in "adam_b1 adam_b2 ema_decay baseline_decay".split()
      for x in (-0.1, 1.0)),
    *((name, x, "expected from 0 to response_length") for name in ("min_new_tokens", "truncate_after")
      for x in (-1, 49)),
    *((name, x, "expected a finite number") for name in ("missing_token_score", "length_penalty")
      for x in (math.nan, -math.inf)),
    *(("dual_clip", x, "expected a number above 1, or 0") for x in (-1.0, 0.5, 1.0, math.nan)),
    *(("importance_cap", x, "expected 1 or more") for x in (0.9, math.nan)),
    ("overlong_buffer", 49, "expected at most response_length"),
    ("score_scale", "std", "expected one of none, running, batch, reference"),
    ("kl_estimator", "k4", "expected one of k1, k2, k3, abs, k3_k2, exact"),
    ("kl_estimator", "k3_k2", "expected another with kl_in=reward: k3_k2 differs from k3 in its gradient"),
    ("kl_in", "advantage", "expected one of reward, loss"),
    ("whiten_advantages", True, "expected one of auto, none, batch, minibatch"),
    ("loss_aggregation", "mean", "expected one of token, sequence, constant"),
    ("importance", "clip", "expected one of none, truncate, mask"),
    ("adam_eps_form", "jax", "expected one of pytorch, tensorflow"),
    ("lr_schedule", "step", "expected one of constant, linear, cosine"),
    ("noise_scale", True, "expected False, or accumulation"),
    ("batch_size", 66, r"expected a multiple of num_minibatches x accumulation \(4\)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_value_that_cannot_be_is_refused_by_name_and_with_what_was_expected(name, value, expected):
    with pytest.raises(InputError, match=f"^{name}: got {re.escape(repr(value))}, {expected}$"):
        PPOConfig(**{name: value})


ZEROS = "vf_coef ent_coef kl_coef kl_target weight_decay gamma gae_lambda adam_b1 critic_lambda ema_decay".split()
ALLOWED = {
    "zeros": dict.fromkeys(ZEROS, 0.0),
    "ones": {"batch_size": 1, "num_minibatches": 1, "num_epochs": 1, "prompt_length": 1, "response_length": 1},
    "no clips": dict.fromkeys("value_clip_eps score_clip kl_clamp ratio_threshold importance_cap".split(), math.inf),
    "no early end": {"response_length": 5, "min_new_tokens": 5, "truncate_after": 5, "overlong_buffer": 5},
    "a bonus for length": {"length_penalty": -0.1, "missing_token_score": -13.0},
    "groups": {"batch_size": 48, "responses_per_prompt": 6, "num_minibatches": 3, "accumulation": 2},
    "noise": {"noise_scale": True, "accumulation": 2},
    "straight through": {"kl_in": "loss", "kl_estimator": "k3_k2"},
}


@pytest.mark.parametrize("fields", ALLOWED.values(), ids=ALLOWED)
def test_the_ends_of_the_ranges_are_allowed(fields):
    config = PPOConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


# Any of their values may be, and names of methods belong to experiments/methods.py.
WITHOUT_RANGE = {"score_shift", "whiten_rewards", "whiten_shift", "exact_kl"}
NAMES = {"advantage", "policy_loss", "value_loss"}


def test_refused_fields_cover_every_field_with_a_range():
    ranged = {field.name for field in dataclasses.fields(PPOConfig)} - WITHOUT_RANGE - NAMES
    assert {name for name, _, _ in REFUSED} == ranged


@pytest.mark.parametrize(("size", "each"), [(6, 4), (4, 8)])
def test_a_batch_has_the_same_number_of_responses_to_each_prompt(size, each):
    with pytest.raises(InputError, match=rf"^batch_size: got {size}, expected a multiple of responses_per_prompt"):
        PPOConfig(batch_size=size, responses_per_prompt=each, num_minibatches=1)


def test_updates_per_iteration():
    assert PPOConfig(batch_size=12, num_epochs=3, num_minibatches=4).updates_per_iteration == 12


def test_a_config_is_frozen_and_hashable():
    config = PPOConfig()
    assert hash(config) == hash(PPOConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_every_field_has_a_help_text():
    assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(PPOConfig))


def test_every_field_is_read_by_the_training_programs():
    # That a field is read is the least; what it changes is tested in test_experience.py, test_update*.py, test_optim.py
    # and test_ppo.py.
    paths = [*(ROOT / "ppo_jax").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    source = "".join(path.read_text() for path in paths)
    read = set(re.findall(r"(?:config|ppo)\.(\w+)", source))
    read |= {"num_epochs", "num_minibatches"} if "updates_per_iteration" in read else set()
    for functions in METHODS.values():
        for function in functions.values():
            read |= inspect.signature(function).parameters.keys()
    unread = {field.name for field in dataclasses.fields(PPOConfig)} - read - NAMES
    assert not unread
