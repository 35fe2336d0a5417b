"""Our figures beside those of what people would use instead, as ratios.

    python experiments/benchmark.py --config=experiments/configs/benchmark.py:control --workdir=runs/benchmark

After the colon stands the work: control. Twenty minutes on two CPU cores. Medians of three rounds, in brackets the
least and the largest ratio (2026-11-30, two slow cores, Python 3.11, jax 0.10.2, Stable-Baselines3 2.9.2, rejax 0.1.3):

| CartPole-v1 | ours | peer | times better |
|---|---:|---:|---:|
| Stable-Baselines3, its settings, steps/s | 29,400 | 748 | 37 (30 to 41) |
| the same, 64 agents in one program | 40,800 | 807 | 58 (46 to 66) |
| Stable-Baselines3, settings of rl-zoo3, steps/s | 25,000 | 3,270 | 8.3 (7.5 to 11) |
| rejax, settings of rl-zoo3, steps/s | 28,700 | 27,800 | 1.03 (1.01 to 1.10) |
| rejax, its settings, steps/s | 72,600 | 68,400 | 1.09 (0.92 to 1.17) |
| 10,240 steps, compiled; Stable-Baselines3, s | 0.28 | 8.0 | 29 (20 to 34); return 500 against 430 |
| solved, compiling included; Stable-Baselines3 with rl-zoo3's, s | 5.2, 6.4 | 3.5, 3.8 | 0.66, 0.76 (two seeds) |
| the same; rejax with rl-zoo3's, s | 6.2, 6.8 | 8.9, 8.7 | 1.41, 1.28 (two seeds) |

(The first three before a shuffle of more than 1,625 rows took one sort instead of two.)

Many agents are no faster than one where a gradient step fills the machine already.
"""

import ml_collections

from experiments.settings import BenchmarkExperiment, defaults


def get_config(work: str = "control") -> ml_collections.ConfigDict:
    """The settings of one work."""
    config = defaults(BenchmarkExperiment)
    config.work = work
    config.rounds = 3
    return config
