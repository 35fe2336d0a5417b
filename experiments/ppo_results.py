"""What a run of PPO leaves behind: the policy in the formats of others, curves, and a comparison with its start."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ppo_setup import Setup, trained_part
from experiments.results import curves
from experiments.rollouts import batch_of, judge, judge_on_host, texts_of
from ppo_jax import hub
from ppo_jax.metrics import write_jsonl
from ppo_jax.models import merge, overlay
from ppo_jax.plots import plot_curves
from ppo_jax.runs import write_json
from ppo_jax.types import Params, TrainState


def finish(setup: Setup, state: TrainState, workdir: Path, reached: int, stopped: bool) -> dict[str, Any]:
    """Exports what was trained, draws the curves, and compares the policy with the model that it started from."""
    settings = setup.settings
    if state.ema_params is not None:  # the average is what is exported and compared
        decoder = jax.tree.map(lambda average, x: average.astype(x.dtype), state.ema_params, state.params["decoder"])
        state = state.replace(params=state.params | {"decoder": decoder})
    export(setup, state.params, workdir)
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", curves(settings.kl_limit), title=workdir.name)
    untrained = trained_part(settings, setup.model.config, setup.ref_params)
    untrained = jax.device_put(untrained, setup.shardings.state.params["decoder"])
    before, answers_before = evaluate(setup, state.replace(params=state.params | {"decoder": untrained}))
    after, answers_after = evaluate(setup, state)
    rows = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(
            np.repeat(setup.heldout.texts, settings.ppo.responses_per_prompt).tolist(),
            answers_before,
            answers_after,
            strict=False,
        )
    ]
    write_jsonl(workdir / "responses.jsonl", rows)
    results = {
        "iterations": int(state.step),
        "reached": reached,
        "stopped": stopped,
        "before": before,
        "after": after,
        "samples": rows[: 2 * settings.num_samples],
    }
    write_json(workdir / "results.json", results)
    return results


def export(setup: Setup, params: Params, workdir: Path) -> None:
    """Writes policy/ (a Hugging Face folder, with the value head beside it), and adapter/ and critic/ if there are."""
    config, ids, lora = setup.model.config, setup.sampling, setup.settings.lora.config()
    params, base = jax.device_get(params), jax.device_get(setup.ref_params)
    known = {"eos_ids": ids.eos_ids, "pad_id": ids.pad_id}
    decoder = merge(overlay(base, params["decoder"]), config.lora_scale)
    hub.save(workdir / "policy", decoder, config, setup.tokenizer, **known, dtype=setup.save_dtype)
    if lora:
        hub.save_adapter(workdir / "adapter", params["decoder"], lora, config, setup.settings.model)
    if "critic" in params:
        head = {"kernel": params["value_head"]["kernel"]}
        critic = {"decoder": params["critic"], "score_head": head}
        hub.save_reward_model(workdir / "critic", critic, config, setup.tokenizer, **known)
        hub.save_value_head(workdir / "critic", params["value_head"])
    elif "value_head" in params:
        hub.save_value_head(workdir / "policy", params["value_head"])


def evaluate(setup: Setup, state: TrainState) -> tuple[dict[str, Any], list[str]]:
    """Answers the evaluation prompts, with the same random numbers for every policy.

    Returns:
        (means over the responses: see `results_page`; the responses).
    """
    config, prompts = setup.settings.ppo, setup.heldout
    size = config.batch_size // config.responses_per_prompt
    num_batches = -(-min(setup.settings.eval_prompts, len(prompts.texts)) // size)
    all_scores, all_gold, all_metrics, answers = [], [], [], []
    for number in range(num_batches):
        rows = np.arange(number * size, (number + 1) * size) % len(prompts.texts)
        at = state.replace(key=jax.random.key(2**31 - 1), step=jnp.int32(number))
        at = jax.device_put(at, setup.shardings.state)
        rollout = setup.step.act(at, setup.ref_params, batch_of(setup, prompts, rows))
        scores = judge(setup, prompts, rows, rollout)
        all_metrics.append(jax.device_get(setup.step.measure(at, setup.ref_params, rollout, scores)))
        all_scores.append(np.asarray(scores.whole))
        responses = texts_of(setup, rollout)
        if setup.gold:
            each = np.repeat(rows, config.responses_per_prompt)
            all_gold.append(judge_on_host(setup.gold, prompts, each, responses))
        answers += responses
    scores = np.concatenate(all_scores)
    mean = {name: float(np.mean([row[name] for row in all_metrics])) for name in all_metrics[0]}
    gold = {"gold": float(np.mean(all_gold))} if all_gold else {}
    return gold | {
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_se": float(scores.std() / len(scores) ** 0.5),
        "kl": mean["objective/kl"],
        "kl_exact": mean["kl/exact"],
        "ref_perplexity": float(np.exp(mean["objective/ref_nll"])),
        "length": mean["objective/length"],
        "eos_frac": mean["objective/eos_frac"],
        "num_responses": len(scores),
    }, answers
