"""The settings of each experiment script: frozen dataclasses, and their way to and from an ml_collections ConfigDict.

A file in `experiments/configs/` starts from the defaults here:

    def get_config():
        config = defaults(PPOExperiment)
        config.model = "gpt2"
        return config
"""

from experiments.settings.benchmark import BenchmarkExperiment
from experiments.settings.compare import CompareExperiment
from experiments.settings.control import ControlExperiment
from experiments.settings.dpo import DPOExperiment
from experiments.settings.evaluation import BestOfNExperiment, EvaluateExperiment
from experiments.settings.feedback import FeedbackExperiment
from experiments.settings.machinery import defaults, describe, from_config_dict
from experiments.settings.ppo import LoRASettings, PPOExperiment
from experiments.settings.reward import RewardExperiment
from experiments.settings.rlhf import CorpusSettings, RLHFExperiment
from experiments.settings.training import Architecture, MeshSettings, SFTExperiment, tracker_names

__all__ = [
    "Architecture",
    "BenchmarkExperiment",
    "BestOfNExperiment",
    "CompareExperiment",
    "ControlExperiment",
    "CorpusSettings",
    "DPOExperiment",
    "EvaluateExperiment",
    "FeedbackExperiment",
    "LoRASettings",
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
