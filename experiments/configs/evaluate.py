"""Evaluation of the policy of `ppo_sentiment.py` against the model that it started from, by VADER's sentiment.

    pip install -e ".[eval,data]"
    python experiments/evaluate.py --config=experiments/configs/evaluate.py --workdir=runs/evaluation \
        --config.policy=runs/sentiment/policy --config.against=gpt2

Other prompts with --config.prompts=FILE.jsonl, a reward model as the judge with --config.judge=model:FOLDER, people
with --config.judge=page. For a GPU; with GPT-2 not yet run there. A Llama of 15 million parameters (stories15M) answers
256 openings of children's stories in half a minute on two CPU cores, and scores 0.30 (95 %: 0.23 to 0.36).
"""

import ml_collections

from experiments.settings import EvaluateExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(EvaluateExperiment)
    config.prompts = "stanfordnlp/imdb"
    config.prompts_split = "test"
    config.long_prompts = "keep_start"
    config.judge = "vader"
    config.prompt_length = 32
    config.response_length = 48
    return config
