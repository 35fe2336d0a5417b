"""`PPOConfig`: what is refused, with which words, and that every field is read by somebody."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from ppo_jax.config import PPOConfig
from ppo_jax.errors import InputError

ROOT = Path(__file__).parents[1]
NUMBER_ABOVE_0 = "expected a number above 0"
FRACTION = r"expected a number in \[0, 1\]"

REFUSED = [
    *((name, 0, "expected at least 1") for name in ("batch_size", "prompt_length", "response_length")),
    *((name, 0, "expected at least 1") for name in ("num_epochs", "num_minibatches")),
    *((name, 0.0, NUMBER_ABOVE_0) for name in ("temperature", "lr", "clip_eps", "value_clip_eps", "max_grad_norm")),
    *((name, -1.0, NUMBER_ABOVE_0) for name in ("temperature", "lr", "adam_eps", "kl_horizon")),
    *((name, math.nan, NUMBER_ABOVE_0) for name in ("temperature", "lr", "clip_eps")),
    *((name, -0.1, "expected 0 or more") for name in ("vf_coef", "ent_coef", "kl_coef", "kl_target", "weight_decay")),
    *((name, math.nan, "expected 0 or more") for name in ("vf_coef", "kl_coef")),
    ("warmup_iterations", -1, "expected 0 or more"),
    *((name, x, FRACTION) for name in ("gamma", "gae_lambda") for x in (-0.1, 1.1, math.nan)),
    *((name, x, r"expected a number in \[0, 1\)") for name in ("adam_b1", "adam_b2") for x in (-0.1, 1.0)),
    *(("min_new_tokens", x, "expected from 0 to response_length") for x in (-1, 49)),
    ("kl_estimator", "k4", "expected one of k1, k2, k3"),
    ("lr_schedule", "step", "expected one of constant, linear, cosine"),
    ("batch_size", 66, r"expected a multiple of num_minibatches \(4\)"),
]


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_value_that_cannot_be_is_refused_by_name_and_with_what_was_expected(name, value, expected):
    with pytest.raises(InputError, match=f"^{name}: got {re.escape(repr(value))}, {expected}$"):
        PPOConfig(**{name: value})


ALLOWED = {
    "zeros": dict.fromkeys("vf_coef ent_coef kl_coef kl_target weight_decay gamma gae_lambda adam_b1".split(), 0.0),
    "ones": {"batch_size": 1, "num_minibatches": 1, "num_epochs": 1, "prompt_length": 1, "response_length": 1},
    "no value clip": {"value_clip_eps": math.inf},
    "no early end": {"response_length": 5, "min_new_tokens": 5},
}


@pytest.mark.parametrize("fields", ALLOWED.values(), ids=ALLOWED)
def test_the_ends_of_the_ranges_are_allowed(fields):
    config = PPOConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_refused_fields_cover_every_field_with_a_range():
    ranged = {field.name for field in dataclasses.fields(PPOConfig)} - {"whiten_advantages"}
    assert {name for name, _, _ in REFUSED} == ranged


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
    # That a field is read is the least; what it changes is tested in test_ppo.py.
    source = "".join((ROOT / path).read_text() for path in ("ppo_jax/ppo.py", "experiments/train_ppo.py"))
    read = set(re.findall(r"config\.(\w+)", source))
    read |= {"num_epochs", "num_minibatches"} if "updates_per_iteration" in read else set()
    unread = {field.name for field in dataclasses.fields(PPOConfig)} - read
    assert not unread
