"""A 2-D toy of two actions.

    python experiments/train_control.py --config=experiments/configs/quadrants.py --workdir=runs/quadrants

@@
"""

import ml_collections

from experiments.settings import ControlExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(ControlExperiment)
    config.env = "quadrants"
    config.num_iterations = 80
    config.eval_every = 5
    config.ppo.gamma = 0.0  # an action changes nothing but its own reward
    config.ppo.gae_lambda = 0.0
    config.ppo.num_epochs = 10
    config.ppo.num_minibatches = 4
    config.ppo.lr = 3e-3
    return config
