"""The rows of test_no_ignored_field.py: of every field of every settings class, other values, and what else has to be
set for them to matter; or the test that proves that the field counts.
"""

import dataclasses
from typing import Any, NamedTuple

from experiments import settings as kinds
from experiments.methods import METHODS
from ppo_jax.config import ControlConfig, PPOConfig
from ppo_jax.dpo import DPOConfig
from ppo_jax.models import LoRAConfig, ModelConfig
from ppo_jax.models.rope import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from ppo_jax.rewards import HttpOptions
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sandbox import Limits


class Row(NamedTuple):
    """Values of a field, with what else has to be set for them to matter."""

    values: tuple
    given: dict
    by: str = ""  # the output that is looked at, if not the one of the class


def row(*values: Any, by: str = "", **given: Any) -> list[Row]:
    return [Row(values, given, by)]


# PPOConfig


TINY = ModelConfig(vocab_size=11, num_layers=1, num_heads=2, num_kv_heads=1, width=8, mlp_width=8, max_positions=16)
EOS, TRUNCATE = 1, 3
SMALL = PPOConfig(
    batch_size=4, prompt_length=2, response_length=3, num_epochs=1, num_minibatches=1, lr=0.02, adam_eps=1e-4,
    max_grad_norm=100.0,
)  # fmt: skip
TWICE = {"num_epochs": 2}  # where the first gradient step cannot tell
GROUPS = {"responses_per_prompt": 2}
IN_LOSS = {"kl_in": "loss"}

PPO_ROWS: dict[str, list[Row]] = {
    "batch_size": row(8, by="prepared"),
    "responses_per_prompt": row(4, advantage="rloo", **GROUPS) + row(2, by="sampled"),
    "prompt_length": row(5, by="prepared"),
    "response_length": row(4, by="sampled"),
    "min_new_tokens": row(1),
    "temperature": row(0.7),
    "truncate_after": row(1, 3),
    "stale_iterations": row(1) + row(1, by="prepared"),
    "missing_token_score": row(-2.0),
    "score_scale": row("none", "running", "batch"),
    "score_shift": row(False) + row(False, score_scale="batch") + row(False, score_scale="running"),
    "score_clip": row(0.7),
    "missing_eos_penalty": row(0.5),
    "length_penalty": row(0.1, -0.1),
    "overlong_buffer": row(2, 3),
    "overlong_penalty": row(0.5, overlong_buffer=2),
    "whiten_rewards": row(True),
    "kl_coef": row(0.0, 0.2) + row(0.0, 0.2, **IN_LOSS),
    "kl_estimator": row("k2", "k3", "abs", "exact") + row("k2", "k3", "abs", "k3_k2", "exact", **IN_LOSS),
    "kl_in": row("loss"),
    "kl_clamp": row(0.3) + row(1e-3, kl_estimator="exact") + row(0.3, **IN_LOSS),
    "kl_target": row(6.0, 0.1),
    "kl_horizon": row(100.0, kl_target=6.0),
    "target_kl": row(1e-9),
    "exact_kl": row(True),
    "advantage": row(*(set(METHODS["advantage"]) - {"gae"}), **GROUPS),
    "gamma": row(0.9) + row(0.9, advantage="reinforce_pp"),
    "gae_lambda": row(0.5, 0.0) + row(0.5, critic_lambda=1.0) + row(0.5, lambda_length_scale=0.5),
    "critic_lambda": row(0.9, 0.3),
    "lambda_length_scale": row(0.4, 0.6),
    "baseline_decay": row(0.5, advantage="reinforce"),
    "whiten_advantages": row("none", "minibatch", num_minibatches=2)
    + row("batch", "minibatch", advantage="rloo", num_minibatches=2, **GROUPS),
    "whiten_shift": row(False) + row(False, whiten_advantages="minibatch", num_minibatches=2),
    "policy_loss": row("gspo", "cispo", "none", clip_eps_high=0.3),
    "clip_eps": row(0.05) + row(0.05, policy_loss="gspo"),
    "clip_eps_high": row(0.4, clip_eps=0.1)
    + row(0.4, policy_loss="gspo")
    + row(0.4, policy_loss="cispo", clip_eps_high=0.1),
    "dual_clip": row(1.01),
    "ratio_threshold": row(1e-3),
    "loss_aggregation": row("sequence", "constant"),
    "importance": row("truncate", "mask"),
    "importance_cap": row(1.1, importance="truncate") + row(1.1, importance="mask"),
    "ent_coef": row(0.1),
    "ptx_coef": row(0.2, ptx_coef=0.1),
    "value_loss": row("clip", "huber"),
    "value_clip_eps": row(0.05, value_loss="clip"),
    "huber_delta": row(0.1, value_loss="huber"),
    "vf_coef": row(0.0, 0.5),
    "num_epochs": row(2),
    "num_minibatches": row(2),
    "accumulation": row(2),
    "lr": row(0.01),
    "critic_lr": row(0.01),
    "critic_warmup_iterations": row(1),
    "lr_schedule": row("linear", "cosine", **TWICE),
    "warmup_iterations": row(1, **TWICE),
    "adam_b1": row(0.5, **TWICE),
    "adam_b2": row(0.5, **TWICE),
    "adam_eps": row(1e-3),
    "adam_eps_form": row("tensorflow"),
    "weight_decay": row(0.1),
    "max_grad_norm": row(1e-3),
    "ema_decay": row(0.5, 0.9),
    "noise_scale": row(True, accumulation=2),
    "max_skipped": row(1, by="watched"),
}  # fmt: skip

IDLE = {  # in which company nothing reads a field
    "gamma": dict(advantage="rloo", **GROUPS),
    "gae_lambda": dict(lambda_length_scale=0.5, critic_lambda=1.0),
    "critic_lambda": dict(advantage="reinforce"),
    "lambda_length_scale": dict(advantage="grpo", **GROUPS),
    "baseline_decay": {},
    "whiten_shift": {"whiten_advantages": "none"},
    "clip_eps": dict(policy_loss="none"),
    "clip_eps_high": dict(policy_loss="none"),
    "dual_clip": dict(policy_loss="gspo"),
    "value_clip_eps": {},
    "huber_delta": {},
    "value_loss": dict(advantage="rloo", **GROUPS),
    "vf_coef": dict(advantage="dr_grpo", **GROUPS),
    "critic_lr": dict(vf_coef=0.0),
    "critic_warmup_iterations": dict(advantage="reinforce_pp"),
    "overlong_penalty": {},
    "score_shift": dict(score_scale="none"),
    "kl_estimator": dict(kl_coef=0.0),
    "kl_in": dict(kl_coef=0.0),
    "kl_clamp": dict(kl_coef=0.0),
    "kl_target": dict(kl_coef=0.0),
    "kl_horizon": {},
    "exact_kl": dict(kl_estimator="exact"),
    "importance_cap": {},
}


# The others; `@` stands for the folder of the files that the test writes


BASES: dict[type, dict[str, Any]] = {
    PPOConfig: dataclasses.asdict(SMALL),
    ModelConfig: dict(vocab_size=11, num_layers=1, num_heads=2, width=8, mlp_width=8, max_positions=10),
    LinearScaling: dict(factor=2.0),
    Llama3Scaling: dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16),
    YarnScaling: dict(factor=2.0, original_max_positions=64, magnitude=1.1, beta_fast=4.0, beta_slow=1.0),
    LongScaling: dict(
        short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(2.0, 3.0, 4.0, 5.0), original_max_positions=8, magnitude=1.1
    ),
    SamplingConfig: dict(max_new_tokens=3, eos_ids=(1, 2), pad_id=0),
    kinds.PPOExperiment: dict(model="@model", prompts="@prompts.jsonl", reward="@rewards.py:count_good",
                              ppo=PPOConfig(batch_size=4, prompt_length=8, response_length=4, num_minibatches=1),
                              num_iterations=4, checkpoint_every=2, samples_every=2, num_samples=2,
                              eval_prompts=4, mesh=kinds.MeshSettings(data=1)),
    kinds.MeshSettings: dict(data=1),
    kinds.Architecture: dict(num_layers=1, num_heads=2, num_kv_heads=2, width=8, mlp_width=8, max_positions=16),
    kinds.SFTExperiment: dict(model="@model", data="@texts.jsonl", length=16, batch_size=4,
                              mesh=kinds.MeshSettings(data=1)),
    kinds.RewardExperiment: dict(model="@model", data="@pairs.jsonl", length=24, batch_size=4, warmup_steps=1,
                                 mesh=kinds.MeshSettings(data=1)),
    kinds.DPOExperiment: dict(model="@model", data="@pairs.jsonl", length=24, batch_size=4, warmup_steps=1,
                              mesh=kinds.MeshSettings(data=1)),
    kinds.EvaluateExperiment: dict(policy="@model", prompts="@prompts.jsonl", judge="@rewards.py:count_good",
                                   prompt_length=8, num_prompts=0),
    kinds.BestOfNExperiment: dict(model="@model", prompts="@prompts.jsonl", reward="@rewards.py:count_good",
                                  prompt_length=8, n="1,2,4", num_prompts=0),
    kinds.FeedbackExperiment: dict(model="@model", prompts="@prompts.jsonl", prompt_length=8, annotators=3),
    kinds.CorpusSettings: dict(num_train=60, num_heldout=5, num_demonstrations=5, num_prompts=8, vocab_size=600),
    kinds.RLHFExperiment: dict(model="@model", prompts="@prompts.jsonl", gold="@rewards.py:count_good",
                               num_eval_prompts=4,
                               ppo=kinds.PPOExperiment(ppo=PPOConfig(prompt_length=8, response_length=4))),
    kinds.CompareExperiment: dict(variants="a; b: ppo.lr=0.1", base=kinds.PPOExperiment()),
    ControlConfig: dict(num_envs=2, num_steps=4, num_epochs=1, width=4, depth=1, lr=0.1),
}  # fmt: skip

SFT_RUN, DPO_RUN = (
    "test_train_sft.py::test_a_run_leaves_what_it_promises",
    "test_train_dpo.py::test_a_run_leaves_what_it_promises",
)
REWARD_RUN = "test_train_reward.py::test_a_run_leaves_what_it_promises"
ROAD = "test_rlhf.py::test_every_stage_leaves_its_result"
KEPT = "test_resume.py::test_what_ends_early_ends_with_the_same_bits"
KL = PPOConfig(batch_size=4, prompt_length=8, response_length=4, num_minibatches=1)
UNSCALED, KL_TEXTS, KL_LINEAR = (
    dataclasses.replace(KL, **changes)
    for changes in ({"score_scale": "none"}, {"ptx_coef": 0.1}, {"lr_schedule": "linear"})
)
TEXTS = {"ppo": KL_TEXTS, "ptx_data": "@texts.jsonl", "ptx_length": 16, "ptx_batch_size": 8}
SERVICE = {"reward": "http://127.0.0.1:9/"}
REFUSED_TRACKER = row("nothing")  # those that are known have packages of their own: test_metrics.py
TRAINING = {
    "dtype": row("bfloat16"),
    "remat": "test_no_ignored_field.py::test_remat_reaches_the_model",
    "save_dtype": "test_save_dtype.py::test_the_dtype_of_the_exported_weights",
    "pad_token": row("<unk>"),
    "eos_token": row("▁."),
    "max_hours": "test_ending.py::test_every_script_that_trains_can_be_asked_to_end",
    "trackers": REFUSED_TRACKER,
    "mesh": row(kinds.MeshSettings(data=2)),
}
ASKING = {
    "prompts": row("@others.jsonl"),
    "prompts_split": row("test", prompts="@others"),
    "num_prompts": row(4),
    "long_prompts": row("keep_start", "keep_end"),
    "prompt_length": row(5),
    "response_length": row(7),
    "temperature": row(0.5),
    "batch_size": row(8),
    "seed": row(1),
    "dtype": row("bfloat16"),
    "pad_token": row("<unk>"),
    "eos_token": row("."),
}
JUDGEMENTS = {
    "model": row("@other"),
    "data": row("@pairs2.jsonl"),
    "data_split": row("test", data="@pairs"),
    "heldout": row("@pairs2.jsonl"),
    "heldout_split": row("train", heldout="@pairs2"),
    "heldout_frac": row(0.5),
    "length": row(9),
    "num_epochs": row(2),
    "batch_size": row(8),
    "lr": row(0.1),
    "lr_schedule": row("constant"),
    "warmup_steps": row(3),
    "weight_decay": row(0.3),
    "max_grad_norm": row(0.01),
}
ROWS: dict[type, dict[str, list[Row] | str]] = {
    PPOConfig: PPO_ROWS,
    ModelConfig: {
        "vocab_size": row(12, by="shapes"),
        "num_layers": row(2, by="shapes"),
        "num_heads": row(4),
        "width": row(4, by="shapes"),
        "mlp_width": row(4, by="shapes"),
        "max_positions": row(11, 12),
        "num_kv_heads": row(1, by="shapes"),
        "head_dim": row(2, by="shapes"),
        "positions": row("learned", by="shapes"),
        "position_offset": row(2, by="shapes", positions="learned"),
        "rope_theta": row(100.0),
        "rope_scaling": row(LinearScaling(2.0), Llama3Scaling(2.0, 0.1, 2.0, 4), YarnScaling(2.0, 4, 1.1))
        + row(LongScaling((1.0, 2.0), (2.0, 3.0), 4, 1.0), LongScaling((1.0, 2.0), (2.0, 3.0), 5, 1.0)),
        "rotary_dim": row(2),
        "local_rope_theta": row(100.0, 500.0, layer_windows=(2,)),
        "unrotated_layers": row((0,)),
        "layer_windows": row((2,), (3,)),
        "norm": row("layernorm", by="shapes"),
        "norm_eps": row(0.1),
        "norm_unit_offset": row(True),
        "norm_placement": row("after", "both", by="shapes"),
        "activation": row("gelu", "gelu_tanh", "relu"),
        "gated_mlp": row(False, by="shapes"),
        "attention_bias": row(True, by="shapes"),
        "attention_output_bias": row(False, by="shapes", attention_bias=True),
        "qk_norm": row("head", "projection", by="shapes"),
        "mlp_bias": row(True, by="shapes"),
        "num_experts": row(2, 3, by="shapes"),
        "experts_per_token": row(1, 2, num_experts=3),
        "normalize_experts": row(False, num_experts=3, experts_per_token=2),
        "parallel_residual": row(True),
        "query_pre_attn_scalar": row(9),
        "attention_softcap": row(0.1),
        "final_softcap": row(0.1),
        "embed_scale": row(True),
        "tie_embeddings": row(False, by="shapes"),
        "init_std": row(0.1),
        "family": "test_hub.py::test_a_model_is_saved_as_its_family",
        "lora_scale": row(2.0),
        "dtype": row("bfloat16"),
        "param_dtype": row("bfloat16", by="shapes"),
        "remat": "test_models.py::test_remat_saves_memory_and_changes_no_gradient",
    },
    LinearScaling: {"factor": row(3.0)},
    Llama3Scaling: {
        "factor": row(3.0),
        "low_freq_factor": row(0.5),
        "high_freq_factor": row(3.0),
        "original_max_positions": row(32),
    },
    YarnScaling: {
        "factor": row(3.0),
        "original_max_positions": row(256),
        "magnitude": row(1.2),
        "beta_fast": row(2.0),
        "beta_slow": row(0.25),
        "truncate": row(False),
    },
    LongScaling: {
        "short_factors": row((1.0, 2.0, 3.0, 5.0)),
        "long_factors": row((2.0, 3.0, 4.0, 6.0)),
        "original_max_positions": row(4),
        "magnitude": row(1.2),
    },
    SamplingConfig: {
        "max_new_tokens": row(2),
        "eos_ids": row((5, 6, 7, 8, 9)),
        "pad_id": row(4, eos_ids=(5, 6, 7, 8, 9)),
        "temperature": row(0.0, 2.0),
        "top_k": row(1, 3),
        "top_p": row(0.5),
        "min_p": row(0.5),
        "repetition_penalty": row(5.0),
        "min_new_tokens": row(3, eos_ids=(5, 6, 7, 8, 9)),
        "truncate_id": row(8, 9),
        "truncate_after": row(2, truncate_id=9, temperature=3.0),
    },
    LoRAConfig: {
        "rank": row(2),
        "alpha": row(3.0),
        "targets": row("query"),
        "rslora": row(True),
        "dora": row(True),
    },
    HttpOptions: {
        "timeout_s": "test_rewards_http.py::test_a_late_answer_is_given_up_on_time_and_asked_for_again",
        "retries": "test_rewards_http.py::test_a_service_that_stays_down_is_an_error_in_the_end",
        "batch_size": "test_rewards_http.py::test_many_are_sent_in_parts_and_keep_their_order",
        "backoff_s": "test_rewards_http.py::test_the_pauses_double_up_to_half_a_minute",
    },
    Limits: dict.fromkeys(
        ("wall_s", "cpu_s", "memory_mb", "processes", "disk_mb", "output_bytes"),
        "test_sandbox.py::test_every_limit_counts",
    ),
    ControlConfig: {
        "policy_loss": row("none") + row("cispo", clip_eps_high=0.3),
        "clip_eps": row(0.05),
        "clip_eps_high": row(0.6),
        "dual_clip": row(1.2),
        "ent_coef": row(0.1),
        "value_loss": row("clip", "huber", **TWICE),
        "value_clip_eps": row(0.01, value_loss="clip", **TWICE),
        "huber_delta": row(0.05, value_loss="huber"),
        "vf_coef": row(0.7),
        "num_epochs": row(2),
        "num_minibatches": row(2),
        "target_kl": row(1e-4, **TWICE),
        "ratio_threshold": row(0.1),
        "lr": row(0.2),
        "lr_schedule": row("constant", "cosine", **TWICE),
        "warmup_iterations": row(2, 3),
        "adam_b1": row(0.5, **TWICE),
        "adam_b2": row(0.9, **TWICE),
        "adam_eps": row(1e-2),
        "adam_eps_form": row("tensorflow", adam_eps=1e-2),
        "weight_decay": row(0.5),
        "max_grad_norm": row(1e-3, adam_eps=1e-2),
        "num_envs": row(3),
        "num_steps": row(5),
        "gamma": row(0.5),
        "gae_lambda": row(0.2),
        "whiten_advantages": row("none", "batch", num_minibatches=2),
        "whiten_shift": row(False),
        "trunk": row("shared"),
        "width": row(5),
        "depth": row(2),
    },
    kinds.ControlExperiment: {
        "env": "test_train_control.py::test_each_task_runs_and_leaves_its_pictures",
        "seed": "test_train_control.py::test_seed_and_plan_are_what_the_run_has",
        "num_seeds": "test_train_control.py::test_a_sweep_over_seeds_and_settings",
        "sweep": "test_train_control.py::test_a_sweep_over_seeds_and_settings",
        "num_iterations": "test_train_control.py::test_seed_and_plan_are_what_the_run_has",
        "eval_every": "test_train_control.py::test_seed_and_plan_are_what_the_run_has",
        "eval_episodes": "test_control.py::test_an_evaluation_is_whole_episodes",
        "eval_greedy": "test_control.py::test_an_evaluation_is_whole_episodes",
        "ppo": row(ControlConfig(num_epochs=3), by="control"),
    },
    kinds.BenchmarkExperiment: {
        "work": "test_benchmark.py::test_rows_are_measured_written_and_not_measured_again",
        "rounds": "test_benchmark.py::test_rows_are_measured_written_and_not_measured_again",
        "only": "test_benchmark.py::test_rows_are_measured_written_and_not_measured_again",
    },
    DPOConfig: {
        "loss": row("ipo", "kto"),
        "beta": row(0.3) + row(0.3, loss="ipo") + row(0.3, loss="kto"),
        "label_smoothing": row(0.2) + row(0.2, loss="ipo") + row(0.2, loss="kto"),
        "desirable_weight": row(2.0) + row(2.0, loss="kto"),
        "undesirable_weight": row(2.0) + row(2.0, loss="kto"),
    },
    kinds.PPOExperiment: TRAINING
    | {
        "model": row("@other"),
        "param_dtype": row("bfloat16"),
        "prompts": row("@others.jsonl"),
        "prompts_split": row("test", prompts="@others"),
        "long_prompts": row("keep_start", "keep_end"),
        "reward": row("@rewards.py:count_the", "@rewards.py:count_good*2", "jax:@rewards.py:score_good"),
        "reward_timeout_s": row(1.0) + row(1.0, **SERVICE),
        "reward_retries": row(1) + row(1, **SERVICE),
        "reward_batch_size": row(3) + row(3, gold="http://127.0.0.1:9/"),
        "gold": row("@rewards.py:count_good"),
        "critic": row("policy", "model"),
        "truncate_token": row("▁."),
        "reference_samples": row(6, ppo=UNSCALED) + row(6, by="begun"),
        "ptx_data": row("@texts.jsonl") + row("@texts2.jsonl", **TEXTS),
        "ptx_split": row("test") + row("test", **(TEXTS | {"ptx_data": "@texts"})),
        "ptx_length": row(9) + row(9, **TEXTS),
        "ptx_batch_size": row(4) + row(4, **TEXTS),
        "frozen_layers": row(1),
        "seed": row(1),
        "num_iterations": row(9, ppo=KL_LINEAR) + row(3, by="run"),
        "checkpoint_every": row(1, by="run"),
        "samples_every": row(1, by="run"),
        "num_samples": row(1, by="run"),
        "kl_limit": row(1.5, by="run"),
        "eval_prompts": row(8, by="run"),
        "checkpoints_to_keep": row(1, by="run"),
        "heldout_prompts": row("@others.jsonl"),
        "lora": row(kinds.LoRASettings(rank=2)),
        "ppo": row(KL_LINEAR),
    },
    kinds.LoRASettings: {
        "rank": row(2, 3),
        "alpha": row(3.0) + row(3.0, rank=2),
        "targets": row("query") + row("query", rank=2),
        "rslora": row(True) + row(True, rank=2),
        "dora": row(True) + row(True, rank=2),
    },
    kinds.MeshSettings: {"data": row(2, 4), "fsdp": row(2), "tensor": row(2)},
    kinds.Architecture: {
        "num_layers": row(2),
        "num_heads": row(4),
        "num_kv_heads": row(1),
        "width": row(16),
        "mlp_width": row(16),
        "max_positions": row(17),
    },
    kinds.SFTExperiment: TRAINING
    | {
        "model": row("@other"),
        "tokenizer": row("@words"),
        "data": row("@texts2.jsonl"),
        "data_split": row("test", data="@texts"),
        "heldout": row("@texts2.jsonl"),
        "heldout_split": row("train", heldout="@texts2"),
        "heldout_frac": row(0.5),
        "length": row(15),
        "pack": row(True),
        "seed": row(1),
        "num_steps": row(500),
        "batch_size": row(8),
        "accumulation": row(3),  # refused: 4 rows have no 3 parts; that parts are taken: test_sft.py
        "lr": row(0.1),
        "lr_schedule": row("constant"),
        "warmup_steps": row(3),
        "weight_decay": row(0.3),
        "max_grad_norm": row(0.01),
        "log_every": SFT_RUN,
        "eval_every": SFT_RUN,
        "patience": "test_train_sft.py::test_patience_that_does_not_run_out_exports_the_best_of_all",
        "checkpoint_every": "test_train_sft.py::test_a_run_that_crashes_after_any_save_ends_with_the_same_bits",
        "checkpoints_to_keep": row(3, by="resumed"),
        "architecture": row(kinds.Architecture(num_layers=1)),
    },
    kinds.RewardExperiment: TRAINING
    | JUDGEMENTS
    | {
        "normalize": "test_train_reward.py::test_without_normalisation_the_scores_stay_as_they_were_trained",
        "reference": "test_train_reward.py::test_samples_of_a_reference_normalise",
        "reference_samples": "test_train_reward.py::test_samples_of_a_reference_normalise",
        "response_length": "test_train_reward.py::test_samples_of_a_reference_normalise",
        "seed": row(1),
        "use_margin": row(False),
        "center_coef": row(0.1, data="@scores.jsonl"),  # refused; that it counts: test_reward_model.py
        "log_every": REWARD_RUN,
        "eval_every": REWARD_RUN,
        "checkpoint_every": REWARD_RUN,
        "checkpoints_to_keep": row(3, by="resumed"),
    },
    kinds.DPOExperiment: TRAINING
    | JUDGEMENTS
    | {
        "loss": row("kto"),
        "beta": "test_dpo.py::test_every_setting_changes_the_step",
        "label_smoothing": "test_dpo.py::test_every_setting_changes_the_step",
        "desirable_weight": "test_dpo.py::test_every_setting_changes_the_step",
        "undesirable_weight": "test_dpo.py::test_every_setting_changes_the_step",
        "threshold": row(2.1) + row(2.1, loss="kto", data="@scores.jsonl"),
        "seed": row(1),
        "accumulation": row(3),  # refused: 4 pairs have no 3 parts; that parts are taken: test_dpo.py
        "log_every": DPO_RUN,
        "eval_every": DPO_RUN,
        "checkpoint_every": DPO_RUN,
        "checkpoints_to_keep": row(3, by="resumed"),
    },
    kinds.EvaluateExperiment: ASKING
    | {
        "policy": row("@other"),
        "against": row("@other") + row("references", prompts="@answered.jsonl"),
        "judge": row("@rewards.py:count_the"),
        "language": row("en", language="zh", prompts="@mixed.jsonl"),
        "annotators": row(2, judge="page", against="@other"),
        "host": row("127.0.0.2", judge="page", against="@other"),
        "port": row(8001, judge="page", against="@other"),
        "token": row("a secret of some length", judge="page", against="@other"),
    },
    kinds.BestOfNExperiment: ASKING
    | {
        "model": row("@other"),
        "reward": row("@rewards.py:count_good*-1"),
        "gold": row("@rewards.py:count_good"),
        "n": row("1,2"),
    },
    kinds.FeedbackExperiment: ASKING
    | {
        "model": row("@other"),
        "num_responses": row(1, 3),
        "responses": row("@given.jsonl"),
        "responses_split": row("test", responses="@given"),
        "judged": row("@pairs.jsonl"),
        "kind": row("rank", "score"),
        "scale": row(7, kind="score"),
        "overlap": row(1.0),
        "annotators": row(2, overlap=1.0),
        "host": row("127.0.0.2"),
        "port": row(8001),
        "token": row("a secret of some length"),
        "until_complete": row(True),
        "export": row("rankings"),
    },
    kinds.CorpusSettings: {
        "num_train": row(50),
        "num_heldout": row(6),
        "num_demonstrations": row(6),
        "num_prompts": row(9),
        "vocab_size": row(20),
        "seed": row(1),
    },
    kinds.RLHFExperiment: {
        "model": row("@other"),
        "prompts": row("@others.jsonl"),
        "num_eval_prompts": row(5),
        "feedback": row("page"),
        "gold": row("@rewards.py:nan_at_dog"),
        "annotator_temperature": "test_simulated.py::test_pairs_follow_bradley_terry",
        "seed": row(1),
        "corpus": row(kinds.CorpusSettings(num_train=7)),
        "pretrain": row(kinds.SFTExperiment(lr=1.0)),
        "sft": row(kinds.SFTExperiment(lr=1.0)),
        "collect": ROAD,
        "reward": ROAD,
        "ppo": "test_rlhf.py::test_a_changed_setting_of_ppo_runs_ppo_and_evaluation_again",
    },
    kinds.CompareExperiment: {
        "variants": row("a", "a; b: ppo.lr=0.2"),
        "num_seeds": "test_compare.py::test_a_comparison",
        "task": "test_compare.py::test_the_anchor_brings_model_prompts_reward_and_critic",
        "metric": "test_compare.py::test_a_metric_that_no_run_has_is_refused",
        "thresholds": row("1, 2"),
        "references": "test_compare.py::test_its_table_and_picture",
        "base": row(kinds.PPOExperiment(seed=5)),
    },
}
