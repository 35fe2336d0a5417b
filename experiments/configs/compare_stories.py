"""PPO with a critic, the same on adapters, and two methods without a critic, towards positive stories: VADER judges
what a model of TinyStories writes.

    python experiments/compare.py --config=experiments/configs/compare_stories.py --workdir=runs/compare_stories

with --config.base.model=FOLDER of stories15M (a Llama of 15 million parameters, pretrained on TinyStories) and
--config.base.prompts=FILE.jsonl of openings of stories, as in the README. Twelve runs of 3 to 10 minutes each on two
CPU cores. Three seeds, mean ± standard error; after: 256 responses to training prompts; memory: of the largest program:

| | end of training | after | iterations to 0.7 | KL, nats | trained parameters | memory, MiB |
|---|---|---|---|---|---|---|
| ppo | 0.88 ± 0.01 | 0.886 ± 0.006 | 7, 8, 6 | 17.0 ± 1.1 | 15,192,001 | 485 |
| lora | 0.84 ± 0.02 | 0.855 ± 0.011 | 7, 7, 6 | 11.4 ± 0.5 | 262,945 | 277 |
| rloo | 0.85 ± 0.01 | 0.859 ± 0.007 | 7, 8, 9 | 12.1 ± 0.5 | 15,191,712 | 484 |
| grpo | 0.81 ± 0.01 | 0.849 ± 0.012 | 8, 8, 8 | 12.2 ± 0.9 | 15,191,712 | 484 |

The score before is 0.32. PPO is further from the reference than the others, and its stories are less fluent for it
(perplexity under the reference 8.0 ± 0.3, of the adapters 5.5 ± 0.0; 4.0 before): a higher ppo.kl_coef holds it nearer.
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
