"""PPO with a critic against two methods without one, towards positive stories: VADER judges what a model of TinyStories
writes.

    python experiments/compare.py --config=experiments/configs/compare_stories.py --workdir=runs/compare_stories

with --config.base.model=FOLDER of stories15M (a Llama of 15 million parameters, pretrained on TinyStories) and
--config.base.prompts=FILE.jsonl of openings of stories, as in the README. For two CPU cores; not yet run to its end:
about 7 minutes a run, nine runs.
"""

import ml_collections

from experiments.settings import CompareExperiment, defaults

GROUPS = "ppo.responses_per_prompt=4"
LORA = "lora.rank=8 ppo.lr=5e-4"


def get_config() -> ml_collections.ConfigDict:
    """The settings: those of ppo_sentiment.py."""
    config = defaults(CompareExperiment)
    config.variants = f"ppo; lora: {LORA}; rloo: ppo.advantage=rloo {GROUPS}; grpo: ppo.advantage=grpo {GROUPS}"
    config.thresholds = "0.5,0.6,0.7"
    config.base.long_prompts = "keep_start"
    config.base.reward = "vader"
    config.base.kl_limit = 25.0
    config.base.num_iterations = 20
    config.base.ppo.batch_size = 64
    config.base.ppo.prompt_length = 32
    config.base.ppo.response_length = 48
    config.base.ppo.num_minibatches = 4
    config.base.ppo.lr = 2e-5
    return config
