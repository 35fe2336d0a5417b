"""A reward model on a language model, from judgements of its responses.

    python experiments/train_reward.py --config=experiments/configs/reward.py --workdir=runs/reward \
        --config.model=FOLDER --config.data=runs/feedback/pairs.jsonl

Any of pairs, rankings, choices and scores will do. The scores are normalised on the responses in the data; on fresh
ones of the policy with --config.reference=FOLDER. A learning rate of 1e-5 suits models of 100 million parameters and
more; smaller ones take more (stories15M, of 15 million: 5e-5; 450 rankings of four texts, 2 minutes on two CPU cores).
For a GPU; GPT-2 not yet run there.
"""

import ml_collections

from experiments.settings import RewardExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(RewardExperiment)
    config.model = "gpt2"
    config.length = 128
    config.batch_size = 16
    return config
