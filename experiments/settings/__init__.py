"""The settings of each experiment script: frozen dataclasses, and their way to and from an ml_collections ConfigDict.

A file in `experiments/configs/` starts from the defaults here:

    def get_config():
        config = defaults(PPOExperiment)
        config.model = "gpt2"
        return config
"""

from experiments.settings.evaluation import EvaluateExperiment
from experiments.settings.feedback import FeedbackExperiment
from experiments.settings.machinery import defaults, describe, from_config_dict
from experiments.settings.reward import RewardExperiment
from experiments.settings.rlhf import CorpusSettings, RLHFExperiment
from experiments.settings.training import Architecture, MeshSettings, PPOExperiment, SFTExperiment, tracker_names

__all__ = [
    "Architecture",
    "CorpusSettings",
    "EvaluateExperiment",
    "FeedbackExperiment",
    "MeshSettings",
    "PPOExperiment",
    "RLHFExperiment",
    "RewardExperiment",
    "SFTExperiment",
    "defaults",
    "describe",
    "from_config_dict",
    "tracker_names",
]
