r"""PPO on CartPole-v1: a pole on a cart, to be held upright.

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole

390 iterations of 4 x 64 steps, 99,840 in all: 13 to 25 seconds on two CPU cores, 2 of them training, the rest imports,
compiling and pictures. Mean return of 100 episodes: 500 in 10 of 10 seeds, solved (475) after 3,000 to 10,000 steps;
also at 499,200 steps (--config.num_iterations=1950 --config.eval_every=65). With --config.num_seeds=10 all ten learn in
one program.

As many steps as the articles that this project began with have, 10,240, in 11 to 24 s, training 0.2 to 0.4 s of it;
return 500, and of ten seeds 472 (233 to 500):

    python experiments/train_control.py --config=experiments/configs/cartpole.py --workdir=runs/cartpole_10k \
        --config.num_iterations=40 --config.eval_every=4

(2026-11-30, Python 3.11, jax 0.10.2; a slow machine and one twice as fast.)
"""

import ml_collections

from experiments.settings import ControlExperiment, defaults


def get_config() -> ml_collections.ConfigDict:
    """The settings."""
    config = defaults(ControlExperiment)
    config.env = "CartPole-v1"
    config.num_iterations = 390
    config.ppo.num_envs = 4
    config.ppo.num_steps = 64
    config.ppo.num_epochs = 10
    config.ppo.num_minibatches = 4
    config.ppo.gae_lambda = 0.95
    config.ppo.lr = 2e-3
    return config
