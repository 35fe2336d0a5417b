"""Our figures beside those of what people would use instead, as ratios.

    python experiments/benchmark.py --config=experiments/configs/benchmark.py:control --workdir=runs/benchmark

After the colon stands the work: control. Ten minutes on two CPU cores.
"""

import ml_collections

from experiments.settings import BenchmarkExperiment, defaults


def get_config(work: str = "control") -> ml_collections.ConfigDict:
    """The settings of one work."""
    config = defaults(BenchmarkExperiment)
    config.work = work
    config.rounds = 3
    return config
