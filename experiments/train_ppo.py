"""PPO fine-tuning of a causal language model.

    python experiments/train_ppo.py --config=experiments/configs/ppo_sentiment.py --workdir=runs/sentiment

The workdir gets config.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoints/, and at the end policy/ (a
Hugging Face folder), curves.png, results.json, responses.jsonl (the evaluation prompts, answered before and after) and
results.md. The same command again goes on where the run stopped.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments import cli
from experiments.results import curves, print_costs, results_page
from experiments.settings import PPOExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.data import PromptSet, batch_indices, load_prompts
from ppo_jax.errors import check
from ppo_jax.metrics import (
    JsonlWriter,
    Reporter,
    atomic_write,
    check_trackers,
    make_writers,
    truncate_jsonl,
    write_jsonl,
)
from ppo_jax.models import ActorCritic
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.planning import count_parameters, program_cost
from ppo_jax.plots import plot_curves
from ppo_jax.ppo import TrainStep, init_state, make_train_step, policy_sampling
from ppo_jax.rewards import (
    HostReward,
    Judge,
    call_reward,
    check_score,
    check_scores,
    load_critic,
    load_host_reward,
    load_reward,
)
from ppo_jax.runs import refuse_non_finite, resume, write_json
from ppo_jax.sampling import SamplingConfig
from ppo_jax.sharding import Shardings, make_mesh, make_shardings
from ppo_jax.tokenizers import check_vocabulary, decode_responses, load_tokenizer, special_tokens
from ppo_jax.types import Params, Prompts, Rollout, TrainState

MAY_CHANGE = tuple("gold checkpoint_every checkpoints_to_keep samples_every num_samples eval_prompts trackers".split())
"""Fields that a restart may change: they do not touch the training. So may `num_iterations` under a constant rate."""


class Setup(NamedTuple):
    """Everything that training needs; made before anything is written, so that bad input leaves nothing behind."""

    settings: PPOExperiment
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    heldout: PromptSet  # for the comparison before and after
    model: ActorCritic
    sampling: SamplingConfig
    shardings: Shardings
    state: TrainState  # before the first iteration
    ref_params: Params
    step: TrainStep
    schedule: Any  # gradient step -> learning rate
    judge: Judge  # its score, if it has one, is compiled into `step.iterate`
    gold: HostReward | None  # only logged


def prepare(settings: PPOExperiment) -> Setup:
    """Loads and checks all inputs, and builds (without compiling) the programs.

    Raises:
        InputError: any of the inputs cannot be used.
    """
    config = settings.ppo
    folder = hub.resolve(settings.model)
    model_config = hub.load_config(folder, dtype=settings.dtype)
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, hub.load_eos_ids(folder), settings.pad_token, settings.eos_token)
    length = config.prompt_length + config.response_length
    check(
        "config.ppo.prompt_length + response_length", length, length <= model_config.max_positions,
        f"at most the model's {model_config.max_positions} positions",
    )  # fmt: skip
    how = (tokenizer, special.pad_id, config.prompt_length, settings.long_prompts, settings.prompts_split)
    prompts = load_prompts(settings.prompts, *how)
    heldout = load_prompts(settings.heldout_prompts, *how) if settings.heldout_prompts else prompts
    for part in (prompts, heldout):
        check_vocabulary(special, part.tokens, model_config.vocab_size)
    check_trackers(tracker_names(settings.trackers))
    judge = load_reward(settings.reward, tokenizer, special)
    check_score(settings.reward, judge, config.batch_size, config.prompt_length, config.response_length)
    gold = load_host_reward(settings.gold) if settings.gold else None
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    minibatch = config.batch_size // config.num_minibatches
    check(
        "config.ppo.batch_size / num_minibatches",
        minibatch,
        minibatch % shares == 0,
        f"a multiple of mesh data x fsdp ({shares})",
    )

    model = ActorCritic(model_config)
    sampling = policy_sampling(config, special.eos_ids, special.pad_id)
    per_iteration = config.updates_per_iteration
    schedule = make_schedule(
        config.lr,
        config.lr_schedule,
        warmup_steps=config.warmup_iterations * per_iteration,
        num_steps=settings.num_iterations * per_iteration,
    )
    tx = make_optimizer(
        schedule, config.adam_b1, config.adam_b2, config.adam_eps, config.weight_decay, config.max_grad_norm
    )
    decoder = jax.tree.map(jnp.asarray, hub.load_params(folder, model_config))
    key = jax.random.key(settings.seed)
    critic = load_critic(settings.critic, settings.reward, model_config, tokenizer) if settings.critic else None
    state = init_state(decoder, model, tx, config, key, critic)
    shardings = make_shardings(mesh, state, judge.params)
    # The reference is a copy of its own: the state's buffers are donated, iteration after iteration.
    ref_params = jax.device_put(jax.tree.map(jnp.copy, decoder), shardings.ref_params)
    state = jax.device_put(state, shardings.state)
    judge = judge._replace(params=jax.device_put(judge.params, shardings.judge_params))
    step = make_train_step(model, tx, config, sampling, shardings, judge.score)
    return Setup(
        settings,
        tokenizer,
        prompts,
        heldout,
        model,
        sampling,
        shardings,
        state,
        ref_params,
        step,
        schedule,
        judge,
        gold,
    )


def batch_of(setup: Setup, prompts: PromptSet, rows: np.ndarray) -> Prompts:
    """The prompts of these rows, on their devices."""
    return jax.device_put(Prompts(prompts.tokens[rows], prompts.mask[rows]), setup.shardings.batch)


def texts_of(setup: Setup, rollout: Rollout) -> list[str]:
    """Responses as text."""
    tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
    return decode_responses(setup.tokenizer, tokens, mask, setup.sampling.max_new_tokens)


def judge_on_host(reward: HostReward, prompts: PromptSet, rows: np.ndarray, responses: list[str]) -> np.ndarray:
    """Scores `[B]` by a host reward."""
    texts, columns = prompts.texts, prompts.columns
    return call_reward(reward, [texts[i] for i in rows], responses, [columns[i] for i in rows])


def iterate(setup: Setup, state: TrainState, rows: np.ndarray) -> tuple[TrainState, dict[str, float], Rollout, Any]:
    """One PPO iteration, as one program, or as two around a reward on the host.

    Returns:
        (state, metrics with `optim/lr` and `time/*`, rollout, scores).
    """
    batch, clock = batch_of(setup, setup.prompts, rows), _Stopwatch()
    if setup.step.iterate:
        state, metrics, rollout, scores = setup.step.iterate(state, setup.ref_params, batch, setup.judge.params)
        check_scores(setup.settings.reward, jax.device_get(scores), [setup.prompts.texts[i] for i in rows])
    else:
        rollout = jax.block_until_ready(setup.step.act(state, batch))
        clock.lap("time/generate_s")
        scores = judge_on_host(setup.judge.host, setup.prompts, rows, texts_of(setup, rollout))
        clock.lap("time/score_s")
        state, metrics = setup.step.learn(
            state, setup.ref_params, rollout, jax.device_put(scores, setup.shardings.batch)
        )
    metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}  # waits
    clock.lap("time/program_s" if setup.step.iterate else "time/learn_s")
    if setup.gold:
        gold = judge_on_host(setup.gold, setup.prompts, rows, texts_of(setup, rollout))
        metrics["objective/gold"] = float(gold.mean())
        clock.lap("time/gold_s")
    seconds = sum(clock.laps.values())
    config = setup.settings.ppo
    metrics["optim/lr"] = float(setup.schedule(int(state.step) * config.updates_per_iteration - 1))
    metrics |= clock.laps | {
        "time/iteration_s": seconds,
        "time/tokens_per_s": metrics["objective/length"] * config.batch_size / seconds,
    }
    return state, metrics, rollout, scores


class _Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def train(setup: Setup, workdir: Path) -> dict[str, Any]:
    """Trains to the last iteration, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, or the reward failed.
    """
    settings = setup.settings
    may_change = (*MAY_CHANGE, "num_iterations") if settings.ppo.lr_schedule == "constant" else MAY_CHANGE
    keep = max(settings.checkpoints_to_keep, 2 if settings.kl_limit else 1)  # one above the limit and one below
    total = settings.num_iterations
    config = dataclasses.asdict(settings)
    checkpoints, state = resume(workdir, config, may_change, setup.state, total, keep, "config.num_iterations")
    done = int(state.step)
    if (saved := finished(workdir, done, total)) is not None:
        return saved
    if not done and settings.kl_limit:
        checkpoints.save(state)  # to go back to
    truncate_jsonl(workdir / "samples.jsonl", "iteration", done)
    trackers = tracker_names(settings.trackers)
    writers = make_writers(workdir, trackers, config, workdir.name, start_step=done)
    stopped = False
    with writers, JsonlWriter(workdir / "samples.jsonl") as samples, Reporter(total, done) as reporter:
        announce(setup, reporter, done)
        while done < total and not stopped:
            rows = batch_indices(len(setup.prompts.texts), settings.ppo.batch_size, done, settings.seed)
            state, metrics, rollout, scores = iterate(setup, state, rows)
            refuse_non_finite(metrics, f"iteration {done}", "lower config.ppo.lr, or the range of the scores")
            writers.write(done, metrics)
            reporter.update(done, metrics)
            stopped = 0 < settings.kl_limit < metrics["objective/kl"]
            if stopped or done + 1 == total or done % settings.samples_every == 0:
                show_samples(setup, done, rows, rollout, scores, samples, reporter)
            done += 1
            if not stopped and (done == total or done % settings.checkpoint_every == 0):
                checkpoints.save(state)
        reached = checkpoints.latest_step() or 0
        if stopped:  # the policy that acted in the last iteration was above the limit already, and may have been saved
            state = checkpoints.restore(state, before=done - 1)
            reporter.print(f"stopped: the KL is above {settings.kl_limit:g} nats; back to iteration {int(state.step)}")
    checkpoints.close()
    return finish(setup, state, workdir, reached, stopped)


def finished(workdir: Path, done: int, total: int) -> dict[str, Any] | None:
    """The results of a run that has ended: after all its iterations, or by its KL limit; None if it goes on."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"reached": -1, "stopped": False}
    ended = results["reached"] == done and (results["stopped"] or done == total)
    return results if ended else None


def show_samples(
    setup: Setup, iteration: int, rows: np.ndarray, rollout: Rollout, scores: Any, file: JsonlWriter, reporter: Reporter
) -> None:
    """The first few prompts and responses of an iteration, to the terminal and to samples.jsonl."""
    num = setup.settings.num_samples
    prompts, responses = [setup.prompts.texts[i] for i in rows[:num]], texts_of(setup, rollout)[:num]
    points = np.asarray(scores).tolist()[:num]
    reporter.samples_table(prompts, responses, points, title=f"iteration {iteration + 1}", max_rows=num)
    for prompt, response, score in zip(prompts, responses, points, strict=True):
        file.write({"iteration": iteration, "prompt": prompt, "response": response, "score": score})


def announce(setup: Setup, reporter: Reporter, start: int) -> None:
    """Says what is about to run, and what happened to the prompts."""
    prompts, config = setup.prompts, setup.model.config
    devices = f"{jax.device_count()} {jax.devices()[0].platform}"
    reporter.print(
        f"model: {count_parameters(setup.ref_params):,} parameters, {config.num_layers} layers; {devices} device(s)"
        + (f"; going on after iteration {start}" if start else "")
    )
    limit = setup.settings.ppo.prompt_length
    fate = (
        f"{prompts.num_dropped} dropped, {prompts.num_cut} cut"
        if prompts.num_dropped + prompts.num_cut
        else "none longer"
    )
    reporter.print(f"prompts: {len(prompts.texts):,} of at most {limit} tokens ({fate})")


def finish(setup: Setup, state: TrainState, workdir: Path, reached: int, stopped: bool) -> dict[str, Any]:
    """Exports the policy, draws the curves, and compares the policy with the model that it started from."""
    params = jax.device_get(state.params["decoder"])
    ids = setup.sampling
    hub.save(workdir / "policy", params, setup.model.config, setup.tokenizer, eos_ids=ids.eos_ids, pad_id=ids.pad_id)
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", curves(setup.settings.kl_limit), title=workdir.name)
    before, answers_before = evaluate(setup, state.replace(params=state.params | {"decoder": setup.ref_params}))
    after, answers_after = evaluate(setup, state)
    rows = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, old, new in zip(setup.heldout.texts, answers_before, answers_after, strict=False)
    ]
    write_jsonl(workdir / "responses.jsonl", rows)
    results = {
        "iterations": int(state.step),
        "reached": reached,
        "stopped": stopped,
        "before": before,
        "after": after,
        "samples": rows[: 2 * setup.settings.num_samples],
    }
    write_json(workdir / "results.json", results)
    return results


def evaluate(setup: Setup, state: TrainState) -> tuple[dict[str, Any], list[str]]:
    """Answers the evaluation prompts, with the same random numbers for every policy.

    Returns:
        (means over the responses: see `results_page`; the responses).
    """
    size, prompts = setup.settings.ppo.batch_size, setup.heldout
    num_batches = -(-min(setup.settings.eval_prompts, len(prompts.texts)) // size)
    place = partial(jax.device_put, device=setup.shardings.replicated)
    all_scores, all_gold, all_metrics, answers = [], [], [], []
    for number in range(num_batches):
        rows = np.arange(number * size, (number + 1) * size) % len(prompts.texts)
        at = state.replace(key=place(jax.random.key(2**31 - 1)), step=place(jnp.int32(number)))
        rollout = setup.step.act(at, batch_of(setup, prompts, rows))
        responses = texts_of(setup, rollout)
        if setup.step.score:
            scores = setup.step.score(setup.judge.params, rollout)
        else:
            scores = judge_on_host(setup.judge.host, prompts, rows, responses)
        measured = setup.step.measure(at, setup.ref_params, rollout, jax.device_put(scores, setup.shardings.batch))
        all_metrics.append(jax.device_get(measured))
        all_scores.append(np.asarray(scores))
        if setup.gold:
            all_gold.append(judge_on_host(setup.gold, prompts, rows, responses))
        answers += responses
    scores = np.concatenate(all_scores)
    mean = {
        name.removeprefix("objective/"): float(np.mean([row[name] for row in all_metrics])) for name in all_metrics[0]
    }
    gold = {"gold": float(np.mean(all_gold))} if all_gold else {}
    return gold | {
        "score": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_se": float(scores.std() / len(scores) ** 0.5),
        "kl": mean["kl"],
        "ref_perplexity": float(np.exp(mean["ref_nll"])),
        "length": mean["length"],
        "eos_frac": mean["eos_frac"],
        "num_responses": len(scores),
    }, answers


def dry_run(settings: PPOExperiment) -> None:
    """Compiles the programs of an iteration and prints what they cost on each device."""
    setup = prepare(settings)
    batch = batch_of(setup, setup.prompts, np.zeros(setup.settings.ppo.batch_size, int))
    if setup.step.iterate:
        programs = {"iterate": setup.step.iterate.lower(setup.state, setup.ref_params, batch, setup.judge.params)}
    else:
        rollout = jax.eval_shape(setup.step.act, setup.state, batch)
        scores = jax.ShapeDtypeStruct((setup.settings.ppo.batch_size,), jnp.float32)
        programs = {
            "act": setup.step.act.lower(setup.state, batch),
            "learn": setup.step.learn.lower(setup.state, setup.ref_params, rollout, scores),
        }
    print_costs({name: program_cost(lowered.compile()) for name, lowered in programs.items()})


def main(settings: PPOExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    page = results_page(train(prepare(settings), workdir), workdir, settings.kl_limit)
    atomic_write(workdir / "results.md", page.encode())
    print(page)


if __name__ == "__main__":
    cli.launch(PPOExperiment, main, dry_run)
