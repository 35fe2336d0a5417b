"""Supervised training of a causal language model: from nothing (pretraining), or from a pretrained model.

    python experiments/train_sft.py --config=experiments/configs/sft_reviews.py --workdir=runs/sft_reviews

The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, and at the end model/ (a Hugging Face
folder), curves.png and results.json. The same command again goes on where the run stopped. With `config.patience`
training stops when the held-out loss no longer falls, and model/ is the one with the lowest; best/ holds its state.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments import cli
from experiments.ending import asked_to_end, end_early
from experiments.results import SFT_COLUMNS, SFT_PANELS, print_costs
from experiments.settings import SFTExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.data import batch_indices
from ppo_jax.errors import check
from ppo_jax.examples import ExampleSet, Texts, load_examples, make_rows
from ppo_jax.metrics import Reporter, check_trackers, make_writers, read_jsonl
from ppo_jax.models import Decoder
from ppo_jax.optim import fresh_state, make_optimizer, make_schedule
from ppo_jax.planning import count_parameters, program_cost
from ppo_jax.plots import plot_curves
from ppo_jax.runs import refuse_non_finite, resume, write_json
from ppo_jax.sft import SFTStep, make_sft_step
from ppo_jax.sharding import Shardings, make_mesh, make_place, make_shardings
from ppo_jax.tokenizers import SpecialTokens, check_vocabulary, load_tokenizer, special_tokens
from ppo_jax.types import Examples, Params, TrainState

MAY_CHANGE = ("log_every", "eval_every", "checkpoint_every", "checkpoints_to_keep", "trackers", "max_hours")
"""Fields that a restart may change: they do not touch the training. So may `num_steps` under a constant rate."""


class Setup(NamedTuple):
    """Everything that training needs; made before anything is written."""

    settings: SFTExperiment
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    examples: ExampleSet
    heldout: ExampleSet
    model: Decoder
    shardings: Shardings
    state: TrainState  # before the first step
    step: SFTStep
    schedule: Any  # gradient step -> learning rate
    save_dtype: str  # of the exported weights


def prepare(settings: SFTExperiment) -> Setup:
    """Loads and checks all inputs, and builds (without compiling) the programs.

    Raises:
        InputError: any of the inputs cannot be used.
    """
    folder = hub.resolve(settings.model) if settings.model else None
    tokenizer = load_tokenizer(hub.resolve(settings.tokenizer or settings.model))
    eos_ids = hub.load_eos_ids(folder) if folder else ()
    special = special_tokens(tokenizer, eos_ids, settings.pad_token, settings.eos_token)
    if folder:
        model_config = hub.load_config(folder, dtype=settings.dtype)
    else:
        model_config = settings.architecture.model_config(len(tokenizer), settings.dtype)
    model_config = dataclasses.replace(model_config, remat=settings.remat)
    check("config.length", settings.length, settings.length <= model_config.max_positions,
          f"at most the model's {model_config.max_positions} positions")  # fmt: skip
    texts = load_examples(settings.data, tokenizer, special, settings.length, settings.data_split)
    if settings.heldout:
        heldout_texts = load_examples(settings.heldout, tokenizer, special, settings.length, settings.heldout_split)
    else:
        texts, heldout_texts = split_off(texts, settings.heldout_frac)
    examples = make_rows(texts, settings.length, special.pad_id, settings.pack)
    heldout = make_rows(heldout_texts, settings.length, special.pad_id, settings.pack)
    check_vocabulary(special, examples.tokens, model_config.vocab_size)
    check_vocabulary(special, heldout.tokens, model_config.vocab_size)
    check_trackers(tracker_names(settings.trackers))
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    check(
        "config.batch_size",
        settings.batch_size,
        settings.batch_size % (shares * settings.accumulation) == 0,
        f"a multiple of mesh data x fsdp ({shares}) x accumulation ({settings.accumulation})",
    )

    model = Decoder(model_config)
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    save_dtype = settings.save_dtype
    if folder:
        params = hub.load_params(folder, model_config, make_place(mesh))
        save_dtype = hub.load_dtype(folder) if save_dtype == "model" else save_dtype
    else:
        params = new_params(model, init_key)
        save_dtype = "float32" if save_dtype == "model" else save_dtype
    schedule = make_schedule(settings.lr, settings.lr_schedule, settings.warmup_steps, settings.num_steps)
    tx = make_optimizer(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    state = fresh_state(params, tx, key)
    shardings = make_shardings(mesh, state)
    step = make_sft_step(model, tx, shardings, settings.accumulation)
    state = jax.device_put(state, shardings.state)
    return Setup(settings, tokenizer, special, examples, heldout, model, shardings, state, step, schedule, save_dtype)


def new_params(model: Decoder, key: jax.Array) -> Params:
    """Freshly initialised parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(model.init)(key, tokens, jnp.ones((1, 2), bool))["params"]


def split_off(texts: Texts, share: float) -> tuple[Texts, Texts]:
    """The first texts to train on, the last `share` of them (at least one) held out.

    Raises:
        InputError: fewer than two texts.
    """
    check("config.data", len(texts), len(texts) >= 2, "at least two texts to learn from, one of them held out")
    cut = min(len(texts) - 1, math.floor(len(texts) * (1 - share)))
    return texts[:cut], texts[cut:]


def batch_of(setup: Setup, examples: ExampleSet, rows: np.ndarray) -> Examples:
    """These rows, on their devices."""
    fields = Examples(examples.tokens[rows], examples.segments[rows], examples.target_mask[rows])
    return jax.device_put(fields, setup.shardings.batch)


def heldout_loss(setup: Setup, params: Params) -> float:
    """Mean negative log-likelihood of the held-out targets, nats a token.

    Raises:
        InputError: it is not finite.
    """
    size, total = setup.settings.batch_size, len(setup.heldout.tokens)
    loss, count = 0.0, 0
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        batch = batch_of(setup, setup.heldout, rows % total)
        # The last batch is filled up with rows that do not count.
        batch = batch.replace(target_mask=batch.target_mask & (rows < total)[:, None])
        batch_loss, batch_count = setup.step.measure(params, batch)
        loss, count = loss + float(batch_loss), count + int(batch_count)
    check("held-out loss", loss / count, math.isfinite(loss), "a finite number: lower config.lr")
    return loss / count


def heldout_metrics(loss: float) -> dict[str, float]:
    """The held-out loss, and its perplexity (at most e^700: a float ends soon after)."""
    return {"heldout/loss": loss, "heldout/perplexity": math.exp(min(loss, 700.0))}


def logged_losses(workdir: Path) -> dict[int, float]:
    """The held-out losses that are logged, by the number of steps before each."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return {row["iteration"] + 1: row["heldout/loss"] for row in rows if "heldout/loss" in row}


def lowest(losses: dict[int, float]) -> int | None:
    """The step with the lowest loss, the first of equals; None when there is none."""
    return min(losses, key=losses.__getitem__, default=None)


def is_over(losses: dict[int, float], patience: int) -> bool:
    """Whether the last `patience` held-out losses were no improvement; never, when it is 0."""
    best = lowest(losses)
    return patience > 0 and best is not None and sum(step > best for step in losses) >= patience


def train(setup: Setup, workdir: Path) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, or the loss is no longer finite.
        StoppedEarly: a signal or `max_hours` asked for it; the last step is saved.
    """
    settings, total = setup.settings, setup.settings.num_steps
    may_change = (*MAY_CHANGE, "num_steps") if settings.lr_schedule == "constant" else MAY_CHANGE
    config = dataclasses.asdict(settings)
    keep = settings.checkpoints_to_keep
    checkpoints, state = resume(workdir, config, may_change, setup.state, total, keep, "config.num_steps")
    done = int(state.step)
    if (saved := finished(workdir, done, total)) is not None:
        return saved
    writers = make_writers(workdir, tracker_names(settings.trackers), config, workdir.name, start_step=done)
    columns, hours = SFT_COLUMNS, settings.max_hours
    with checkpoints, writers, Reporter(total, done, columns, label="step") as reporter, asked_to_end(hours) as asked:
        announce(setup, reporter, done)
        losses = logged_losses(workdir)
        keep_best(settings, workdir, state, losses)  # a kill may have come between the two checkpoints of a step
        began, tokens = time.perf_counter(), 0
        while done < total and not is_over(losses, settings.patience):
            rows = batch_indices(len(setup.examples.tokens), settings.batch_size, done, settings.seed)
            state, metrics = setup.step.learn(state, batch_of(setup, setup.examples, rows))
            tokens += int(np.sum(setup.examples.segments[rows] > 0))
            done += 1
            logs, evaluates, saves = (
                done == total or done % every == 0
                for every in (settings.log_every, settings.eval_every, settings.checkpoint_every)
            )
            who = asked()
            if not (logs or evaluates or saves or who):
                continue
            row = {name: float(x) for name, x in metrics.items()}  # waits
            row |= {
                "optim/lr": float(setup.schedule(done - 1)),
                "time/tokens_per_s": tokens / (time.perf_counter() - began),
            }
            refuse_non_finite(row, f"step {done - 1}", "lower config.lr")
            if evaluates:
                losses[done] = heldout_loss(setup, state.params)
                row |= heldout_metrics(losses[done])
            if logs or evaluates or saves:
                writers.write(done - 1, row)
                reporter.update(done - 1, row)
            if saves or (settings.patience and evaluates):
                checkpoints.save(state)
                if settings.patience:
                    checkpoints.wait()
                keep_best(settings, workdir, state, losses)
            if who:
                end_early(checkpoints, state, who, f"{done} of {total} steps")
            began, tokens = time.perf_counter(), 0
        if done < total:
            reporter.print(f"stopped: the held-out loss was lowest after step {lowest(losses)} of {done}")
    return finish(setup, state, workdir)


def finished(workdir: Path, done: int, total: int) -> dict[str, Any] | None:
    """The results of a run that has nothing left to do; None for any other."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"steps": None}
    return results if results["steps"] == done and (done == total or results["stopped"]) else None


def keep_best(settings: SFTExperiment, workdir: Path, state: TrainState, losses: dict[int, float]) -> None:
    """Saves a state in best/ that has the lowest held-out loss so far, when training is to stop at the lowest.

    Only after its checkpoint: a restart from there finds in best/ what the losses up to there call the best.
    """
    if settings.patience and lowest(losses) == int(state.step):
        with Checkpointer(workdir / "best", max_to_keep=1) as best:
            best.save(state)


def load_best(workdir: Path, like: TrainState, step: int | None) -> TrainState:
    """The state in best/.

    Raises:
        InputError: it is another one, or none.
    """
    with Checkpointer(workdir / "best", max_to_keep=1) as best:
        state = best.restore(like)
    check(f"{workdir / 'best'}: step", int(state.step), int(state.step) == step, f"{step}, by metrics.jsonl")
    return state


def announce(setup: Setup, reporter: Reporter, start: int) -> None:
    """Says what is about to run, and what happened to the texts."""
    examples, length = setup.examples, setup.settings.length
    rows = f"in {len(examples.tokens):,} rows of {length} tokens, {examples.filled:.0%} filled"
    reporter.print(
        f"model: {count_parameters(setup.state.params):,} parameters; {examples.num_texts:,} texts {rows} "
        f"({examples.num_cut:,} cut, {examples.num_dropped:,} left out); {setup.heldout.num_texts:,} held out"
        + (f"; going on after step {start}" if start else "")
    )


def finish(setup: Setup, state: TrainState, workdir: Path) -> dict[str, Any]:
    """Exports the model, draws the curves, and measures the held-out perplexity.

    Returns:
        What stands in results.json: `steps` done, `best_step` with the lowest held-out loss, whether training `stopped`
        there, and the held-out loss and perplexity of the exported model: the best one with `patience`, else the last.
    """
    steps, best_step = int(state.step), lowest(logged_losses(workdir))
    if setup.settings.patience:
        state = load_best(workdir, state, best_step)
    params, special = jax.device_get(state.params), setup.special
    hub.save(
        workdir / "model",
        params,
        setup.model.config,
        setup.tokenizer,
        eos_ids=special.eos_ids,
        pad_id=special.pad_id,
        dtype=setup.save_dtype,
    )
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", SFT_PANELS, title=workdir.name)
    results = {"steps": steps, "best_step": best_step, "stopped": steps < setup.settings.num_steps}
    results |= heldout_metrics(heldout_loss(setup, state.params))
    write_json(workdir / "results.json", results)
    return results


def dry_run(settings: SFTExperiment) -> None:
    """Compiles the training step and prints what it costs on each device."""
    setup = prepare(settings)
    batch = batch_of(setup, setup.examples, np.zeros(setup.settings.batch_size, int))
    print_costs({"learn": program_cost(setup.step.learn.lower(setup.state, batch).compile())})


def main(settings: SFTExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    results = train(prepare(settings), workdir)
    print(f"held-out perplexity: {results['heldout/perplexity']:.3f}; model: {workdir / 'model'}")


if __name__ == "__main__":
    cli.launch(SFTExperiment, main, dry_run)
