"""Settings of the whole road."""

import dataclasses

from experiments.settings.feedback import FeedbackExperiment
from experiments.settings.machinery import check_at_least
from experiments.settings.ppo import PPOExperiment
from experiments.settings.reward import RewardExperiment
from experiments.settings.training import SFTExperiment
from ppo_jax.config import option
from ppo_jax.errors import check

FEEDBACK = ("simulated", "page")
DECIDED = {
    "collect": "prompts_split long_prompts prompt_length response_length temperature until_complete export",
    "reward": "data_split length response_length",
    "ppo": "gold",
}
"""Fields of the stages that follow from others."""


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """The reviews that `experiments/corpus.py` writes."""

    num_train: int = option(8000, "reviews to pretrain on")
    num_heldout: int = option(500, "reviews for held-out perplexity")
    num_demonstrations: int = option(2000, "openings with their reviews, to fine-tune on")
    num_prompts: int = option(2048, "openings alone: for feedback, for PPO and for evaluation")
    vocab_size: int = option(1024, "most words of the tokenizer")
    seed: int = option(0, "of the grammar")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check_at_least(self, 0, "seed")
        check_at_least(self, 1, "num_train num_heldout num_demonstrations num_prompts vocab_size")


@dataclasses.dataclass(frozen=True)
class RLHFExperiment:
    """Settings of `experiments/rlhf.py`. What is left empty in a stage (data, model, prompts) comes from the stage
    before.
    """

    model: str = option("", "a pretrained model; empty: a corpus is written and a new one is pretrained on it")
    prompts: str = option("", "JSONL, Parquet or a Hugging Face dataset of prompts; empty: the corpus's")
    num_eval_prompts: int = option(256, "the last so many prompts are kept for evaluation")
    feedback: str = option("simulated", "who judges: simulated (by gold, with noise), or page (waits for people)")
    gold: str = option(
        "experiments.annotator:gold",
        "the simulated annotator's hidden preference: vader, FILE.py:function or package.module:function",
    )
    annotator_temperature: float = option(
        1.0, "of the simulated annotator's noise: it prefers a with probability sigmoid((gold(a) - gold(b)) / this)"
    )
    seed: int = option(0, "added to the seed of every stage but the corpus")
    corpus: CorpusSettings = dataclasses.field(default_factory=CorpusSettings)
    pretrain: SFTExperiment = dataclasses.field(default_factory=SFTExperiment)
    sft: SFTExperiment = dataclasses.field(default_factory=SFTExperiment)
    collect: FeedbackExperiment = dataclasses.field(default_factory=FeedbackExperiment)
    reward: RewardExperiment = dataclasses.field(default_factory=RewardExperiment)
    ppo: PPOExperiment = dataclasses.field(default_factory=PPOExperiment)

    def seeded(self) -> "RLHFExperiment":
        """The same with `seed` added to that of every stage that is walked."""
        names = ["collect", "reward", "ppo"] + ["pretrain"] * (not self.model)
        names += ["sft"] * (not self.model or bool(self.sft.data))
        stages = {name: getattr(self, name) for name in names}
        added = {name: dataclasses.replace(stage, seed=stage.seed + self.seed) for name, stage in stages.items()}
        return dataclasses.replace(self, seed=0, **added)

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check("feedback", self.feedback, self.feedback in FEEDBACK, "one of " + ", ".join(FEEDBACK))
        for stage, names in DECIDED.items():
            for name in names.split():
                value, default = getattr(getattr(self, stage), name), getattr(type(getattr(self, stage))(), name)
                check(f"{stage}.{name}", value, value == default, f"{default!r}: the road decides it, by config.ppo")
        for stage in ("corpus", "pretrain"):
            value = getattr(self, stage)
            check(stage, value, not self.model or value == type(value)(), "the defaults, next to model")
        check("sft", self.sft, not self.model or bool(self.sft.data) or self.sft == SFTExperiment(),
              "the defaults or sft.data, next to model")  # fmt: skip
        check_at_least(self, 2, "num_eval_prompts")
        check_at_least(self, 0, "seed")
        check(
            "annotator_temperature",
            self.annotator_temperature,
            0 < self.annotator_temperature < float("inf"),
            "a number above 0",
        )
        check("prompts", self.prompts, bool(self.prompts) or not self.model, "a source of prompts, next to model")
        check("gold", self.gold, bool(self.gold) or self.feedback == "page", "a judge, for a simulated annotator")
