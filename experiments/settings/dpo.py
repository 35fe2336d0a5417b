"""Settings of direct preference learning."""

import dataclasses
import math

from experiments.settings.machinery import check_at_least
from experiments.settings.training import TrainingSettings
from ppo_jax.config import option
from ppo_jax.dpo import DPOConfig
from ppo_jax.errors import check
from ppo_jax.optim import LR_SCHEDULES


@dataclasses.dataclass(frozen=True)
class DPOExperiment(DPOConfig, TrainingSettings):
    """Settings of `experiments/train_dpo.py`."""

    model: str = option("", "the policy and its reference: a Hugging Face folder, or a name on the hub")
    data: str = option(
        "",
        "a JSONL or Parquet file or a Hugging Face dataset of pairs (prompt, chosen, rejected), rankings (prompt, "
        "completions, ranks) or choices (prompt, completions, choice); for kto also scores (prompt, completion, score)",
    )
    data_split: str = option("train", "split of a Hugging Face dataset")
    heldout: str = option("", "the same, for the accuracy; empty: the prompts of the last heldout_frac of the data")
    heldout_split: str = option("test", "split of a Hugging Face dataset in heldout")
    heldout_frac: float = option(0.1, "share of the data held out when there is no heldout")
    length: int = option(256, "slots for prompt, response and EOS, in tokens; judgements of longer texts are left out")
    threshold: float = option(0.0, "kto, of scores: a response is desirable if its score is above this")
    seed: int = option(0, "of the data's order")
    num_epochs: int = option(1, "passes over the data")
    batch_size: int = option(32, "pairs a step; kto: responses a step")
    accumulation: int = option(1, "parts of a batch, one after the other: the same steps in less memory")
    lr: float = option(1e-6, "peak learning rate of Adam")
    lr_schedule: str = option("linear", "after the warm-up: " + ", ".join(LR_SCHEDULES))
    warmup_steps: int = option(10, "steps over which the learning rate rises linearly; the first of w has 1/w")
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this global norm")
    log_every: int = option(10, "steps between rows of metrics")
    eval_every: int = option(50, "steps between held-out accuracies; also after the last step")
    checkpoint_every: int = option(100, "steps between checkpoints; the last one is always saved")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        DPOConfig.__post_init__(self)
        TrainingSettings.__post_init__(self)
        check("lr_schedule", self.lr_schedule, self.lr_schedule in LR_SCHEDULES, "one of " + ", ".join(LR_SCHEDULES))
        check("heldout_frac", self.heldout_frac, 0 < self.heldout_frac < 1, "a number in (0, 1)")
        check("threshold", self.threshold, math.isfinite(self.threshold), "a finite number")
        check("threshold", self.threshold, self.loss == "kto" or self.threshold == 0, f"0 with loss={self.loss}")
        check_at_least(self, 2, "length")
        check_at_least(self, 1, "num_epochs batch_size accumulation log_every eval_every checkpoint_every")
        check_at_least(self, 0, "seed warmup_steps weight_decay")
        least = 2 if self.loss == "kto" else 1
        told = f"at least {least} with loss={self.loss}, which needs completions of other prompts"
        check("batch_size", self.batch_size, self.batch_size >= least, told)
        for name in "lr max_grad_norm".split():
            check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
