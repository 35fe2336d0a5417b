"""The settings of PPO, each with its default, its meaning and its range."""

import dataclasses
from typing import Any

from ppo_jax.errors import check
from ppo_jax.kl import KL_ESTIMATORS
from ppo_jax.optim import LR_SCHEDULES


def option(default: Any, help: str) -> Any:
    """A dataclass field that documents itself: `--print_config` shows the help."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation of a language model against a score, with a KL penalty to a reference.

    Raises:
        InputError: a field outside its range.
    """

    batch_size: int = option(64, "prompts an iteration; each gets one response")
    prompt_length: int = option(32, "slots for the prompt, in tokens; shorter prompts are padded left")
    response_length: int = option(48, "longest response, in tokens")
    min_new_tokens: int = option(0, "no EOS before this many response tokens (in the policy's distribution as well)")
    temperature: float = option(1.0, "of the policy: in sampling, in the reference and in training alike")
    num_epochs: int = option(4, "passes over the experience of an iteration")
    num_minibatches: int = option(4, "gradient steps a pass; batch_size must be a multiple")
    lr: float = option(1e-5, "peak learning rate of Adam")
    lr_schedule: str = option("constant", "after the warm-up: " + ", ".join(LR_SCHEDULES))
    warmup_iterations: int = option(
        0, "iterations over which the learning rate rises linearly; a first gradient step of w has 1/w"
    )
    adam_b1: float = option(0.9, "decay of Adam's first moment")
    adam_b2: float = option(0.95, "decay of Adam's second moment")
    adam_eps: float = option(1e-8, "added to the root of Adam's second moment")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this global norm")
    clip_eps: float = option(0.2, "half width of the interval in which the policy's ratio is rewarded")
    value_clip_eps: float = option(0.2, "largest rewarded move of a value from its old one; inf: no clip")
    vf_coef: float = option(0.1, "weight of the value loss")
    ent_coef: float = option(0.0, "weight of the entropy bonus")
    gamma: float = option(1.0, "discount per token")
    gae_lambda: float = option(0.95, "0: one-step advantages, 1: Monte Carlo")
    whiten_advantages: bool = option(True, "advantages to mean 0 and variance 1 over the whole batch")
    kl_coef: float = option(0.05, "reward per nat of divergence from the reference, subtracted; the start, if adaptive")
    kl_estimator: str = option("k1", "of the KL in the reward: " + ", ".join(KL_ESTIMATORS))
    kl_target: float = option(0.0, "nats a sequence that an adaptive kl_coef steers to; 0: kl_coef is fixed")
    kl_horizon: float = option(10_000.0, "sequences over which the adaptive kl_coef answers")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        for name in "batch_size prompt_length response_length num_epochs num_minibatches".split():
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in "temperature lr clip_eps value_clip_eps max_grad_norm adam_eps kl_horizon".split():
            check(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in "vf_coef ent_coef kl_coef kl_target weight_decay warmup_iterations".split():
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in "gamma gae_lambda".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in "adam_b1 adam_b2".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        check(
            "min_new_tokens",
            self.min_new_tokens,
            0 <= self.min_new_tokens <= self.response_length,
            "from 0 to response_length",
        )
        check(
            "kl_estimator", self.kl_estimator, self.kl_estimator in KL_ESTIMATORS, "one of " + ", ".join(KL_ESTIMATORS)
        )
        check("lr_schedule", self.lr_schedule, self.lr_schedule in LR_SCHEDULES, "one of " + ", ".join(LR_SCHEDULES))
        check(
            "batch_size",
            self.batch_size,
            self.batch_size % self.num_minibatches == 0,
            f"a multiple of num_minibatches ({self.num_minibatches})",
        )

    @property
    def updates_per_iteration(self) -> int:
        """Gradient steps of one iteration."""
        return self.num_epochs * self.num_minibatches
