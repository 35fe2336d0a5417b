"""Pairs of responses of GPT-2 to the beginnings of film reviews, compared by people on a page.

    pip install "ppo_jax[feedback,data]"
    python experiments/collect_feedback.py --config=experiments/configs/feedback.py --workdir=runs/feedback
    python experiments/train_reward.py --config=experiments/configs/reward.py --workdir=runs/reward \
        --config.data=runs/feedback/pairs.jsonl

Prints an address to open in a browser; a tenth of the 500 pairs is for two annotators. A person judges three to six
pairs a minute. Another model and other prompts with --config.model=FOLDER --config.prompts=FILE.jsonl; given responses
with --config.model= --config.prompts= --config.responses=FILE.jsonl (rows of `prompt` and `completions`). For people at
other machines --config.host=0.0.0.0 --config.token=SECRET.

With GPT-2 not yet run. With a Llama of 15 million parameters in its place, sampling 500 pairs of 48 tokens takes ... on
two CPU cores, a page answers in ... milliseconds.
"""

import ml_collections

from experiments.settings import FeedbackExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(FeedbackExperiment)
    config.model = "gpt2"
    config.prompts = "stanfordnlp/imdb"
    config.num_prompts = 500
    config.long_prompts = "keep_start"
    config.prompt_length = 32
    return config
