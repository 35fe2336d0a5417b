"""Pictures of a run (floor 4): curves, reward model, proxy against gold, the KL-score frontier,
methods against each other, control tasks.

All go through matplotlib's object API with the Agg canvas: no window, no global state. A file appears whole or not at
all. Values that are missing, null, NaN or no numbers are left out; where nothing is left, `NothingToDraw` is raised.
"""

from ppo_jax.plots.compare import Course, plot_comparison
from ppo_jax.plots.control import Learning, animate_pole, plot_choices, plot_learning, plot_maps
from ppo_jax.plots.curves import PPO_PANELS, Panel, plot_curves
from ppo_jax.plots.reward_model import plot_reliability, plot_reward_model
from ppo_jax.plots.scores import plot_frontier, plot_proxy_and_gold
from ppo_jax.plots.style import NothingToDraw

__all__ = [
    "PPO_PANELS",
    "Course",
    "Learning",
    "NothingToDraw",
    "Panel",
    "animate_pole",
    "plot_choices",
    "plot_comparison",
    "plot_curves",
    "plot_frontier",
    "plot_learning",
    "plot_maps",
    "plot_proxy_and_gold",
    "plot_reliability",
    "plot_reward_model",
]
