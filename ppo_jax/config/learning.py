"""Settings from the advantages to the parameters: the losses and the optimizer."""

import dataclasses
import math

from ppo_jax.config.option import option
from ppo_jax.errors import check
from ppo_jax.losses import AGGREGATIONS
from ppo_jax.optim import ADAM_EPS_FORMS, LR_SCHEDULES

IMPORTANCES = ("none", "truncate", "mask")


@dataclasses.dataclass(frozen=True)
class SurrogateOptions:
    """The losses of any task. A field that the chosen ones do not read has to keep its default."""

    policy_loss: str = option("clip", "the surrogate; experiments/methods.py names them all")
    clip_eps: float = option(0.2, "the policy's ratio is rewarded down to 1 - this")
    clip_eps_high: float = option(0.0, "and up to 1 + this (cispo: its weights are); 0: clip_eps")
    dual_clip: float = option(0.0, "largest ratio that counts where the advantage is negative (3 is usual); 0: none")
    ent_coef: float = option(0.0, "weight of the entropy bonus")
    value_loss: str = option("squared", "the critic's error; experiments/methods.py names them all")
    value_clip_eps: float = option(0.2, "with value_loss=clip: largest rewarded move of a value from its old one")
    huber_delta: float = option(1.0, "with value_loss=huber: where the error turns from square to straight")
    vf_coef: float = option(0.1, "weight of the value loss")

    def _check_losses(self) -> None:
        for name in "clip_eps value_clip_eps huber_delta".split():
            check(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in "clip_eps_high ent_coef vf_coef".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        check("dual_clip", self.dual_clip, self.dual_clip == 0 or self.dual_clip > 1, "a number above 1, or 0")


@dataclasses.dataclass(frozen=True)
class LossOptions(SurrogateOptions):
    """The losses of a language model."""

    loss_aggregation: str = option("token", "the mean over: " + ", ".join(AGGREGATIONS))
    importance: str = option(
        "none", "weights of stale tokens by exp(old - behaviour logprob): none, truncate (TIS), mask"
    )
    importance_cap: float = option(2.0, "with importance: where weights are truncated, or beyond which (and its "
                                        "inverse) tokens are masked")  # fmt: skip
    ptx_coef: float = option(0.0, "weight of the next-token loss on texts of their own (ptx_data)")

    def _check_losses(self) -> None:
        super()._check_losses()
        check("ptx_coef", self.ptx_coef, 0 <= self.ptx_coef < math.inf, "0 or more")
        how = self.loss_aggregation
        check("loss_aggregation", how, how in AGGREGATIONS, "one of " + ", ".join(AGGREGATIONS))
        check("importance", self.importance, self.importance in IMPORTANCES, "one of " + ", ".join(IMPORTANCES))
        check("importance_cap", self.importance_cap, self.importance_cap >= 1, "1 or more")


@dataclasses.dataclass(frozen=True)
class DescentOptions:
    """The gradient steps of an iteration, of any task."""

    num_epochs: int = option(2, "passes over the experience of an iteration")
    num_minibatches: int = option(4, "gradient steps a pass; what an iteration samples must be a multiple")
    target_kl: float = option(
        0.0, "nats a token from the old policy to the one that learns; a minibatch beyond ends the epochs; 0: never"
    )
    ratio_threshold: float = option(math.inf, "a minibatch whose mean ratio is above is not learned from")
    lr: float = option(1e-5, "peak learning rate of Adam")
    lr_schedule: str = option("constant", "after the warm-up: " + ", ".join(LR_SCHEDULES))
    warmup_iterations: int = option(
        0, "iterations over which the learning rate rises linearly; a first gradient step of w has 1/w"
    )
    adam_b1: float = option(0.9, "decay of Adam's first moment")
    adam_b2: float = option(0.95, "decay of Adam's second moment")
    adam_eps: float = option(1e-8, "added to the root of Adam's second moment")
    adam_eps_form: str = option(
        "pytorch", "where it is added: after the correction of the moments' bias (pytorch), or before it (tensorflow)"
    )
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this global norm")

    def _check_optimizer(self) -> None:
        for name in "num_epochs num_minibatches".split():
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in "lr max_grad_norm adam_eps ratio_threshold".split():
            check(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")
        for name in "weight_decay warmup_iterations".split():
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("target_kl", self.target_kl, 0 <= self.target_kl < math.inf, "0 or more")
        for name in "adam_b1 adam_b2".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        check("lr_schedule", self.lr_schedule, self.lr_schedule in LR_SCHEDULES, "one of " + ", ".join(LR_SCHEDULES))
        form = self.adam_eps_form
        check("adam_eps_form", form, form in ADAM_EPS_FORMS, "one of " + ", ".join(ADAM_EPS_FORMS))

    @property
    def updates_per_iteration(self) -> int:
        """Gradient steps of one iteration."""
        return self.num_epochs * self.num_minibatches


@dataclasses.dataclass(frozen=True)
class OptimizerOptions(DescentOptions):
    """The gradient steps of an iteration of a language model."""

    accumulation: int = option(1, "parts of a minibatch, one after the other: the same steps in less memory")
    critic_lr: float = option(0.0, "learning rate of the critic's own parameters; 0: lr")
    critic_warmup_iterations: int = option(0, "iterations in which only the critic's own parameters move")
    ema_decay: float = option(0.0, "per iteration, of the moving average of the policy that is exported; 0: none")
    noise_scale: bool = option(False, "logs the gradient noise scale; needs accumulation")
    max_skipped: int = option(3, "iterations in a row with something that is not finite, before the run ends")

    def _check_optimizer(self) -> None:
        super()._check_optimizer()
        check("accumulation", self.accumulation, self.accumulation >= 1, "at least 1")
        for name in "critic_lr critic_warmup_iterations max_skipped".split():
            check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        check("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "a number in [0, 1)")
        check("noise_scale", self.noise_scale, not self.noise_scale or self.accumulation > 1, "False, or accumulation")
