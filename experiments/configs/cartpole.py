r"""PPO on CartPole-v1: a pole on a cart, to be held upright.

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole

390 iterations of 8 x 32 steps, 99,840 in all: 13 seconds on two CPU cores: 1.5 of training, imports,
compiling and pictures. Mean return of 100 episodes: 500 in 10 of 10 seeds, solved (475) after 10,000 to 33,000 steps;
also at 499,200 steps (--config.num_iterations=1950 --config.eval_every=65). With --config.num_seeds=10 all ten learn in
one program, in 13 s.

As many steps as the articles that this project began with have, 10,240, in 11 s, training 0.2 s of it:

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole_10k \
        --config.num_iterations=40 --config.eval_every=4

(2026-11-30, Python 3.11, jax 0.10.2.)
"""

import ml_collections

from experiments.settings import ControlExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(ControlExperiment)
    config.env = "CartPole-v1"
    config.num_iterations = 390
    return config
