"""The settings of PPO for control tasks."""

import dataclasses

from ppo_jax.config.learning import DescentOptions, SurrogateOptions
from ppo_jax.config.option import option
from ppo_jax.errors import check

TRUNKS = ("separate", "shared")
WHITENINGS = ("none", "batch", "minibatch")


@dataclasses.dataclass(frozen=True)
class ControlConfig(DescentOptions, SurrogateOptions):
    """Proximal policy optimisation of an actor-critic in N environments side by side.

    What it shares with `PPOConfig` has the same meaning; a token is a step here. Its defaults are those of the
    control literature where a language model wants others.

    Raises:
        InputError: a field outside its range.
    """

    num_envs: int = option(8, "environments side by side")
    num_steps: int = option(32, "steps that an iteration takes in each")
    gamma: float = option(0.98, "discount a step")
    gae_lambda: float = option(0.8, "0: one-step advantages, 1: Monte Carlo")
    whiten_advantages: str = option("minibatch", "advantages to mean 0 and variance 1 over: " + ", ".join(WHITENINGS))
    whiten_shift: bool = option(True, "that whitening subtracts the mean")
    trunk: str = option("separate", "hidden layers of policy and critic: " + ", ".join(TRUNKS))
    width: int = option(64, "of each hidden layer")
    depth: int = option(2, "hidden layers")
    num_epochs: int = option(20, "passes over the experience of an iteration")
    num_minibatches: int = option(1, "gradient steps a pass; num_envs x num_steps must be a multiple")
    lr: float = option(1e-3, "peak learning rate of Adam")
    lr_schedule: str = option("linear", DescentOptions.__dataclass_fields__["lr_schedule"].metadata["help"])
    adam_b2: float = option(0.999, "decay of Adam's second moment")
    adam_eps: float = option(1e-5, "added to the root of Adam's second moment")
    max_grad_norm: float = option(0.5, "the gradient is scaled down to this global norm")
    vf_coef: float = option(0.5, "weight of the value loss")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        self._check_losses()
        self._check_optimizer()
        for name in "num_envs num_steps width depth".split():
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in "gamma gae_lambda".split():
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        how = self.whiten_advantages
        check("whiten_advantages", how, how in WHITENINGS, "one of " + ", ".join(WHITENINGS))
        check("trunk", self.trunk, self.trunk in TRUNKS, "one of " + ", ".join(TRUNKS))
        size, parts = self.steps_per_iteration, self.num_minibatches
        check("num_envs x num_steps", size, size % parts == 0, f"a multiple of num_minibatches ({parts})")

    @property
    def steps_per_iteration(self) -> int:
        """Steps of all environments in one iteration."""
        return self.num_envs * self.num_steps
