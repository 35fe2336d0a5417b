"""Supervised training of a causal language model: from nothing (pretraining), or from a pretrained model.

    python experiments/train_sft.py --config=experiments/configs/sft_reviews.py --workdir=runs/sft_reviews

The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, and at the end model/ (a Hugging Face
folder), curves.png and results.json. The same command again goes on where the run stopped.
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
from experiments.results import SFT_COLUMNS, SFT_PANELS, print_costs
from experiments.settings import SFTExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.data import ExampleSet, batch_indices, load_examples
from ppo_jax.errors import InputError, check
from ppo_jax.metrics import Reporter, check_trackers, make_writers
from ppo_jax.models import Decoder
from ppo_jax.optim import make_optimizer, make_schedule
from ppo_jax.planning import count_parameters, program_cost
from ppo_jax.plots import plot_curves
from ppo_jax.runs import resume, write_json
from ppo_jax.sft import SFTStep, init_sft_state, make_sft_step
from ppo_jax.sharding import Shardings, make_mesh, make_shardings
from ppo_jax.tokenizers import SpecialTokens, check_vocabulary, load_tokenizer, special_tokens
from ppo_jax.types import Examples, Params, TrainState

MAY_CHANGE = ("log_every", "eval_every", "checkpoint_every", "checkpoints_to_keep", "trackers")
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
    check("config.length", settings.length, settings.length <= model_config.max_positions,
          f"at most the model's {model_config.max_positions} positions")  # fmt: skip
    examples = load_examples(settings.data, tokenizer, special, settings.length, settings.data_split)
    if settings.heldout:
        heldout = load_examples(settings.heldout, tokenizer, special, settings.length, settings.heldout_split)
    else:
        examples, heldout = split_off(examples, settings.heldout_frac)
    check_vocabulary(special, examples.tokens, model_config.vocab_size)
    check_vocabulary(special, heldout.tokens, model_config.vocab_size)
    check_trackers(tracker_names(settings.trackers))
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    check(
        "config.batch_size",
        settings.batch_size,
        settings.batch_size % shares == 0,
        f"a multiple of mesh data x fsdp ({shares})",
    )

    model = Decoder(model_config)
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    params = jax.tree.map(jnp.asarray, hub.load_params(folder, model_config)) if folder else new_params(model, init_key)
    schedule = make_schedule(settings.lr, settings.lr_schedule, settings.warmup_steps, settings.num_steps)
    tx = make_optimizer(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    state = init_sft_state(params, tx, key)
    shardings = make_shardings(mesh, state)
    step = make_sft_step(model, tx, shardings)
    state = jax.device_put(state, shardings.state)
    return Setup(settings, tokenizer, special, examples, heldout, model, shardings, state, step, schedule)


def new_params(model: Decoder, key: jax.Array) -> Params:
    """Freshly initialised parameters."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.jit(model.init)(key, tokens, jnp.ones((1, 2), bool))["params"]


def split_off(examples: ExampleSet, share: float) -> tuple[ExampleSet, ExampleSet]:
    """The first rows to train on, the last `share` of them (at least one) held out.

    Raises:
        InputError: fewer than two rows.
    """
    total = len(examples.tokens)
    check("config.data", total, total >= 2, "at least two rows, one of them held out")
    cut = min(total - 1, math.floor(total * (1 - share)))

    def rows(where: slice) -> ExampleSet:
        return ExampleSet(examples.tokens[where], examples.mask[where], examples.target_mask[where], examples.num_cut)

    return rows(slice(0, cut)), rows(slice(cut, None))


def batch_of(setup: Setup, examples: ExampleSet, rows: np.ndarray) -> Examples:
    """These rows, on their devices."""
    fields = Examples(examples.tokens[rows], examples.mask[rows], examples.target_mask[rows])
    return jax.device_put(fields, setup.shardings.batch)


def heldout_loss(setup: Setup, params: Params) -> float:
    """Mean negative log-likelihood of the held-out targets, nats a token."""
    size, total = setup.settings.batch_size, len(setup.heldout.tokens)
    loss, count = 0.0, 0
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        batch = batch_of(setup, setup.heldout, rows % total)
        # The last batch is filled up with rows that do not count.
        batch = batch.replace(target_mask=batch.target_mask & (rows < total)[:, None])
        batch_loss, batch_count = setup.step.measure(params, batch)
        loss, count = loss + float(batch_loss), count + int(batch_count)
    return loss / count


def train(setup: Setup, workdir: Path) -> dict[str, float]:
    """Trains to the last step, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, or the loss is no longer finite.
    """
    settings = setup.settings
    may_change = (*MAY_CHANGE, "num_steps") if settings.lr_schedule == "constant" else MAY_CHANGE
    checkpoints, state = resume(
        workdir,
        dataclasses.asdict(settings),
        may_change,
        setup.state,
        settings.num_steps,
        settings.checkpoints_to_keep,
    )
    start = int(state.step)
    results = workdir / "results.json"
    if start == settings.num_steps and results.exists() and json.loads(results.read_text())["steps"] == start:
        return json.loads(results.read_text())
    trackers = tracker_names(settings.trackers)
    writers = make_writers(workdir, trackers, dataclasses.asdict(settings), workdir.name, start_step=start)
    with writers, Reporter(settings.num_steps, start, SFT_COLUMNS, label="step") as reporter:
        announce(setup, reporter, start)
        began, tokens = time.perf_counter(), 0
        for number in range(start, settings.num_steps):
            rows = batch_indices(len(setup.examples.tokens), settings.batch_size, number, settings.seed)
            state, metrics = setup.step.learn(state, batch_of(setup, setup.examples, rows))
            tokens += int(setup.examples.mask[rows].sum())
            done = number + 1
            last = done == settings.num_steps
            row = {}
            saves = last or done % settings.checkpoint_every == 0
            if saves or done % settings.log_every == 0:
                row = {name: float(x) for name, x in metrics.items()}  # waits
                seconds = time.perf_counter() - began
                row |= {"optim/lr": float(setup.schedule(number)), "time/tokens_per_s": tokens / seconds}
                if not math.isfinite(row["sft/loss"]):
                    raise InputError(
                        f"step {number}: sft/loss: got {row['sft/loss']}, expected a finite number: lower config.lr"
                    )
                began, tokens = time.perf_counter(), 0
            if last or done % settings.eval_every == 0:
                loss = heldout_loss(setup, state.params)
                row |= {"heldout/loss": loss, "heldout/perplexity": math.exp(loss)}
            if row:
                writers.write(number, row)
                reporter.update(number, row)
            if saves:
                checkpoints.save(state)
    checkpoints.close()
    return finish(setup, state, workdir)


def announce(setup: Setup, reporter: Reporter, start: int) -> None:
    """Says what is about to run, and what happened to the texts."""
    examples = setup.examples
    reporter.print(
        f"model: {count_parameters(setup.state.params):,} parameters; {len(examples.tokens):,} texts of at most "
        f"{setup.settings.length} tokens ({examples.num_cut} cut), {len(setup.heldout.tokens):,} held out"
        + (f"; going on after step {start}" if start else "")
    )


def finish(setup: Setup, state: TrainState, workdir: Path) -> dict[str, float]:
    """Exports the model, draws the curves, and measures the held-out perplexity."""
    params, special = jax.device_get(state.params), setup.special
    hub.save(
        workdir / "model", params, setup.model.config, setup.tokenizer, eos_ids=special.eos_ids, pad_id=special.pad_id
    )
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", SFT_PANELS, title=workdir.name)
    loss = heldout_loss(setup, state.params)
    results = {"steps": int(state.step), "heldout/loss": loss, "heldout/perplexity": math.exp(loss)}
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
