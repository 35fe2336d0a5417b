"""What a run tells the outside world: JSON lines, trackers, and the terminal (floor 4).

`jsonl` holds files that survive a kill, `writers` sends one set of metrics to several places, `terminal` shows them.
The curves are drawn by `ppo_jax.plots`, which alone needs matplotlib.
"""

from ppo_jax.metrics.jsonl import JsonlWriter, atomic_write, read_jsonl, truncate_jsonl, write_jsonl
from ppo_jax.metrics.terminal import PPO_COLUMNS, Reporter
from ppo_jax.metrics.writers import (
    KNOWN_TRACKERS,
    JsonlMetrics,
    MetricWriter,
    MetricWriters,
    TensorBoardMetrics,
    TrackerMetrics,
    check_trackers,
    make_writers,
)

__all__ = [
    "KNOWN_TRACKERS",
    "PPO_COLUMNS",
    "JsonlMetrics",
    "JsonlWriter",
    "MetricWriter",
    "MetricWriters",
    "Reporter",
    "TensorBoardMetrics",
    "TrackerMetrics",
    "atomic_write",
    "check_trackers",
    "make_writers",
    "read_jsonl",
    "truncate_jsonl",
    "write_jsonl",
]
