"""The learning anchor: how fast each method learns a task of a minute, beside what TRL reached on it.

    python experiments/compare.py --config=experiments/configs/anchor.py --workdir=runs/anchor

17 minutes on two CPU cores, offline. A GPT-2 of 2 layers and width 128 with random parameters; the score is 10 x the
share of a response's 48 tokens from a quarter of the vocabulary (`experiments/anchor.py`). 60 iterations of 64
episodes. Score at the end (mean of the last three iterations) and iterations to 5, 7 and 9, over three seeds:

| | final score | to 5 | to 7 | to 9 | KL, nats |
|---|---|---|---|---|---|
| ppo | 9.79 ± 0.01 | 16, 15, 16 | 20, 19, 21 | 31, 28, 32 | 66.7 |
| ppo_as_trl | 8.11 ± 0.16 | 27, 29, 30 | 43, 42, 47 | never | 45.3 |
| rloo_as_trl | 9.49 ± 0.02 | 11, 9, 8 | 15, 15, 13 | 32, 29, 27 | 59.0 |
| grpo | 8.86 ± 0.01 | 12, 14, 13 | 20, 20, 20 | 42, 43, never | 70.9 |
| TRL 1.12.0 PPO | 7.80 ± 0.20 | 32 | 52 | | 46 |
| TRL 1.16.0 RLOO | 9.47 ± 0.03 | | | | |

Scores divided by the deviation of the reference's own responses move the optimum: at kl_coef 0.05 the best policy has
9.6 without (each token is in the set with p = 0.956, where 10 / 48 = 0.05 log(3 p / (1 - p))), and 9.96 with. Divided
by the deviation of all scores so far, which grows as they rise, it falls to about 8. The reference's deviation takes
two batches of 64 responses more than the others have.
"""

from pathlib import Path

import ml_collections

from experiments.settings import CompareExperiment, defaults

AS_TRL = "ppo.lr=1e-3 ppo.adam_b2=0.999 ppo.num_epochs=4 ppo.score_scale=none"
# TRL 1.12.0's PPO: a critic on a trunk of its own with a head that is not zero, values clipped to +- 0.2, no gradient
# clipping. TRL 1.16.0's RLOO: the ratio of a whole response, clipped to 1 +- 0.2, which of 48 tokens is the geometric
# mean of GSPO between 0.8^(1/48) and 1.2^(1/48); its gradient is 48 times ours, hence 1 / 48 for the norm that it is
# clipped to. It may end at EOS; PPO there does not.
PPO_AS_TRL = f"critic={{task}}/critic ppo.value_loss=clip ppo.gae_lambda=0.95 ppo.max_grad_norm=inf {AS_TRL}"
RLOO_AS_TRL = (
    "ppo.advantage=rloo ppo.responses_per_prompt=8 ppo.policy_loss=gspo ppo.clip_eps=0.00464 ppo.clip_eps_high=0.0038 "
    f"ppo.loss_aggregation=sequence ppo.max_grad_norm=0.0208 ppo.min_new_tokens=0 {AS_TRL}"
)
GRPO = (
    "ppo.advantage=grpo ppo.responses_per_prompt=8 ppo.kl_in=loss ppo.kl_estimator=k3 ppo.num_epochs=1 ppo.lr=1e-3 "
    "ppo.score_scale=none"
)


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(CompareExperiment)
    config.task = "set_fraction"
    config.variants = f"ppo: ppo.lr=1e-3; ppo_as_trl: {PPO_AS_TRL}; rloo_as_trl: {RLOO_AS_TRL}; grpo: {GRPO}"
    config.thresholds = "5,7,9"
    config.references = str(Path(__file__).with_name("anchor_peers.json"))
    config.base.num_iterations = 60
    config.base.checkpoint_every = 60
    config.base.samples_every = 60
    config.base.eval_prompts = 64
    config.base.ppo.batch_size = 64
    config.base.ppo.prompt_length = 32
    config.base.ppo.response_length = 48
    config.base.ppo.min_new_tokens = 48
    config.base.ppo.num_minibatches = 4
    config.base.ppo.kl_coef = 0.05
    return config
