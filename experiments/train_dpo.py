"""Direct preference learning (DPO, IPO, KTO) of a causal language model, from the data of `train_reward.py`.

    python experiments/train_dpo.py --config=experiments/configs/dpo.py --workdir=runs/dpo \
        --config.model=FOLDER --config.data=PAIRS.jsonl

The workdir gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, and at the end policy/ (a Hugging Face
folder), curves.png and results.json. The same command again goes on where the run stopped.
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
from experiments.results import print_costs
from experiments.settings import DPOExperiment, tracker_names
from ppo_jax import hub
from ppo_jax.comparisons import JudgedSet, encode_judged, split_by_prompt
from ppo_jax.data import batch_indices
from ppo_jax.dpo import DPOStep, PreferenceSet, labelled, make_dpo_step, pairs_of, preference_loss, reference_point
from ppo_jax.errors import check
from ppo_jax.evaluation import pair_accuracy
from ppo_jax.metrics import Reporter, check_trackers, make_writers
from ppo_jax.models import Decoder
from ppo_jax.optim import fresh_state, make_optimizer, make_schedule
from ppo_jax.planning import count_parameters, program_cost
from ppo_jax.plots import Panel, plot_curves
from ppo_jax.preferences import read_judged
from ppo_jax.runs import refuse_non_finite, resume, write_json
from ppo_jax.sharding import Shardings, make_mesh, make_place, make_shardings
from ppo_jax.tokenizers import SpecialTokens, check_vocabulary, load_tokenizer, render_chat, special_tokens
from ppo_jax.types import Examples, Params, TrainState

MAY_CHANGE = ("log_every", "eval_every", "checkpoint_every", "checkpoints_to_keep", "trackers", "max_hours")
"""Fields that a restart may change: they do not touch the training."""

COLUMNS = (
    ("loss", "preference/loss", ".4f"),
    ("accuracy", "preference/accuracy", ".3f"),
    ("margin", "preference/margin", ".3f"),
    ("held-out accuracy", "heldout/accuracy", ".3f"),
    ("held-out margin", "heldout/margin", ".3f"),
)
PANELS = (
    Panel("loss", (("preference/loss", "training"), ("heldout/loss", "held out")), "of a pair, or of a response"),
    Panel("accuracy", (("preference/accuracy", "training"), ("heldout/accuracy", "held out")), "share told right"),
    Panel("margin", (("preference/margin", "training"), ("heldout/margin", "held out")), "implicit reward"),
    Panel(
        "implicit rewards",
        (("preference/chosen_reward", "chosen"), ("preference/rejected_reward", "rejected")),
        "beta x log ratio to the reference",
    ),
    Panel("gradient norm", (("optim/grad_norm", "norm"),), "norm"),
    Panel("learning rate", (("optim/lr", "rate"),), "per step"),
)


class Setup(NamedTuple):
    """Everything that training needs; made before anything is written."""

    settings: DPOExperiment
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    judged: JudgedSet
    data: PreferenceSet  # of `judged`
    heldout: PreferenceSet
    model: Decoder
    shardings: Shardings
    state: TrainState  # before the first step
    ref_params: Params
    step: DPOStep
    schedule: Any  # gradient step -> learning rate
    num_steps: int
    save_dtype: str  # of the exported weights


def prepare(settings: DPOExperiment) -> Setup:
    """Loads and checks all inputs, and builds (without compiling) the programs.

    Raises:
        InputError: any of the inputs cannot be used.
    """
    folder = hub.resolve(settings.model)
    config = dataclasses.replace(hub.load_config(folder, dtype=settings.dtype), remat=settings.remat)
    tokenizer = load_tokenizer(folder)
    special = special_tokens(tokenizer, hub.load_eos_ids(folder), settings.pad_token, settings.eos_token)
    check("config.length", settings.length, settings.length <= config.max_positions,
          f"at most the model's {config.max_positions} positions")  # fmt: skip
    judged, heldout_judged = load_judged(settings, tokenizer, special)
    data, heldout = (preferences(settings, part) for part in (judged, heldout_judged))
    for part in (data, heldout):
        check_vocabulary(special, part.texts.tokens, config.vocab_size)
    check_trackers(tracker_names(settings.trackers))
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    shares, parts, size = mesh.shape["data"] * mesh.shape["fsdp"], settings.accumulation, settings.batch_size
    check("config.batch_size", size, size % (shares * parts) == 0,
          f"a multiple of mesh data x fsdp ({shares}) x accumulation ({parts})")  # fmt: skip
    what = "pairs" if data.desirable is None else "responses"
    check("config.batch_size", size, size <= len(data), f"at most the {len(data)} {what} to train on")

    num_steps = settings.num_epochs * len(data) // size
    schedule = make_schedule(settings.lr, settings.lr_schedule, settings.warmup_steps, num_steps)
    tx = make_optimizer(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    model = Decoder(config)
    params = hub.load_params(folder, config, make_place(mesh))
    save_dtype = hub.load_dtype(folder) if settings.save_dtype == "model" else settings.save_dtype
    state = fresh_state(params, tx, jax.random.key(settings.seed))
    shardings = make_shardings(mesh, state)
    # The reference is a copy of its own: the state's buffers are donated, step after step.
    ref_params = jax.device_put(jax.tree.map(jnp.copy, params), shardings.ref_params)
    state = jax.device_put(state, shardings.state)
    step = make_dpo_step(model, tx, shardings, settings, settings.accumulation)
    return Setup(settings, tokenizer, special, judged, data, heldout, model, shardings, state, ref_params, step,
                 schedule, num_steps, save_dtype)  # fmt: skip


def load_judged(
    settings: DPOExperiment, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> tuple[JudgedSet, JudgedSet]:
    """The judgements to train on, and those held out."""

    def load(source: str, split: str) -> JudgedSet:
        rows = read_judged(source, split, render=lambda messages: render_chat(tokenizer, messages))
        return encode_judged(rows, tokenizer, special, settings.length)

    judged = load(settings.data, settings.data_split)
    if not settings.heldout:
        return split_by_prompt(judged, settings.heldout_frac)
    heldout = load(settings.heldout, settings.heldout_split)
    same = heldout.are_ratings == judged.are_ratings
    check("config.heldout", settings.heldout, same, "judgements of the same kind as config.data")
    return judged, heldout


def preferences(settings: DPOExperiment, judged: JudgedSet) -> PreferenceSet:
    """The pairs of some judgements; for KTO, their responses.

    Raises:
        InputError: scores for a loss that needs pairs, a threshold without scores, or nothing desirable or undesirable.
    """
    if settings.loss != "kto":
        check("config.loss", settings.loss, not judged.are_ratings, "kto, with scores, which are no pairs")
        return pairs_of(judged)
    threshold = settings.threshold
    check("config.threshold", threshold, judged.are_ratings or not threshold, "0, with comparisons")
    data = labelled(judged, threshold)
    share = np.mean(data.desirable)
    check("config.threshold", threshold, 0 < share < 1,
          f"one that parts the scores, {judged.scores.min():g} to {judged.scores.max():g}")  # fmt: skip
    return data


class Heldout(NamedTuple):
    """Log-probabilities of what was held out."""

    texts: np.ndarray  # [num, C]
    mismatched: np.ndarray | None  # [num]: for KTO's reference point; None: pairs


def read_heldout(setup: Setup, params: Params) -> Heldout:
    """What the policy, or the reference, thinks of the held-out completions."""
    batch = setup.heldout.batch(np.arange(len(setup.heldout)))
    others = None if batch.mismatched is None else read_texts(setup, params, batch.mismatched)
    return Heldout(read_texts(setup, params, batch.texts), others)


def read_texts(setup: Setup, params: Params, texts: Examples) -> np.ndarray:
    """Log-probabilities of completions `[num, ...]`, a batch at a time."""
    size, total = setup.settings.batch_size, len(texts.tokens)
    parts = []
    for start in range(0, total, size):
        rows = np.resize(np.arange(start, min(start + size, total)), size)  # the last batch is filled up
        batch = jax.device_put(jax.tree.map(lambda x, rows=rows: x[rows], texts), setup.shardings.batch)
        parts.append(np.asarray(setup.step.logprobs(params, batch)))
    return np.concatenate(parts)[:total]


def heldout_metrics(setup: Setup, policy: Heldout, reference: Heldout) -> dict[str, float]:
    """Loss and its metrics of the held-out completions, as one batch."""
    labels, ours, theirs = jax.tree.map(jnp.asarray, (setup.heldout.desirable, policy, reference))
    kl = None if labels is None else reference_point(ours.mismatched, theirs.mismatched)
    loss, metrics = preference_loss(ours.texts, theirs.texts, labels, kl, setup.settings)
    return {f"heldout/{name}": float(x) for name, x in (metrics | {"loss": loss}).items()}


def train(setup: Setup, workdir: Path) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, or the loss is no longer finite.
        StoppedEarly: a signal or `max_hours` asked for it; the last step is saved.
    """
    settings, total = setup.settings, setup.num_steps
    config = dataclasses.asdict(settings)
    checkpoints, state = resume(workdir, config, MAY_CHANGE, setup.state, total, settings.checkpoints_to_keep)
    start = int(state.step)
    if start == total and (workdir / "results.json").exists():
        return json.loads((workdir / "results.json").read_text())
    reference = read_heldout(setup, setup.ref_params)
    writers = make_writers(workdir, tracker_names(settings.trackers), config, workdir.name, start_step=start)
    columns, hours = COLUMNS, settings.max_hours
    with checkpoints, writers, Reporter(total, start, columns, label="step") as reporter, asked_to_end(hours) as asked:
        announce(setup, reporter, start)
        began = time.perf_counter(), start
        for number in range(start, total):
            rows = batch_indices(len(setup.data), settings.batch_size, number, settings.seed)
            batch = jax.device_put(setup.data.batch(rows), setup.shardings.batch)
            state, metrics = setup.step.learn(state, setup.ref_params, batch)
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
                row |= heldout_metrics(setup, read_heldout(setup, state.params), reference)
            if row:
                writers.write(number, row)
                reporter.update(number, row)
            if saves:
                checkpoints.save(state)
            if who := asked():
                refuse_non_finite({name: float(x) for name, x in metrics.items()}, f"step {number}", "lower config.lr")
                end_early(checkpoints, state, who, f"{done} of {total} steps")
    return finish(setup, state, reference, workdir)


def announce(setup: Setup, reporter: Reporter, start: int) -> None:
    """Says what is about to run, and what happened to the judgements."""
    judged, data = setup.judged, setup.data
    told = f"{len(data):,} pairs"
    if data.desirable is not None:
        told = f"{int(data.desirable.sum()):,} desirable and {int((~data.desirable).sum()):,} undesirable responses"
        between = int(judged.mask.any(axis=2).sum()) - len(data)
        told += f" ({between:,} between the best and the last left out)" if between else ""
    reporter.print(
        f"model: {count_parameters(setup.state.params):,} parameters; {told} of {len(judged.tokens):,} judgements "
        f"({judged.num_long:,} too long and {judged.num_tied:,} tied left out), {len(setup.heldout):,} held out"
        + (f"; going on after step {start}" if start else "")
    )


def finish(setup: Setup, state: TrainState, reference: Heldout, workdir: Path) -> dict[str, Any]:
    """Exports the policy, draws the curves, and measures what was held out.

    Returns:
        What stands in results.json: `steps`, the metrics `heldout/*`, and `accuracy_low` and `accuracy_high`, the 95 %
        interval of the accuracy (see `dpo_loss` and `kto_loss`).
    """
    policy, special, desirable = read_heldout(setup, state.params), setup.special, setup.heldout.desirable
    results: dict[str, Any] = {"steps": int(state.step)} | heldout_metrics(setup, policy, reference)
    ratios = policy.texts - reference.texts
    if desirable is None:
        told = pair_accuracy(ratios[:, 0] - ratios[:, 1], np.ones(len(ratios), bool))
    else:
        told = pair_accuracy(ratios[:, 0] - results["heldout/reference_kl"], desirable)
    results |= {"accuracy_low": told.low, "accuracy_high": told.high}
    hub.save(
        workdir / "policy",
        jax.device_get(state.params),
        setup.model.config,
        setup.tokenizer,
        eos_ids=special.eos_ids,
        pad_id=special.pad_id,
        dtype=setup.save_dtype,
    )
    plot_curves(workdir / "metrics.jsonl", workdir / "curves.png", PANELS, title=workdir.name)
    write_json(workdir / "results.json", results)
    return results


def dry_run(settings: DPOExperiment) -> None:
    """Compiles the training step and prints what it costs on each device."""
    setup = prepare(settings)
    batch = jax.device_put(setup.data.batch(np.zeros(settings.batch_size, int)), setup.shardings.batch)
    print_costs({"learn": program_cost(setup.step.learn.lower(setup.state, setup.ref_params, batch).compile())})


def main(settings: DPOExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    results = train(prepare(settings), workdir)
    print(verdict(results) + f"; policy: {workdir / 'policy'}")


def verdict(results: dict[str, Any]) -> str:
    """The result in one line."""
    interval = f"{results['accuracy_low']:.3f} to {results['accuracy_high']:.3f}"
    accuracy, margin = results["heldout/accuracy"], results["heldout/margin"]
    return f"held-out accuracy: {accuracy:.3f} (95 %: {interval}), margin {margin:.3f}"


if __name__ == "__main__":
    cli.launch(DPOExperiment, main, dry_run)
