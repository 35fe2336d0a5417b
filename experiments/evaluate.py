"""Evaluation of a policy: its mean score, and how often it is preferred over another policy or over references.

    python experiments/evaluate.py --config=experiments/configs/evaluate.py --workdir=runs/evaluation \
        --config.policy=runs/sentiment/policy --config.against=gpt2

The workdir gets config.json, responses.jsonl, results.json and results.md; with people as the judge, feedback.db too,
the store of the labelling page. The same command again goes on where it stopped, and samples nothing twice.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from experiments import cli
from experiments.prompts import Data, read_data
from experiments.responses import Responder, options_of
from experiments.settings import EvaluateExperiment
from experiments.settings.evaluation import PAGE, REFERENCES
from ppo_jax import hub
from ppo_jax.errors import InputError, check
from ppo_jax.evaluation import ROUGE_TYPES, WinRate, bleu, bootstrap_interval, preference_rate, rouge, win_rate
from ppo_jax.feedback.store import Item, Store
from ppo_jax.metrics import atomic_write, read_jsonl, write_jsonl
from ppo_jax.rewards import HostReward, call_reward, load_host_reward
from ppo_jax.runs import RunError, open_run, write_json
from ppo_jax.tokenizers import encode_pieces, load_tokenizer

MAY_CHANGE = ("host", "port")
"""Fields that a restart may change. The token of the page is not written down at all."""

Answers = dict[str, list[str]]
"""The responses of each side, "policy" and perhaps "against", in the order of the prompts."""


class Verdict(NamedTuple):
    """What the judge said."""

    scores: dict[str, np.ndarray]  # of each side; empty when people chose
    wins: WinRate | None  # of the policy; None when there is nothing to compare with


def evaluate(settings: EvaluateExperiment, workdir: Path) -> dict[str, Any]:
    """Samples, judges and compares; what the workdir has already is not done again.

    Returns:
        What stands in results.json: `policy` and `against` (`score` with its 95 % interval `score_low`, `score_high`,
        and `length` in tokens of the policy), `win_rate` (`rate`, `low`, `high`, `wins`, `losses`, `ties`), `bleu` (0
        to 100), `rouge1`, `rouge2`, `rougeL` (0 to 1) and `num_prompts`; None where there is no such thing.

    Raises:
        InputError: any of the inputs cannot be used, the workdir holds another run, or the judge failed.
    """
    config = {name: value for name, value in dataclasses.asdict(settings).items() if name != "token"}
    finished, sampled = workdir / "results.json", workdir / "responses.jsonl"
    if finished.exists():
        open_run(workdir, config, MAY_CHANGE)
        return json.loads(finished.read_text())
    check("config.policy", settings.policy, bool(settings.policy), "a Hugging Face folder, or a name on the hub")
    judge = load_judge(settings, workdir)
    models = [settings.policy] + [settings.against] * (settings.against not in ("", REFERENCES))
    tokenizers = [load_tokenizer(hub.resolve(model)) for model in models]
    data = read_data(settings, tokenizers)
    responders = [] if sampled.exists() else [make_responder(settings, model) for model in models]
    open_run(workdir, config, MAY_CHANGE)
    if responders:
        write_answers(sampled, data, sample(settings, data, responders))
        responders.clear()  # their memory is free for the judge
    answers = read_answers(sampled, data, settings)
    verdict = judge(data, answers)
    write_answers(sampled, data, answers, verdict.scores)
    results, page = summarize(settings, tokenizers[0], data, answers, verdict)
    atomic_write(workdir / "results.md", page.encode())
    write_json(finished, results)  # the last file: with it the evaluation is done
    return results


# Responses


def make_responder(settings: EvaluateExperiment, model: str) -> Responder:
    """A policy, ready to answer."""
    return Responder(model, **options_of(settings))


def sample(settings: EvaluateExperiment, data: Data, responders: Sequence[Responder]) -> Answers:
    """One response of each policy to each prompt, with the same random numbers; or the first reference in its place."""
    answers = [[text for (text,) in one.respond(data.prompts, seed=settings.seed)] for one in responders]
    if settings.against == REFERENCES:
        answers.append([row[0] for row in data.references])
    return dict(zip(("policy", "against"), answers, strict=False))


def write_answers(path: Path, data: Data, answers: Answers, scores: dict[str, np.ndarray] | None = None) -> None:
    """A row a prompt: `prompt`, the response of each side, `references`, and once there are some `score_policy` and
    `score_against`.
    """
    columns: dict[str, Sequence[Any]] = {"prompt": data.texts, **answers}
    if data.references:
        columns["references"] = data.references
    columns |= {f"score_{side}": values.tolist() for side, values in (scores or {}).items()}
    rows = zip(*columns.values(), strict=True)
    write_jsonl(path, (dict(zip(columns, row, strict=True)) for row in rows))


def read_answers(path: Path, data: Data, settings: EvaluateExperiment) -> Answers:
    """The responses that were sampled.

    Raises:
        InputError: they are those of other prompts, or the file was changed.
    """
    rows = read_jsonl(path)
    wanted = ["policy", "against"] if settings.against else ["policy"]
    if [row.get("prompt") for row in rows] != data.texts or any(side not in row for row in rows for side in wanted):
        raise RunError(f"{path}: its prompts are not those of {settings.prompts}; expected the data of the first start")
    return {side: [row[side] for row in rows] for side in wanted}


# Judges


def load_judge(settings: EvaluateExperiment, workdir: Path) -> Callable[[Data, Answers], Verdict]:
    """What says which response is the better one.

    Raises:
        InputError: no such judge, or a package is missing that the page needs.
    """
    if settings.judge == PAGE:
        from experiments.collect_feedback import serve_until_complete

        return partial(ask_people, settings, workdir / "feedback.db", serve_until_complete)
    try:
        return partial(ask_reward, settings, load_host_reward(settings.judge))
    except InputError as error:
        raise InputError(f"config.judge: {str(error).removeprefix('config.reward: ')}") from error


def ask_reward(settings: EvaluateExperiment, reward: HostReward, data: Data, answers: Answers) -> Verdict:
    """Scores of both sides; the higher one wins."""
    scores = {
        side: call_reward(reward, data.texts, texts, data.columns).astype(np.float64) for side, texts in answers.items()
    }
    return Verdict(scores, win_rate(*scores.values(), rng=settings.seed) if len(scores) == 2 else None)


def ask_people(
    settings: EvaluateExperiment, path: Path, serve: Callable[..., None], data: Data, answers: Answers
) -> Verdict:
    """Preferences of people, who see the two responses in a random order and do not know whose they are.

    Equal responses are a tie, and nobody is asked; so are two of which somebody says that both are bad. The preference
    of a pair is the mean over its annotators.
    """
    # Without the spaces around them, in which the side might show itself.
    shown = ([text.strip() for text in answers[side]] for side in ("policy", "against"))
    pairs = zip(data.texts, *shown, strict=True)
    items = [Item("compare", prompt, (a, b), tuple(answers)) if a != b else None for prompt, a, b in pairs]
    preferences = defaultdict(list)
    with Store(path) as store:
        store.add_items([item for item in items if item])
        store.set_overlap(1.0, settings.annotators)
        if any(items):
            serve(store, settings.host, settings.port, settings.token)
        for judgement in store.judgements():
            policy, against = judgement.ranks  # pyrefly: ignore[not-iterable] (None is for scores only)
            preferences[judgement.item].append((np.sign(against - policy) + 1) / 2)
    means = [float(np.mean(preferences[item])) if item else 0.5 for item in items]
    return Verdict({}, preference_rate(means, rng=settings.seed))


# Results


def summarize(
    settings: EvaluateExperiment, tokenizer: PreTrainedTokenizerBase, data: Data, answers: Answers, verdict: Verdict
) -> tuple[dict[str, Any], str]:
    """(what stands in results.json, the page of results as Markdown).

    Args:
        settings: of the evaluation.
        tokenizer: counts the lengths, of both sides.
        data: prompts and references.
        answers: the responses.
        verdict: what the judge said of them.
    """
    sides = {
        side: describe(settings, lengths_of(tokenizer, data, texts), verdict.scores.get(side))
        for side, texts in answers.items()
    }
    overlap = bleu(answers["policy"], data.references, settings.language) if data.references else None
    results = {
        "policy": sides["policy"],
        "against": sides.get("against"),
        "win_rate": verdict.wins and verdict.wins._asdict(),
        "bleu": overlap and overlap.score,
        **(rouge(answers["policy"], data.references) if overlap else dict.fromkeys(ROUGE_TYPES)),
        "num_prompts": len(data.texts),
    }
    lines = ["# Evaluation", "", *table(settings, sides, verdict), "", *compared(results, settings)]
    if overlap:
        shares = ", ".join(f"{name.replace('rouge', 'ROUGE-')} {results[name]:.3f}" for name in ROUGE_TYPES)
        lines += ["", f"Policy and references: BLEU {overlap.score:.2f} ({overlap.signature}), {shares}."]
    for i, prompt in enumerate(data.texts[:4]):
        lines += ["", f"**{one_line(prompt)}**", "", *(f"- {side}: {one_line(answers[side][i])}" for side in answers)]
    return results, "\n".join(lines) + "\n"


def lengths_of(tokenizer: PreTrainedTokenizerBase, data: Data, texts: Sequence[str]) -> list[int]:
    """Tokens of each response, as it stands behind its prompt, without EOS."""
    rows = zip(data.prompts, data.texts, texts, strict=True)
    return [len(encode_pieces(tokenizer, [text, answer], is_chat=prompt != text)[1]) for prompt, text, answer in rows]


def describe(
    settings: EvaluateExperiment, lengths: Sequence[int], scores: np.ndarray | None
) -> dict[str, float | None]:
    """`score`, `score_low`, `score_high` (None without scores) and `length` of one side."""
    length = float(np.mean(lengths))
    if scores is None:
        return dict.fromkeys(("score", "score_low", "score_high")) | {"length": length}
    low, high = bootstrap_interval(scores, rng=settings.seed)
    return {"score": float(scores.mean()), "score_low": low, "score_high": high, "length": length}


def table(settings: EvaluateExperiment, sides: dict[str, dict[str, Any]], verdict: Verdict) -> list[str]:
    """Score and length of each side, as Markdown."""
    names = {"policy": settings.policy, "against": settings.against}
    lines = ["| | mean score | 95 % interval | mean length, tokens |", "|---|---:|---:|---:|"]
    for side, row in sides.items():
        score = f"{row['score']:.3f} | {span(row['score_low'], row['score_high'])}" if verdict.scores else " | "
        lines.append(f"| {side}: {names[side]} | {score} | {row['length']:.1f} |")
    if len(verdict.scores) == 2:
        difference = verdict.scores["policy"] - verdict.scores["against"]
        interval = span(*bootstrap_interval(difference, rng=settings.seed))
        lines.append(f"| difference | {difference.mean():.3f} | {interval} | |")
    return lines


def compared(results: dict[str, Any], settings: EvaluateExperiment) -> list[str]:
    """The win rate, and where all these numbers come from."""
    people = f"people on the labelling page, {settings.annotators} a pair"
    judge = people if settings.judge == PAGE else settings.judge
    lines = [f"{results['num_prompts']} prompts. Judge: {judge}. Intervals: 95 %, bootstrap over prompts."]
    if rate := results["win_rate"]:
        counts = f"{rate['wins']} wins, {rate['losses']} losses, {rate['ties']} ties, which count half"
        lines += ["", f"Win rate of the policy: {rate['rate']:.3f} ({span(rate['low'], rate['high'])}): {counts}."]
    return lines


def span(low: float, high: float) -> str:
    """An interval, as it is printed."""
    return f"{low:.3f} to {high:.3f}"


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def dry_run(settings: EvaluateExperiment) -> None:
    """Refused: nothing here is trained.

    Raises:
        InputError: always.
    """
    raise InputError("--dry_run: an evaluation has no train step to plan; expected train_ppo.py")


def main(settings: EvaluateExperiment, workdir: Path) -> None:
    """Runs the evaluation."""
    evaluate(settings, workdir)
    print((workdir / "results.md").read_text())
    print(f"- responses: {workdir / 'responses.jsonl'}\n- results: {workdir / 'results.json'}")


if __name__ == "__main__":
    cli.launch(EvaluateExperiment, main, dry_run)
