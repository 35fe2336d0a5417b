"""Training of a reward model, from comparisons (pairs, choices, rankings) or from ratings.

    python experiments/train_reward.py --config=experiments/configs/reward.py --workdir=runs/reward \
        --config.model=FOLDER --config.data=PAIRS.jsonl

The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, reference_samples.jsonl, and at the end
model/ (a Hugging Face sequence-classification folder with one label), curves.png, reliability.png and results.json. The
same command again goes on where the run stopped.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments import cli
from experiments.ending import asked_to_end, end_early
from experiments.responses import Responder
from experiments.results import REWARD_COLUMNS, REWARD_PANELS, print_costs
from experiments.settings import RewardExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.comparisons import JudgedSet, encode_judged, split_by_prompt
from ppo_jax.data import batch_indices, pad
from ppo_jax.errors import check
from ppo_jax.evaluation import (
    accuracy_by_margin,
    expected_calibration_error,
    length_correlation,
    pair_accuracy,
    reliability,
)
from ppo_jax.losses import ranking_loss, rating_loss
from ppo_jax.metrics import Reporter, check_trackers, make_writers, read_jsonl, write_jsonl
from ppo_jax.models import RewardModel
from ppo_jax.optim import fresh_state, make_optimizer, make_schedule
from ppo_jax.planning import count_parameters, program_cost
from ppo_jax.plots import plot_curves, plot_reliability
from ppo_jax.preferences import read_judged
from ppo_jax.reward_model import RewardStep, init_reward_params, make_reward_step, normalized_head
from ppo_jax.runs import refuse_non_finite, resume, write_json
from ppo_jax.sharding import Shardings, make_mesh, make_place, make_shardings
from ppo_jax.tokenizers import (
    SpecialTokens,
    check_vocabulary,
    encode_prompt,
    encode_text,
    load_tokenizer,
    render_chat,
    special_tokens,
)
from ppo_jax.types import Params, TrainState

MAY_CHANGE = ("log_every", "eval_every", "checkpoint_every", "checkpoints_to_keep", "trackers", "max_hours")
"""Fields that a restart may change: they do not touch the training."""


class Setup(NamedTuple):
    """Everything that training needs; made before anything is written."""

    settings: RewardExperiment
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    judged: JudgedSet
    heldout: JudgedSet
    model: RewardModel
    shardings: Shardings
    state: TrainState  # before the first step
    step: RewardStep
    schedule: Any  # gradient step -> learning rate
    num_steps: int
    save_dtype: str  # of the exported weights


def prepare(settings: RewardExperiment) -> Setup:
    """Loads and checks all inputs, and builds (without compiling) the programs.

    Raises:
        InputError: any of the inputs cannot be used.
    """
    folder = hub.resolve(settings.model)
    language_model = hub.load_config(folder, dtype=settings.dtype)
    # There is no vocabulary projection.
    config = dataclasses.replace(language_model, tie_embeddings=True, remat=settings.remat)
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, hub.load_eos_ids(folder), settings.pad_token, settings.eos_token)
    check("config.length", settings.length, settings.length <= config.max_positions,
          f"at most the model's {config.max_positions} positions")  # fmt: skip
    if settings.normalize and settings.reference:
        hub.load_config(hub.resolve(settings.reference))  # refused now and not after the folder is made
    judged, heldout = load_judged(settings, tokenizer, special)
    for part in (judged, heldout):
        check_vocabulary(special, part.tokens, config.vocab_size)
    check("config.center_coef", settings.center_coef, not (settings.center_coef and judged.are_ratings),
          "0 with scores, which say themselves where their center is")  # fmt: skip
    check_trackers(tracker_names(settings.trackers))
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    size = settings.batch_size
    check("config.batch_size", size, size % shares == 0, f"a multiple of mesh data x fsdp ({shares})")
    total = len(judged.tokens)
    check("config.batch_size", size, size <= total, f"at most the {total} judgements to train on")

    num_steps = settings.num_epochs * total // size
    schedule = make_schedule(settings.lr, settings.lr_schedule, settings.warmup_steps, num_steps)
    tx = make_optimizer(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    model = RewardModel(config)
    head_key, key = jax.random.split(jax.random.key(settings.seed))
    decoder = hub.load_params(folder, language_model, make_place(mesh))
    save_dtype = hub.load_dtype(folder) if settings.save_dtype == "model" else settings.save_dtype
    state = fresh_state(init_reward_params(decoder, config, head_key), tx, key)
    shardings = make_shardings(mesh, state)
    step = make_reward_step(model, tx, shardings, special.pad_id, settings.center_coef)
    state = jax.device_put(state, shardings.state)
    return Setup(settings, tokenizer, special, judged, heldout, model, shardings, state, step, schedule, num_steps,
                 save_dtype)  # fmt: skip


def load_judged(
    settings: RewardExperiment, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> tuple[JudgedSet, JudgedSet]:
    """The judgements to train on, and those held out."""

    def load(source: str, split: str) -> JudgedSet:
        rows = read_judged(source, split, render=lambda messages: render_chat(tokenizer, messages))
        if not settings.use_margin:
            rows = [dataclasses.replace(row, margin=0.0) for row in rows]
        return encode_judged(rows, tokenizer, special, settings.length)

    judged = load(settings.data, settings.data_split)
    if not settings.heldout:
        return split_by_prompt(judged, settings.heldout_frac)
    heldout = load(settings.heldout, settings.heldout_split)
    same = heldout.are_ratings == judged.are_ratings
    check("config.heldout", settings.heldout, same, "judgements of the same kind as config.data")
    return judged, heldout


def read_texts(setup: Setup, read: Any, params: Params, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`read(params, tokens, mask)` of n texts `[n, S]`, a batch at a time; `[n, ...]`."""
    size, total = setup.settings.batch_size, len(tokens)
    parts = []
    for start in range(0, total, size):
        rows = np.resize(np.arange(start, min(start + size, total)), size)  # the last batch is filled up
        batch = jax.device_put((tokens[rows], mask[rows]), setup.shardings.batch)
        parts.append(np.asarray(read(params, *batch)))
    return np.concatenate(parts)[:total]


def score_judged(setup: Setup, params: Params, judged: JudgedSet) -> np.ndarray:
    """Scores of all texts of some judgements, `[num, C]`; arbitrary where there is no text."""
    num, most, length = judged.tokens.shape
    flat = (x.reshape(num * most, length) for x in (judged.tokens, judged.mask))
    return read_texts(setup, setup.step.score, params, *flat).reshape(num, most)


def heldout_metrics(heldout: JudgedSet, scores: np.ndarray) -> dict[str, float]:
    """Loss of the held-out judgements under their scores `[num, C]`, and accuracy (or rmse, for ratings)."""
    scores = jnp.asarray(scores)
    if heldout.are_ratings:
        loss, metrics = rating_loss(scores[:, 0], jnp.asarray(heldout.scores))
    else:
        loss, metrics = ranking_loss(scores, jnp.asarray(heldout.ranks), jnp.asarray(heldout.margin))
    return {"heldout/loss": float(loss)} | {f"heldout/{name}": float(x) for name, x in metrics.items()}


def reference_samples(setup: Setup, workdir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Texts of the reference policy (tokens, mask), each `[n, S]`: sampled at the first start, read again later."""
    settings, judged = setup.settings, setup.judged
    num = settings.reference_samples
    if not settings.reference:
        present = np.argwhere(judged.mask.any(axis=2))[:num]
        return judged.tokens[tuple(present.T)], judged.mask[tuple(present.T)]
    path = workdir / "reference_samples.jsonl"
    if not path.exists():
        write_jsonl(path, sample_reference(setup))
    texts = [(row["prompt"], row["completion"]) for row in read_jsonl(path)]
    ids = [encode_text(setup.tokenizer, setup.special, *text)[-settings.length :] for text in texts]
    return pad(ids, settings.length, setup.special.pad_id, side="right")


def sample_reference(setup: Setup) -> list[dict[str, str]]:
    """Responses of the reference to the data's prompts, in turn, one a row."""
    settings = setup.settings
    sizes = {prompt: len(encode_prompt(setup.tokenizer, prompt)) for prompt in setup.judged.prompts}
    room = setup.model.config.max_positions - settings.response_length
    prompts = [prompt for prompt, size in sizes.items() if 1 <= size <= room]
    check("config.reference", settings.reference, len(prompts) > 0, f"data with prompts of 1 to {room} tokens")
    longest = max(sizes[prompt] for prompt in prompts)
    options = {name: getattr(settings, name) for name in ("dtype", "pad_token", "eos_token")}
    responder = Responder(settings.reference, longest, settings.response_length, **options)
    prompts = [prompts[i % len(prompts)] for i in range(settings.reference_samples)]
    answers = responder.respond(prompts, seed=settings.seed)
    return [{"prompt": prompt, "completion": texts[0]} for prompt, texts in zip(prompts, answers, strict=True)]


def normalize(setup: Setup, params: Params, samples: tuple[np.ndarray, np.ndarray]) -> tuple[Params, dict[str, float]]:
    """Parameters whose scores of the samples have mean 0 and standard deviation 1; and what these were."""
    hidden = read_texts(setup, setup.step.last_hidden, params, *samples)
    kernel = np.asarray(params["score_head"]["kernel"])
    scores = hidden @ kernel
    head = {"kernel": normalized_head(kernel, hidden)}
    head = jax.device_put(head, setup.shardings.state.params["score_head"])
    return params | {"score_head": head}, {"mean": float(scores.mean()), "std": float(scores.std())}


def train(setup: Setup, workdir: Path) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, or the loss is no longer finite.
        StoppedEarly: a signal or `max_hours` asked for it; the last step is saved.
    """
    settings, total = setup.settings, setup.num_steps
    checkpoints, state = resume(
        workdir, dataclasses.asdict(settings), MAY_CHANGE, setup.state, total, settings.checkpoints_to_keep
    )
    start = int(state.step)
    if start == total and (workdir / "results.json").exists():
        return json.loads((workdir / "results.json").read_text())
    samples = reference_samples(setup, workdir) if settings.normalize else None
    if samples is not None and not start:
        params, before = normalize(setup, state.params, samples)
        state = state.replace(params=params)
        write_json(workdir / "normalization.json", before)
    trackers = tracker_names(settings.trackers)
    writers = make_writers(workdir, trackers, dataclasses.asdict(settings), workdir.name, start_step=start)
    columns, hours = REWARD_COLUMNS, settings.max_hours
    with checkpoints, writers, Reporter(total, start, columns, label="step") as reporter, asked_to_end(hours) as asked:
        announce(setup, reporter, start)
        began = time.perf_counter(), start
        for number in range(start, total):
            rows = batch_indices(len(setup.judged.tokens), settings.batch_size, number, settings.seed)
            state, metrics = setup.step.learn(state, jax.device_put(setup.judged.batch(rows), setup.shardings.batch))
            done = number + 1
            row = {}
            saves = done == total or done % settings.checkpoint_every == 0
            if saves or done % settings.log_every == 0:
                row = {name: float(x) for name, x in metrics.items()}  # waits
                seconds = (time.perf_counter() - began[0]) / (done - began[1])
                row |= {"optim/lr": float(setup.schedule(number)), "time/step_s": seconds}
                refuse_non_finite(row, f"step {number}", "lower config.lr")
                began = time.perf_counter(), done
            if done == total or done % settings.eval_every == 0:
                row |= heldout_metrics(setup.heldout, score_judged(setup, state.params, setup.heldout))
            if row:
                writers.write(number, row)
                reporter.update(number, row)
            if saves:
                checkpoints.save(state)
            if who := asked():
                refuse_non_finite({name: float(x) for name, x in metrics.items()}, f"step {number}", "lower config.lr")
                end_early(checkpoints, state, who, f"{done} of {total} steps")
    return finish(setup, state, workdir, samples)


def announce(setup: Setup, reporter: Reporter, start: int) -> None:
    """Says what is about to run, and what happened to the judgements."""
    judged = setup.judged
    kind = "ratings" if judged.are_ratings else f"comparisons of at most {judged.tokens.shape[1]} texts"
    reporter.print(
        f"model: {count_parameters(setup.state.params):,} parameters; {len(judged.tokens):,} {kind} ({judged.num_long} "
        f"too long and {judged.num_tied} tied left out), {len(setup.heldout.tokens):,} held out"
        + (f"; going on after step {start}" if start else "")
    )


def finish(setup: Setup, state: TrainState, workdir: Path, samples: Any) -> dict[str, Any]:
    """Measures the model on what was held out, normalises it, and writes it as a folder."""
    params, special, heldout = state.params, setup.special, setup.heldout
    raw = scores = score_judged(setup, params, heldout)
    # What is normalised and measured is what is saved.
    decoder = jax.tree.map(lambda x: x.astype(setup.save_dtype).astype(x.dtype), params["decoder"])
    params = params | {"decoder": decoder}
    normalization = None
    if samples is not None:
        params, after = normalize(setup, params, samples)
        normalization = {"before": json.loads((workdir / "normalization.json").read_text()), "after": after}
        scores = score_judged(setup, params, heldout)
    results: dict[str, Any] = {"steps": int(state.step)} | heldout_metrics(heldout, raw)
    results |= statistics(heldout, raw, scores) | {"normalization": normalization}
    hub.save_reward_model(
        workdir / "model",
        jax.device_get(params),
        setup.model.config,
        setup.tokenizer,
        eos_ids=special.eos_ids,
        pad_id=special.pad_id,
        dtype=setup.save_dtype,
    )
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", REWARD_PANELS, title=workdir.name)
    if results["reliability"]:
        plot_reliability(results["reliability"], results["ece"], workdir / "reliability.png")
    write_json(workdir / "results.json", results)
    return results


def statistics(heldout: JudgedSet, raw: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """What the report says of a reward model.

    Args:
        heldout: judgements that it has not seen.
        raw: `[num, C]` scores as they were trained: a difference is the log odds of winning.
        scores: `[num, C]` scores of the saved model.

    Returns:
        `accuracy` with its 95 % interval, `ece`, `reliability`, `accuracy_by_margin` (None or empty for ratings), and
        `length_correlation`.
    """
    present = heldout.mask.any(axis=2)
    correlation = length_correlation(scores[present], heldout.response_lengths[present])
    results: dict[str, Any] = {"length_correlation": correlation}
    differences = heldout.pair_differences(scores)
    if not differences.size:  # ratings
        nothing = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "ece"))
        return results | nothing | {"reliability": [], "accuracy_by_margin": []}
    won = np.ones(differences.size, bool)
    accuracy = pair_accuracy(differences, won)
    probabilities = 1 / (1 + np.exp(-heldout.pair_differences(raw)))
    return results | {
        "accuracy": accuracy.accuracy,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "ece": expected_calibration_error(probabilities, won),
        "reliability": reliability(probabilities, won),
        "accuracy_by_margin": accuracy_by_margin(differences, won),
    }


def dry_run(settings: RewardExperiment) -> None:
    """Compiles the training step and prints what it costs on each device."""
    setup = prepare(settings)
    batch = jax.device_put(setup.judged.batch(np.zeros(settings.batch_size, int)), setup.shardings.batch)
    print_costs({"learn": program_cost(setup.step.learn.lower(setup.state, batch).compile())})


def main(settings: RewardExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    results = train(prepare(settings), workdir)
    print(verdict(results) + f"; model: {workdir / 'model'}")


def verdict(results: dict[str, Any]) -> str:
    """The result in one line."""
    if results["accuracy"] is None:
        return f"held-out rmse: {results['heldout/rmse']:.3f}"
    interval = f"{results['accuracy_low']:.3f} to {results['accuracy_high']:.3f}"
    return f"held-out accuracy: {results['accuracy']:.3f} (95 %: {interval}), calibration error {results['ece']:.3f}"


if __name__ == "__main__":
    cli.launch(RewardExperiment, main, dry_run)
