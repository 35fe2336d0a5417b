"""The task quadrants: a 2-D toy of two actions.

    python experiments/train_control.py --config=experiments/configs/quadrants.py --workdir=runs/quadrants

Is the product of two numbers positive? 80 iterations of 8 x 32 steps, 20,480 in all: 12 seconds on two CPU cores, of
which 0.3 are training. Mean return of 100 episodes of 32 points: 31.5 to 31.8 in 10 of 10 seeds; a guess has 16, a
straight line at most 24. choices.png has the probability of each answer before, during and after training. (2026-11-30,
Python 3.11, jax 0.10.2.)
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
