"""RLHF of a pretrained model towards positive sentiment, through a reward model; only the annotator sees the score.

GPT-2 answers the beginnings of film reviews, four times each; a simulated annotator, who prefers what VADER likes (with
noise), ranks the answers; a reward model learns the rankings; PPO follows the reward model:

    pip install -e ".[eval,data,feedback]"
    python experiments/rlhf.py --config=experiments/configs/rlhf_sentiment.py --workdir=runs/rlhf_sentiment

With --config.feedback=page people rank the answers instead. For a GPU; GPT-2 not yet run there. Another model and other
prompts with --config.model=FOLDER --config.prompts=FILE.jsonl. Run with a Llama of 15 million parameters, pretrained on
TinyStories (stories15M), on two CPU cores: README.
"""

import ml_collections

from experiments.settings import RLHFExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(RLHFExperiment)
    config.model = "gpt2"
    config.prompts = "stanfordnlp/imdb"
    config.num_eval_prompts = 128
    config.gold = "vader"
    config.annotator_temperature = 0.2

    config.collect.num_prompts = 512
    config.collect.num_responses = 4

    config.reward.heldout_frac = 0.2
    config.reward.batch_size = 8
    config.reward.lr = 5e-5
    config.reward.eval_every = 25

    config.ppo.long_prompts = "keep_start"
    config.ppo.num_iterations = 24
    config.ppo.kl_limit = 25.0
    config.ppo.ppo.batch_size = 64
    config.ppo.ppo.prompt_length = 32
    config.ppo.ppo.response_length = 48
    config.ppo.ppo.score_scale = "none"  # the reward model's scores have deviation 1 on the model's own samples
    config.ppo.ppo.num_minibatches = 4
    config.ppo.ppo.lr = 2e-5
    config.ppo.ppo.kl_coef = 0.06
    config.ppo.ppo.gae_lambda = 0.95
    config.ppo.ppo.value_loss = "clip"
    return config
