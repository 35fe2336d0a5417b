"""Settings of PPO of a language model."""

import dataclasses
from typing import Any

from experiments.methods import resolve
from experiments.settings.machinery import check_at_least
from experiments.settings.training import TrainingSettings
from ppo_jax.config import PPOConfig, option
from ppo_jax.data import LONG_PROMPTS
from ppo_jax.errors import check
from ppo_jax.models import LoRAConfig
from ppo_jax.rewards import HttpOptions


@dataclasses.dataclass(frozen=True)
class LoRASettings:
    """Adapters of low rank, in the place of the parameters themselves."""

    rank: int = option(0, "of the adapters; 0: none, all parameters are trained")
    alpha: float = option(16.0, "strength of the adapters: they are scaled by alpha / rank")
    targets: str = option(
        LoRAConfig().targets, "which projections, as a regular expression over paths such as layer_0/attention/query"
    )
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    dora: bool = option(False, "train the magnitude of each output as well")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("lora.rank", self.rank, self.rank >= 0, "0 or more")
        for field in dataclasses.fields(self):
            _check_idle(self, field.name, self.rank > 0, "without lora.rank")
        self.config()

    def config(self) -> LoRAConfig | None:
        """What the model needs to know; None without adapters."""
        return LoRAConfig(self.rank, self.alpha, self.targets, self.rslora, self.dora) if self.rank else None


@dataclasses.dataclass(frozen=True)
class PPOExperiment(TrainingSettings):
    """Settings of `experiments/train_ppo.py`."""

    model: str = option("", "the pretrained model: a Hugging Face folder, or a name on the hub")
    param_dtype: str = option(
        "float32", "of the parameters: float32, or bfloat16 with a float32 copy of what is trained in the optimizer"
    )
    prompts: str = option("", "JSONL, Parquet or a Hugging Face dataset with a column prompt, messages or text")
    prompts_split: str = option("train", "split of a Hugging Face dataset")
    long_prompts: str = option("drop", "prompts longer than ppo.prompt_length: " + ", ".join(LONG_PROMPTS))
    reward: str = option(
        "",
        "judges, separated by commas, each with *WEIGHT if it is not 1: vader, code (tests passed in a sandbox), "
        "model:FOLDER (a reward model), "
        "FILE.py:function or package.module:function (either after jax: for a JAX score), http://... (a service)",
    )
    reward_timeout_s: float = option(HttpOptions().timeout_s, "of a request to a reward service")
    reward_retries: int = option(HttpOptions().retries, "of a request to a reward service that failed")
    reward_batch_size: int = option(HttpOptions().batch_size, "responses in a request to a reward service")
    gold: str = option("", "a judge of the responses' text, logged as objective/gold and never trained on")
    critic: str = option(
        "",
        "what the critic starts as. On a trunk of its own: policy (a copy of it), a reward model of the policy's shape "
        "or a critic that was saved (a folder), or reward (the one that reward names). On the policy's trunk: model "
        "(the head saved beside it); empty: a new value head",
    )
    truncate_token: str = option("", "a token that ends a response as EOS does, from token ppo.truncate_after on")
    reference_samples: int = option(
        128, "with ppo.score_scale=reference: at least so many responses of it are judged, in whole batches"
    )  # fmt: skip
    ptx_data: str = option("", "texts for ppo.ptx_coef, as `data` of train_sft.py")
    ptx_split: str = option("train", "split of a Hugging Face dataset in ptx_data")
    ptx_length: int = option(128, "slots of a text, in tokens; one that is longer is cut")
    ptx_batch_size: int = option(64, "texts an iteration, cut into minibatches as the responses are")
    frozen_layers: int = option(0, "lower layers that are not trained and are shared with the reference (hydra)")
    seed: int = option(0, "of sampling, shuffling and the data's order")
    num_iterations: int = option(40, "rollouts, each followed by ppo.num_epochs passes of updates")
    checkpoint_every: int = option(10, "iterations between checkpoints; the last one is always saved")
    samples_every: int = option(10, "iterations between tables of samples")
    num_samples: int = option(4, "prompts and responses in such a table")
    kl_limit: float = option(
        0.0, "nats a sequence; above it training stops and goes back to the newest checkpoint below it; 0: no limit"
    )
    eval_prompts: int = option(
        256, "the first so many prompts (whole batches of them) are answered before and after training, to compare"
    )
    heldout_prompts: str = option("", "other prompts for that comparison, from a source of their own; empty: prompts")
    lora: LoRASettings = dataclasses.field(default_factory=LoRASettings)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        """Refuses what cannot be, and what nothing would read."""
        check("long_prompts", self.long_prompts, self.long_prompts in LONG_PROMPTS, "one of " + ", ".join(LONG_PROMPTS))
        dtype = self.param_dtype
        check("param_dtype", dtype, dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        super().__post_init__()
        least = "num_iterations checkpoint_every samples_every num_samples eval_prompts ptx_batch_size"
        check_at_least(self, 1, least)
        check_at_least(self, 2, "reference_samples ptx_length")
        check_at_least(self, 0, "seed kl_limit frozen_layers")
        HttpOptions(self.reward_timeout_s, self.reward_retries, self.reward_batch_size)
        method = resolve(self.ppo)
        check("critic", self.critic, method.critic or not self.critic, f"nothing, with advantage={self.ppo.advantage}")
        alone = not (self.frozen_layers and self.lora.rank)
        check("frozen_layers", self.frozen_layers, alone, "0 with lora: adapters leave all layers frozen")
        both = bool(self.ptx_data) == bool(self.ppo.ptx_coef)
        check("ptx_data", self.ptx_data, both, f"texts exactly if ppo.ptx_coef is above 0 (it is {self.ppo.ptx_coef})")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        service = "://" in self.reward + self.gold
        served = {
            "without a reward service": (service, "reward_timeout_s reward_retries reward_batch_size"),
            "without ptx_data": (bool(self.ptx_data), "ptx_split ptx_length ptx_batch_size"),
            "without ppo.score_scale=reference": (self.ppo.score_scale == "reference", "reference_samples"),
        }
        for reason, (read, names) in served.items():
            for name in names.split():
                _check_idle(self, name, read, reason)
        for name in ("truncate_after", "missing_token_score"):
            _check_idle(self.ppo, name, bool(self.truncate_token), "without truncate_token")


def _check_idle(settings: Any, name: str, read: bool, reason: str) -> None:
    """Refuses a value of a setting that nothing reads."""
    default = next(field.default for field in dataclasses.fields(settings) if field.name == name)
    value = getattr(settings, name)
    check(name, value, read or value == default, f"the default {default!r}: nothing reads it {reason}")
