"""PPO on Pendulum-v1, a continuous action.

    python experiments/train_control.py --config=experiments/configs/pendulum.py --workdir=runs/pendulum

@@
"""

import ml_collections

from experiments.settings import ControlExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(ControlExperiment)
    config.env = "Pendulum-v1"
    config.num_iterations = 256
    config.eval_every = 16
    config.ppo.num_steps = 128
    config.ppo.gamma = 0.95
    config.ppo.gae_lambda = 0.95
    config.ppo.num_epochs = 10
    config.ppo.num_minibatches = 8
    return config
