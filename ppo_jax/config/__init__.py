"""The settings of PPO, each with its default, its meaning and its range."""

import dataclasses

from ppo_jax.config.control import ControlConfig
from ppo_jax.config.learning import DescentOptions, LossOptions, OptimizerOptions
from ppo_jax.config.option import option
from ppo_jax.config.targets import AdvantageOptions, KLOptions, RewardOptions
from ppo_jax.errors import check

__all__ = ["ControlConfig", "DescentOptions", "PPOConfig", "option"]


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """What an iteration samples."""

    batch_size: int = option(64, "responses an iteration")
    responses_per_prompt: int = option(1, "of those, to each prompt; batch_size must be a multiple")
    prompt_length: int = option(32, "slots for the prompt, in tokens; shorter prompts are padded left")
    response_length: int = option(48, "longest response, in tokens")
    min_new_tokens: int = option(0, "no EOS before this many response tokens (in the policy's distribution as well)")
    temperature: float = option(1.0, "of the policy: in sampling, in the reference and in training alike")
    truncate_after: int = option(0, "with truncate_token: response tokens before it may end a response")
    stale_iterations: int = option(
        0, "updates by which the policy that acts is older than the one that learns; a reward on the host then runs "
        "beside the device"
    )  # fmt: skip

    def _check_rollouts(self) -> None:
        for name in "batch_size responses_per_prompt prompt_length response_length".split():
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("temperature", self.temperature, self.temperature > 0, "a number above 0")
        check("stale_iterations", self.stale_iterations, self.stale_iterations >= 0, "0 or more")
        for name in "min_new_tokens truncate_after".split():
            value = getattr(self, name)
            check(name, value, 0 <= value <= self.response_length, "from 0 to response_length")
        size, each = self.batch_size, self.responses_per_prompt
        check("batch_size", size, size % each == 0, f"a multiple of responses_per_prompt ({each})")


@dataclasses.dataclass(frozen=True)
class PPOConfig(OptimizerOptions, LossOptions, AdvantageOptions, KLOptions, RewardOptions, RolloutOptions):
    """Proximal policy optimisation of a language model against a score, with a KL penalty to a reference.

    Raises:
        InputError: a field outside its range.
    """

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        self._check_rollouts()
        self._check_rewards()
        self._check_kl()
        self._check_advantages()
        self._check_losses()
        self._check_optimizer()
        size, parts = self.batch_size, self.num_minibatches * self.accumulation
        check("batch_size", size, size % parts == 0, f"a multiple of num_minibatches x accumulation ({parts})")
        overlong = self.overlong_buffer
        check("overlong_buffer", overlong, overlong <= self.response_length, "at most response_length")
