"""Settings of the reward model."""

import dataclasses
import math

from experiments.settings.machinery import check_at_least
from experiments.settings.training import TrainingSettings
from ppo_jax.config import option
from ppo_jax.errors import check
from ppo_jax.optim import LR_SCHEDULES


@dataclasses.dataclass(frozen=True)
class RewardExperiment(TrainingSettings):
    """Settings of `experiments/train_reward.py`."""

    model: str = option("", "the language model that the reward model starts as: a Hugging Face folder or hub name")
    data: str = option(
        "",
        "a JSONL or Parquet file or a Hugging Face dataset of pairs (prompt, chosen, rejected, margin), rankings "
        "(prompt, completions, ranks), choices (prompt, completions, choice) or scores (prompt, completion, score)",
    )
    data_split: str = option("train", "split of a Hugging Face dataset")
    heldout: str = option("", "the same, for the accuracy; empty: the prompts of the last heldout_frac of the data")
    heldout_split: str = option("test", "split of a Hugging Face dataset in heldout")
    heldout_frac: float = option(0.1, "share of the data held out when there is no heldout")
    length: int = option(256, "slots for prompt, response and EOS, in tokens; judgements of longer texts are left out")
    normalize: bool = option(
        True,
        "gain and bias give the samples of the reference mean 0 and standard deviation 1, before and after training",
    )
    reference: str = option(
        "", "the policy whose samples those are, answering the data's prompts; empty: the responses in the data"
    )
    reference_samples: int = option(512, "how many")
    response_length: int = option(48, "longest response of the reference, in tokens")
    seed: int = option(0, "of the head and the data's order")
    num_epochs: int = option(1, "passes over the data")
    batch_size: int = option(32, "comparisons or ratings a step")
    lr: float = option(1e-5, "peak learning rate of Adam")
    lr_schedule: str = option("linear", "after the warm-up: " + ", ".join(LR_SCHEDULES))
    warmup_steps: int = option(10, "steps over which the learning rate rises linearly; the first of w has 1/w")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this global norm")
    use_margin: bool = option(True, "a pair's margin counts, where the data has one")
    center_coef: float = option(0.0, "weight of the penalty on a comparison's mean score, squared; 0.01 is customary")
    log_every: int = option(10, "steps between rows of metrics")
    eval_every: int = option(50, "steps between held-out accuracies; also after the last step")
    checkpoint_every: int = option(100, "steps between checkpoints; the last one is always saved")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("lr_schedule", self.lr_schedule, self.lr_schedule in LR_SCHEDULES, "one of " + ", ".join(LR_SCHEDULES))
        check("heldout_frac", self.heldout_frac, 0 < self.heldout_frac < 1, "a number in (0, 1)")
        super().__post_init__()
        needless = bool(self.reference) and not self.normalize
        check("reference", self.reference, not needless, "nothing, with normalize=False")
        check_at_least(self, 2, "length reference_samples")
        check_at_least(self, 1, "num_epochs batch_size response_length log_every eval_every checkpoint_every")
        check_at_least(self, 0, "seed warmup_steps weight_decay center_coef")
        for name in "lr max_grad_norm".split():
            check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
