"""PPO on CartPole-v1.

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole

@@
"""

import ml_collections

from experiments.settings import ControlExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(ControlExperiment)
    config.env = "CartPole-v1"
    return config
