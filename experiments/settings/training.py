"""Settings of the scripts that train."""

import dataclasses

from experiments.settings.machinery import check_at_least
from ppo_jax.config import option
from ppo_jax.errors import check
from ppo_jax.metrics import KNOWN_TRACKERS
from ppo_jax.models import REMATS, ModelConfig
from ppo_jax.optim import LR_SCHEDULES

SAVE_DTYPES = ("model", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices are arranged."""

    data: int = option(-1, "devices that split the batch; -1: all that are left")
    fsdp: int = option(1, "devices that split the batch and the parameters")
    tensor: int = option(1, "devices that split each matrix product")


def tracker_names(trackers: str) -> list[str]:
    """The trackers of a run: TensorBoard, and those named, separated by commas."""
    return ["tensorboard", *filter(None, (name.strip() for name in trackers.split(",")))]


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What all scripts that train have in common."""

    checkpoints_to_keep: int = option(2, "newest checkpoints that stay")
    dtype: str = option("float32", "of the model's matrix products: float32 or bfloat16")
    remat: str = option(
        "dots",
        f"what a backward pass computes again instead of keeping it, for memory: {', '.join(REMATS)} (all but "
        "products with a layer's matrices; whole layers)",
    )
    save_dtype: str = option(
        "model",
        f"of the exported weights: {', '.join(SAVE_DTYPES)}; model: what its files have (bfloat16 rounds changes below "
        "0.2 % away)",
    )
    pad_token: str = option("", "overrides the tokenizer's")
    eos_token: str = option("", "overrides the tokenizer's")
    max_hours: float = option(
        0.0, "hours after which this start saves and ends, with exit status 75: the same command goes on; 0: no limit"
    )
    trackers: str = option("", "besides JSONL and TensorBoard, separated by commas: wandb, trackio")
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("dtype", self.dtype, self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("remat", self.remat, self.remat in REMATS, "one of " + ", ".join(REMATS))
        check("save_dtype", self.save_dtype, self.save_dtype in SAVE_DTYPES, "one of " + ", ".join(SAVE_DTYPES))
        check_at_least(self, 1, "checkpoints_to_keep")
        check_at_least(self, 0, "max_hours")
        for name in tracker_names(self.trackers):
            check("trackers", name, name in KNOWN_TRACKERS, "some of " + ", ".join(KNOWN_TRACKERS))


@dataclasses.dataclass(frozen=True)
class SFTExperiment(TrainingSettings):
    """Settings of `experiments/train_sft.py`."""

    model: str = option("", "start from this Hugging Face folder or hub name; empty: a new model, as in `architecture`")
    tokenizer: str = option("", "folder or hub name of the tokenizer; empty: the model's")
    data: str = option(
        "",
        "a JSONL or Parquet file or a Hugging Face dataset with columns prompt and completion (text or chat), messages "
        "or text",
    )
    data_split: str = option("train", "split of a Hugging Face dataset")
    heldout: str = option("", "the same, for perplexity; empty: the last heldout_frac of the data")
    heldout_split: str = option("test", "split of a Hugging Face dataset in heldout")
    heldout_frac: float = option(0.05, "share of the data held out when there is no heldout")
    length: int = option(256, "slots of a row, in tokens; a text that is longer is cut")
    pack: bool = option(False, "several texts to a row, as they fit; none sees another")
    seed: int = option(0, "of initialisation and the data's order")
    num_steps: int = option(1000, "gradient steps")
    batch_size: int = option(32, "rows a step")
    accumulation: int = option(1, "parts of a batch, one after the other: the same steps in less memory")
    lr: float = option(3e-4, "peak learning rate of Adam")
    lr_schedule: str = option("cosine", "after the warm-up: " + ", ".join(LR_SCHEDULES))
    warmup_steps: int = option(50, "steps over which the learning rate rises linearly; the first of w has 1/w")
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this global norm")
    log_every: int = option(10, "steps between rows of metrics")
    eval_every: int = option(200, "steps between held-out perplexities; also after the last step")
    patience: int = option(
        0, "held-out losses without a new lowest before training stops, and the best model is exported; 0: never"
    )
    checkpoint_every: int = option(200, "steps between checkpoints; the last one is always saved")
    architecture: "Architecture" = dataclasses.field(default_factory=lambda: Architecture())

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("lr_schedule", self.lr_schedule, self.lr_schedule in LR_SCHEDULES, "one of " + ", ".join(LR_SCHEDULES))
        check("heldout_frac", self.heldout_frac, 0 < self.heldout_frac < 1, "a number in (0, 1)")
        super().__post_init__()
        new = Architecture()
        check(
            "architecture", self.architecture, not self.model or self.architecture == new, "the defaults, next to model"
        )
        check_at_least(self, 2, "length")
        check_at_least(self, 1, "num_steps batch_size accumulation log_every eval_every checkpoint_every")
        check_at_least(self, 0, "seed patience warmup_steps weight_decay")
        for name in "lr max_grad_norm".split():
            check(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A new Llama-style model; its vocabulary is the tokenizer's."""

    num_layers: int = option(4, "layers")
    num_heads: int = option(4, "query heads")
    num_kv_heads: int = option(4, "key/value heads; a divisor of num_heads")
    width: int = option(128, "of the residual stream")
    mlp_width: int = option(384, "of the gated MLP")
    max_positions: int = option(256, "longest sequence, in tokens")

    def model_config(self, vocab_size: int, dtype: str) -> ModelConfig:
        """The model over a vocabulary."""
        return ModelConfig(vocab_size=vocab_size, dtype=dtype, **dataclasses.asdict(self))
