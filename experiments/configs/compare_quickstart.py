"""PPO with a critic against two methods without one, on the quickstart's policy and reward model:

    make quickstart
    python experiments/compare.py --config=experiments/configs/compare_quickstart.py --workdir=runs/compare_quickstart

7 to 20 minutes on one CPU core. Three seeds, mean ± standard error; proxy: the reward model's score of 64 training
prompts' reviews, mean of the last three iterations; gold: the annotator's of 256 openings that were not trained on:

| | proxy | gold | KL, nats | trained parameters |
|---|---|---|---|---|
| ppo | 1.77 ± 0.02 | 2.56 ± 0.05 | 8.0 ± 0.4 | 856,065 |
| rloo | 1.76 ± 0.02 | 2.56 ± 0.01 | 7.3 ± 0.3 | 855,936 |
| grpo | 1.73 ± 0.01 | 2.48 ± 0.06 | 6.6 ± 0.7 | 855,936 |

Before training these are 0.00 and -0.06 (critic-free, of fewer prompts: 0.00 and -0.07). Another processor rounds
differently, and another quickstart gives another reward model, whose scores have other units: over six of them PPO had
a proxy of 1.68 to 1.96, and a gold of 2.28 to 2.56.

--config.metric=objective/gold compares the annotator's score during training, without running anything again.
"""

import ml_collections

from experiments.settings import CompareExperiment, defaults

ROAD = "runs/quickstart"  # from the root of the repository
GROUPS = "ppo.responses_per_prompt=4"


def get_config() -> ml_collections.ConfigDict:
    """The settings: those of the quickstart's PPO."""
    config = defaults(CompareExperiment)
    config.variants = f"ppo; rloo: ppo.advantage=rloo {GROUPS}; grpo: ppo.advantage=grpo {GROUPS}"
    config.base.model = f"{ROAD}/sft/model"
    config.base.prompts = f"{ROAD}/prompts/train.jsonl"
    config.base.heldout_prompts = f"{ROAD}/prompts/evaluation.jsonl"
    config.base.reward = f"model:{ROAD}/reward_model/model"
    config.base.gold = "experiments.annotator:gold"
    config.base.num_iterations = 40
    config.base.kl_limit = 20.0
    config.base.ppo.batch_size = 64
    config.base.ppo.prompt_length = 24
    config.base.ppo.response_length = 40
    config.base.ppo.score_scale = "none"  # on the fine-tuned model's samples the reward model's scores have deviation 1
    config.base.ppo.num_minibatches = 4
    config.base.ppo.lr = 1e-4
    return config
