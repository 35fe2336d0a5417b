"""PPO fine-tuning of a causal language model.

    python experiments/train_ppo.py --config=experiments/configs/ppo_sentiment.py --workdir=runs/sentiment

The workdir gets config.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoints/, and at the end policy/ (a
Hugging Face folder), curves.png, results.json, responses.jsonl (the evaluation prompts, answered before and after) and
results.md. The same command again goes on where the run stopped.
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
from jax.stages import Compiled

from experiments import cli
from experiments.ending import asked_to_end, end_early
from experiments.ppo_results import finish
from experiments.ppo_setup import Setup, prepare
from experiments.results import print_costs, results_page
from experiments.rollouts import batch_of, judge, judge_on_host, texts_of
from experiments.settings import PPOExperiment, tracker_names
from experiments.watchdog import Watchdog
from ppo_jax.checkpoint import Checkpointer
from ppo_jax.data import batch_indices
from ppo_jax.errors import check
from ppo_jax.experience import truncation_scores
from ppo_jax.fingerprints import fingerprints
from ppo_jax.guard import quantities
from ppo_jax.metrics import JsonlWriter, Reporter, atomic_write, make_writers, truncate_jsonl
from ppo_jax.planning import count_parameters, program_cost, release_free_memory
from ppo_jax.ppo import due
from ppo_jax.recorded import Recorder
from ppo_jax.runs import RunError, resume, save_broken
from ppo_jax.shaping import Moments, add_batch
from ppo_jax.types import Examples, Experience, Scores, TrainState

MAY_CHANGE = tuple(
    "gold checkpoint_every checkpoints_to_keep samples_every num_samples eval_prompts trackers max_hours".split()
)
"""Fields that a restart may change: they do not touch the training. So may `num_iterations` under a constant rate."""


class Turn(NamedTuple):
    """One iteration, as it is shown and saved."""

    rows: np.ndarray  # [B] of the prompts that were learned from
    metrics: dict[str, float]  # with `optim/lr` and `time/*`
    experience: Experience
    scores: Scores


class Stopwatch:
    """Where the time of an iteration goes: in `time/generate_s`, `score_s` and `learn_s`, or all three in `program_s`;
    in `gold_s`; and in `host_s`, from the metrics of the last iteration to the start of the program: writing, showing
    and saving what it left, and gathering the next prompts. Their sum is `iteration_s`: between two iterations no time
    is lost.
    """

    def __init__(self) -> None:
        """Starts it."""
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last lap, in seconds, goes by this name."""
        now = time.perf_counter()
        self._laps[name], self._last = self._laps.get(name, 0.0) + now - self._last, now

    def take(self) -> dict[str, float]:
        """The laps since this was called last."""
        laps, self._laps = self._laps, {}
        return laps


def iterate(setup: Setup, state: TrainState, number: int, clock: Stopwatch | None = None) -> tuple[TrainState, Turn]:
    """One PPO iteration, as one program, or as two around a reward on the host. `clock` goes on since the last one."""
    config, step, clock = setup.settings.ppo, setup.step, clock or Stopwatch()
    rows = rows_of(setup, number)
    batch = batch_of(setup, setup.prompts, rows_of(setup, number + config.stale_iterations))
    texts = texts_to_learn(setup, number)
    clock.lap("time/host_s")
    if step.iterate:
        state, metrics, experience, scores = step.iterate(state, setup.ref_params, batch, setup.judges.params, texts)
    else:
        newest = step.act(state, setup.ref_params, batch)  # runs on while an older one is judged
        rollout = jax.block_until_ready(due(state, newest))
        clock.lap("time/generate_s")
        greedy = step.greedy(state, setup.ref_params, batch) if setup.method.greedy else None
        scores = judge(setup, setup.prompts, rows, rollout, greedy)
        clock.lap("time/score_s")
        state, metrics, experience = step.learn(state, setup.ref_params, newest, scores, texts)
    metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}  # waits
    clock.lap("time/program_s" if step.iterate else "time/learn_s")
    each = np.repeat(rows, config.responses_per_prompt)
    if setup.gold:
        gold = judge_on_host(setup.gold, setup.prompts, each, texts_of(setup, experience))
        metrics["objective/gold"] = float(gold.mean())
        clock.lap("time/gold_s")
    laps = clock.take()
    seconds = sum(laps.values())
    metrics["optim/lr"] = float(setup.schedule((number + 1) * config.updates_per_iteration - 1))
    metrics |= laps | {
        "time/iteration_s": seconds,
        "time/tokens_per_s": metrics["objective/length"] * config.batch_size / seconds,
    }
    return state, Turn(each, metrics, experience, scores)


def rows_of(setup: Setup, number: int) -> np.ndarray:
    """The prompts of an iteration's rollout, each once."""
    config = setup.settings.ppo
    asked = config.batch_size // config.responses_per_prompt
    return batch_indices(len(setup.prompts.texts), asked, number, setup.settings.seed)


def texts_to_learn(setup: Setup, number: int) -> Examples | None:
    """The texts of an iteration's auxiliary next-token loss, on their devices."""
    if setup.texts is None:
        return None
    texts, settings = setup.texts, setup.settings
    rows = batch_indices(len(texts.tokens), settings.ptx_batch_size, number, settings.seed)
    examples = Examples(texts.tokens[rows], texts.segments[rows], texts.target_mask[rows])
    return jax.device_put(examples, setup.shardings.batch)


def begin(setup: Setup, state: TrainState) -> TrainState:
    """What has to be there before the first iteration: rollouts that wait, and the scores of the reference."""
    config, settings = setup.settings.ppo, setup.settings
    # Keys are drawn from the number of a step; these are of no other iteration.
    ahead = [state.replace(step=jnp.int32(i - config.stale_iterations)) for i in range(config.stale_iterations)]
    waiting = [
        setup.step.act(at, setup.ref_params, batch_of(setup, setup.prompts, rows_of(setup, i)))
        for i, at in enumerate(ahead)
    ]
    running = state.running
    if config.score_scale == "reference":
        for i in range(-(-settings.reference_samples // config.batch_size)):
            at, rows = state.replace(step=jnp.int32(-1000 - i)), rows_of(setup, i)
            rollout = setup.step.act(at, setup.ref_params, batch_of(setup, setup.prompts, rows))
            scores = judge(setup, setup.prompts, rows, rollout)
            whole = truncation_scores(rollout, scores, config, setup.sampling).whole
            moments = add_batch(Moments(running.score_count, running.score_mean, running.score_m2), whole)
            running = running.replace(score_count=moments.count, score_mean=moments.mean, score_m2=moments.m2)
        spread = float(running.score_m2)
        told = "finite scores of the reference's own responses, for ppo.score_scale=reference"
        check("config.reward: squared deviations", spread, math.isfinite(spread), told)
    return jax.device_put(state.replace(pending=tuple(waiting), running=running), setup.shardings.state)


def train(setup: Setup, workdir: Path) -> dict[str, Any]:
    """Trains to the last iteration, from the newest checkpoint if the workdir has one, and writes the results.

    Returns:
        What stands in results.json.

    Raises:
        InputError: the workdir holds another run, the reward failed, or too much was not finite.
        StoppedEarly: a signal or `max_hours` asked for it; the last iteration is saved.
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
    if done < total:
        setup = with_compiled_step(setup._replace(state=state))
    judges = {name: getattr(settings, name) for name in ("reward", "gold")}
    with Recorder(workdir / "scores.jsonl", [judges, fingerprints(judges)]) as recorder:
        gold = recorder.reward(setup.gold, "gold") if setup.gold else None
        return go_on(setup._replace(judges=recorder.judges(setup.judges), gold=gold), state, workdir, checkpoints)


def go_on(setup: Setup, state: TrainState, workdir: Path, checkpoints: Checkpointer) -> dict[str, Any]:
    """The iterations that are left, and the results; see `train`."""
    settings, total, done = setup.settings, setup.settings.num_iterations, int(state.step)
    if not done:
        state = begin(setup, state)
    release_free_memory()  # what compiling has used
    if not done and settings.kl_limit:
        checkpoints.save(state)  # to go back to
    truncate_jsonl(workdir / "samples.jsonl", "iteration", done)
    trackers = tracker_names(settings.trackers)
    writers = make_writers(workdir, trackers, dataclasses.asdict(settings), workdir.name, start_step=done)
    stopped = False
    with (
        checkpoints,
        writers,
        JsonlWriter(workdir / "samples.jsonl") as samples,
        Reporter(total, done) as reporter,
        asked_to_end(settings.max_hours) as asked,
    ):
        announce(setup, reporter, done)
        clock, watchdog = Stopwatch(), Watchdog(reporter.print)
        while done < total and not stopped:
            with watchdog.watch(f"iteration {done + 1}"):
                state, turn = iterate(setup, state, done, clock)
            watch(setup, state, turn, workdir, reporter)
            writers.write(done, turn.metrics)
            reporter.update(done, turn.metrics)
            stopped = 0 < settings.kl_limit < turn.metrics["objective/kl"]
            if stopped or done + 1 == total or done % settings.samples_every == 0:
                show_samples(setup, done, turn, samples, reporter)
            done += 1
            if not stopped and (done == total or done % settings.checkpoint_every == 0):
                checkpoints.save(state)
            if not stopped and (who := asked()):
                end_early(checkpoints, state, who, f"{done} of {total} iterations")
        reached = checkpoints.latest_step() or 0
        if stopped:  # the policy that acted in the last iteration was above the limit already, and may have been saved
            state = checkpoints.restore(state, before=done - 1)
            reporter.print(f"stopped: the KL is above {settings.kl_limit:g} nats; back to iteration {int(state.step)}")
    return finish(setup, state, workdir, reached, stopped)


def watch(setup: Setup, state: TrainState, turn: Turn, workdir: Path, reporter: Reporter) -> None:
    """Says what was not finite in an iteration, and keeps it for `experiments/replay.py`.

    Raises:
        RunError: in too many iterations in a row.
    """
    number = int(turn.metrics["guard/first_broken"])
    if number < 0:
        return
    name, done = quantities(state.params)[number], int(state.step)
    folder = save_broken(workdir, state, turn.experience, turn.scores)
    told = f"iteration {done - 1}: {name} is not finite; {turn.metrics['guard/skipped']:.0f} updates were skipped"
    reporter.print(f"{told}; kept in {folder}")
    in_a_row = int(state.running.skipped)
    if in_a_row > setup.settings.ppo.max_skipped:
        raise RunError(
            f"{told}, as in the {in_a_row - 1} iterations before it: lower config.ppo.lr, or the range of the scores; "
            f"the last checkpoint is kept, and {folder} for experiments/replay.py"
        )


def finished(workdir: Path, done: int, total: int) -> dict[str, Any] | None:
    """The results of a run that has ended: after all its iterations, or by its KL limit; None if it goes on."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"reached": -1, "stopped": False}
    ended = results["reached"] == done and (results["stopped"] or done == total)
    return results if ended else None


def show_samples(setup: Setup, iteration: int, turn: Turn, file: JsonlWriter, reporter: Reporter) -> None:
    """The first few prompts and responses of an iteration, to the terminal and to samples.jsonl."""
    num = setup.settings.num_samples
    prompts, responses = [setup.prompts.texts[i] for i in turn.rows[:num]], texts_of(setup, turn.experience)[:num]
    points = np.asarray(turn.scores.whole).tolist()[:num]
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


def with_compiled_step(setup: Setup) -> Setup:
    """With the programs of an iteration compiled, if they are not yet."""
    if isinstance(setup.step.learn, Compiled) or isinstance(setup.step.iterate, Compiled):
        return setup
    step, given = setup.step, (setup.state, setup.ref_params)
    batch, texts = batch_of(setup, setup.prompts, rows_of(setup, 0)), texts_to_learn(setup, 0)
    if step.iterate:
        lowered = {"iterate": step.iterate.lower(*given, batch, setup.judges.params, texts)}
    else:
        rollout, scores = jax.eval_shape(step.act, *given, batch), setup.scores
        lowered = {"act": step.act.lower(*given, batch)}
        if setup.method.greedy:
            lowered["greedy"] = step.greedy.lower(*given, batch)
            scores = scores.replace(greedy=scores.total)
        lowered["learn"] = step.learn.lower(*given, rollout, scores, texts)
    programs: dict[str, Any] = {name: program.compile() for name, program in lowered.items()}
    return setup._replace(step=step._replace(**programs))


def costs(setup: Setup) -> dict[str, dict[str, float]]:
    """What each program of an iteration costs on a device, by its name in `TrainStep`; see `program_cost`."""
    programs = with_compiled_step(setup).step._asdict()
    return {name: program_cost(program) for name, program in programs.items() if isinstance(program, Compiled)}


def dry_run(settings: PPOExperiment) -> None:
    """Compiles the programs of an iteration and prints what they cost on each device."""
    print_costs(costs(prepare(settings)))


def main(settings: PPOExperiment, workdir: Path) -> None:
    """Runs the experiment."""
    page = results_page(train(prepare(settings), workdir), workdir, settings.kl_limit)
    atomic_write(workdir / "results.md", page.encode())
    print(page)


if __name__ == "__main__":
    cli.launch(PPOExperiment, main, dry_run)
