"""A policy from judgements of responses, directly: DPO, or IPO and KTO with --config.loss=ipo and =kto.

    python experiments/train_dpo.py --config=experiments/configs/dpo.py --workdir=runs/dpo \
        --config.model=FOLDER --config.data=runs/feedback/pairs.jsonl

Any of pairs, rankings and choices will do, and for KTO scores too. A learning rate of 1e-6 suits models of a billion
parameters; smaller ones take more. For a GPU; GPT-2 not yet run there.
"""

import ml_collections

from experiments.settings import DPOExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(DPOExperiment)
    config.model = "gpt2"
    config.length = 128
    config.batch_size = 16
    config.lr = 1e-5
    return config
