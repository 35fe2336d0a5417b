"""Settings of the whole road."""

import dataclasses

from experiments.settings.machinery import check_at_least
from experiments.settings.training import PPOExperiment, SFTExperiment
from ppo_jax.config import option


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """The reviews that `experiments/reviews.py` generates."""

    num_train: int = option(8000, "reviews to pretrain on")
    num_heldout: int = option(500, "reviews for held-out perplexity")
    num_prompts: int = option(1024, "openings of reviews, the prompts of PPO")
    vocab_size: int = option(1024, "most words of the tokenizer")
    seed: int = option(0, "of the grammar")

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        check_at_least(self, 0, "seed")
        check_at_least(self, 1, "num_train num_heldout num_prompts vocab_size")


@dataclasses.dataclass(frozen=True)
class RLHFExperiment:
    """Settings of `experiments/rlhf.py`. What is left empty in a stage (data, model, prompts) comes from the stage
    before.
    """

    corpus: CorpusSettings = dataclasses.field(default_factory=CorpusSettings)
    pretrain: SFTExperiment = dataclasses.field(default_factory=SFTExperiment)
    ppo: PPOExperiment = dataclasses.field(default_factory=PPOExperiment)
