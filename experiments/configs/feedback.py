"""Pairs of responses of GPT-2 to the beginnings of film reviews, compared by people on a page.

    pip install -e ".[feedback,data]"
    python experiments/collect_feedback.py --config=experiments/configs/feedback.py --workdir=runs/feedback

Prints an address to open in a browser; a tenth of the 500 pairs is for two annotators. Another model and other prompts
with --config.model=FOLDER --config.prompts=FILE.jsonl; given responses with --config.model= --config.prompts=
--config.responses=FILE.jsonl (rows of `prompt` and `completions`). For people at other machines --config.host=0.0.0.0
--config.token=SECRET (16 characters or more). Ctrl-C ends; train_reward.py learns from runs/feedback/pairs.jsonl.

With GPT-2 not yet run. With a Llama of 15 million parameters (stories15M) in its place, sampling the 500 pairs takes
less than a minute on two CPU cores, and the page answers in 5 to 20 milliseconds.
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
