"""PPO towards positive sentiment: the field's "hello world" (Ziegler et al. 2019; TRL's first example).

GPT-2 continues the beginnings of film reviews, VADER's compound score judges the continuation:

    pip install -e ".[eval,data]"
    python experiments/train_ppo.py --config=experiments/configs/ppo_sentiment.py --workdir=runs/sentiment

For a GPU; GPT-2 not yet run there. Another model and other prompts with --config.model=FOLDER
--config.prompts=FILE.jsonl. Run with a Llama of 15 million parameters, pretrained on TinyStories (stories15M), on two
CPU cores: 20 iterations in 7 minutes raise the score of 48-token continuations from 0.32 to 0.88, at a KL of 18 nats
(README, three seeds).
"""

import ml_collections

from experiments.settings import PPOExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(PPOExperiment)
    config.model = "gpt2"
    config.prompts = "stanfordnlp/imdb"
    config.long_prompts = "keep_start"
    config.reward = "vader"
    config.kl_limit = 25.0
    config.num_iterations = 20
    config.ppo.batch_size = 64
    config.ppo.prompt_length = 32
    config.ppo.response_length = 48
    config.ppo.num_minibatches = 4
    config.ppo.lr = 2e-5
    return config
