"""Supervised fine-tuning of GPT-2 on film reviews: the customary base for `ppo_sentiment.py`.

    pip install -e ".[data]"
    python experiments/train_sft.py --config=experiments/configs/sft_reviews.py --workdir=runs/sft_reviews
    python experiments/train_ppo.py --config=experiments/configs/ppo_sentiment.py --workdir=runs/sentiment \
        --config.model=runs/sft_reviews/model

Offline: `--config.model=FOLDER --config.data=TEXTS.jsonl`. The 25,000 reviews are packed into 13,100 rows of 512
tokens, 99 % filled (one to a row, they would fill half of 25,000); one pass over them is 780 steps. For a GPU; not yet
run there.
"""

import ml_collections

from experiments.settings import SFTExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(SFTExperiment)
    config.model = "gpt2"
    config.data = "stanfordnlp/imdb"
    config.length = 512
    config.pack = True
    config.batch_size = 16
    config.num_steps = 780
    config.lr = 5e-5
    config.weight_decay = 0.01
    config.warmup_steps = 100
    return config
