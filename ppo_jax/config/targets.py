"""Settings from the judge's score to the advantages: what is rewarded, and how the reward reaches a token."""

import dataclasses
import math

from ppo_jax.config.option import option
from ppo_jax.errors import check
from ppo_jax.kl import KL_ESTIMATORS

SCORE_SCALES = ("none", "running", "batch", "reference")
KL_PLACES = ("reward", "loss")
WHITENINGS = ("auto", "none", "batch", "minibatch")


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """From the judges' scores to the reward of a response, in this order; from score_clip on in score_scale's units."""

    missing_token_score: float = option(
        -1.0, "with truncate_token: the score of a response without it, whatever the judge says of the whole"
    )
    score_scale: str = option(
        "reference",
        "divides the scores by a standard deviation: running (of all so far), batch, or reference (of the reference's "
        "own responses, before the first iteration); none",
    )
    score_shift: bool = option(True, "with score_scale: subtracts the mean of the same as well")
    score_clip: float = option(math.inf, "scores are clipped to +- this")
    missing_eos_penalty: float = option(0.0, "subtracted from the score of a response that was cut by its length")
    length_penalty: float = option(0.0, "subtracted from the score for each response token")
    overlong_buffer: int = option(
        0, "the last so many of response_length tokens are penalised, linearly up to overlong_penalty (DAPO)"
    )
    overlong_penalty: float = option(1.0, "with overlong_buffer: the penalty of a response of full length")
    whiten_rewards: bool = option(False, "rewards of all tokens of a batch, KL included, to variance 1, mean unchanged")

    def _check_rewards(self) -> None:
        check("score_scale", self.score_scale, self.score_scale in SCORE_SCALES, "one of " + ", ".join(SCORE_SCALES))
        check("score_clip", self.score_clip, self.score_clip > 0, "a number above 0")
        for name in "missing_eos_penalty overlong_buffer overlong_penalty".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in "missing_token_score length_penalty".split():
            check(name, getattr(self, name), math.isfinite(getattr(self, name)), "a finite number")


@dataclasses.dataclass(frozen=True)
class KLOptions:
    """How the policy is kept near its reference."""

    kl_coef: float = option(0.05, "price of a nat of divergence from the reference; the start, if adaptive")
    kl_estimator: str = option("k1", "of the KL that is penalised: " + ", ".join(KL_ESTIMATORS))
    kl_in: str = option("reward", "where the penalty stands: " + " or ".join(KL_PLACES))
    kl_clamp: float = option(math.inf, "log ratios of policy and reference are clipped to +- this many nats in it")
    kl_target: float = option(0.0, "nats a sequence that an adaptive kl_coef steers to; 0: kl_coef is fixed")
    kl_horizon: float = option(10_000.0, "with kl_target: sequences over which the adaptive kl_coef answers")
    exact_kl: bool = option(False, "logs the KL over the whole vocabulary as well: one more pass of the policy")

    def _check_kl(self) -> None:
        for name in "kl_coef kl_target".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in "kl_horizon kl_clamp".split():
            check(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        estimator = self.kl_estimator
        check("kl_estimator", estimator, estimator in KL_ESTIMATORS, "one of " + ", ".join(KL_ESTIMATORS))
        check("kl_in", self.kl_in, self.kl_in in KL_PLACES, "one of " + ", ".join(KL_PLACES))
        rewarded = not (self.kl_in == "reward" and estimator == "k3_k2")
        check("kl_estimator", estimator, rewarded, "another with kl_in=reward: k3_k2 differs from k3 in its gradient")


@dataclasses.dataclass(frozen=True)
class AdvantageOptions:
    """From rewards to advantages. A field that the chosen method does not read has to keep its default."""

    advantage: str = option("gae", "the estimator of advantages; experiments/methods.py names them all")
    gamma: float = option(1.0, "discount per token")
    gae_lambda: float = option(1.0, "0: one-step advantages, 1: Monte Carlo")
    critic_lambda: float = option(-1.0, "the same for what the critic learns (VAPO: 1); -1: gae_lambda")
    lambda_length_scale: float = option(
        0.0, "a: the policy's lambda is 1 - 1 / (a x length of the response) (VAPO: 0.05); 0: gae_lambda"
    )
    baseline_decay: float = option(0.9, "of the running mean of rewards that REINFORCE subtracts")
    whiten_advantages: str = option(
        "auto",
        "advantages to mean 0 and variance 1 over: none, batch, minibatch; auto: batch for gae and both of "
        "reinforce_pp, which were published with it, none for the others",
    )
    whiten_shift: bool = option(True, "that whitening subtracts the mean")

    def _check_advantages(self) -> None:
        for name in "gamma gae_lambda".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        own = self.critic_lambda
        check("critic_lambda", own, own == -1 or 0 <= own <= 1, "a number in [0, 1], or -1")
        scale = self.lambda_length_scale
        check("lambda_length_scale", scale, 0 <= scale < math.inf, "0 or more")
        check("baseline_decay", self.baseline_decay, 0 <= self.baseline_decay < 1, "a number in [0, 1)")
        how = self.whiten_advantages
        check("whiten_advantages", how, how in WHITENINGS, "one of " + ", ".join(WHITENINGS))
