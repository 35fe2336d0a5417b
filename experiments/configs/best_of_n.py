"""Best of n of the model that `ppo_sentiment.py` starts from, by VADER's sentiment; and its best responses as data for
supervised fine-tuning.

    pip install -e ".[eval,data]"
    python experiments/best_of_n.py --config=experiments/configs/best_of_n.py --workdir=runs/best_of_n \
        --config.model=gpt2
    python experiments/train_sft.py --config=experiments/configs/sft_reviews.py --workdir=runs/rejection_sampling \
        --config.data=runs/best_of_n/chosen.jsonl

A reward model chooses with --config.reward=model:FOLDER, and a second judge says what its choice is worth with
--config.gold=... For a GPU; with GPT-2 not yet run there.

On what `make quickstart` leaves, with `--config.reward=model:runs/quickstart/reward_model/model`,
`--config.gold=experiments.annotator:gold`, `--config.model=runs/quickstart/sft/model`,
`--config.prompts=runs/quickstart/prompts/evaluation.jsonl`, `--config.prompt_length=24` and
`--config.response_length=40` (a minute on one CPU core), the best of 1, 2, 4, 8 and 16 has a gold score of -0.10, 0.71,
1.38, 1.88 and 2.18.
"""

import ml_collections

from experiments.settings import BestOfNExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(BestOfNExperiment)
    config.prompts = "stanfordnlp/imdb"
    config.prompts_split = "test"
    config.long_prompts = "keep_start"
    config.reward = "vader"
    config.prompt_length = 32
    config.response_length = 48
    return config
