"""The best of n responses: how good it is, as the yardstick of a policy and by itself.

    python experiments/best_of_n.py --config=experiments/configs/best_of_n.py --workdir=runs/best_of_n \
        --config.model=FOLDER --config.prompts=PROMPTS.jsonl --config.reward=model:FOLDER

Best of n costs n samples and no training, and its distance from the base is known, KL = log n - (n - 1) / n (Stiennon
et al. 2020, arXiv:2009.01325; Gao et al. 2022, arXiv:2210.10760).

The workdir gets config.json, responses.jsonl (all that was sampled), best_of_n.jsonl and results.md (for each n the KL
and the scores), results.json, and chosen.jsonl: the best response to each prompt (prompt, completion), which
`train_sft.py` learns from: rejection sampling. The same command again samples nothing twice.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.prompts import Data, fitted
from experiments.responses import Responder, options_of
from experiments.settings import BestOfNExperiment, PPOExperiment
from ppo_jax import hub
from ppo_jax.data import told_at
from ppo_jax.errors import InputError, check
from ppo_jax.evaluation import win_rate
from ppo_jax.metrics import atomic_write, read_jsonl, write_jsonl
from ppo_jax.rewards import HttpOptions, call_reward, load_host_reward
from ppo_jax.rewards.registry import split_judges
from ppo_jax.runs import RunError, open_run, write_json
from ppo_jax.tokenizers import load_tokenizer, render_chat

N = 16
POLICY_RESPONSES = 4  # of the policy to a prompt

TextJudge = Callable[[Sequence[str], Sequence[Sequence[str]], Sequence[dict[str, Any]]], np.ndarray]
"""Prompts, the responses to each and the data's other columns, to scores `[prompts, responses]`."""


def best_of_n(proxy: np.ndarray, value: np.ndarray, n: int) -> float:
    """Mean value of the response that the proxy likes best among n, over all prompts and all groups of n.

    Args:
        proxy: `[prompts, N]` what chooses.
        value: `[prompts, N]` what is measured.
        n: a divisor of N.
    """
    groups = (-1, proxy.shape[1] // n, n)
    chosen = np.argmax(proxy.reshape(groups), axis=2)
    return float(np.take_along_axis(value.reshape(groups), chosen[..., None], axis=2).mean())


def evaluate(folder: Path, base: str, policy: str, settings: PPOExperiment, prompts: Path) -> dict[str, Any]:
    """Answers prompts by the base (16 times) and by the policy, and judges the answers.

    Writes responses.jsonl and best_of_n.jsonl into the folder.

    Args:
        folder: of the results.
        base: folder of the policy before PPO.
        policy: folder of the policy after PPO.
        settings: of the PPO: lengths, temperature, seed, the proxy (`reward`) and the gold.
        prompts: JSONL with a column `prompt`.

    Returns:
        Means by name: `proxy/*`, and `gold/*` (None without a gold).
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = [row["prompt"] for row in read_jsonl(prompts)]
    ppo = settings.ppo
    sampling = (ppo.prompt_length, ppo.response_length, ppo.temperature)
    options = {name: getattr(settings, name) for name in ("dtype", "pad_token", "eos_token")}
    answers = {
        side: Responder(model, *sampling, **options).respond(texts, num, settings.seed)
        for side, model, num in (("base", base, N), ("ppo", policy, POLICY_RESPONSES))
    }
    if not all(isinstance(text, str) for text in texts):  # conversations: judges read them as the model does
        tokenizer = load_tokenizer(base)
        texts = [text if isinstance(text, str) else render_chat(tokenizer, text) for text in texts]
    http = HttpOptions(settings.reward_timeout_s, settings.reward_retries, settings.reward_batch_size)

    def scores_of(spec: str) -> dict[str, np.ndarray]:
        judge = load_judge(spec, http)
        return {side: judge(texts, own, [{}] * len(texts)) for side, own in answers.items()}

    proxy = scores_of(settings.reward)
    gold = scores_of(settings.gold) if settings.gold else None
    rows = rows_of(proxy["base"], gold and gold["base"], (1, 2, 4, 8, N))
    write_jsonl(folder / "best_of_n.jsonl", rows)
    best = np.argmax(proxy["base"], axis=1)
    samples = []
    for i, text in enumerate(texts):
        shown = {"base": ("base", 0), "best_of_16": ("base", best[i]), "ppo": ("ppo", 0)}
        sample = {"prompt": text} | {name: answers[side][i][j] for name, (side, j) in shown.items()}
        for judge, scores in (("proxy", proxy), ("gold", gold)):
            sample |= {f"{judge}_{name}": scores and float(scores[side][i, j]) for name, (side, j) in shown.items()}
        samples.append(sample)
    write_jsonl(folder / "responses.jsonl", samples)
    results: dict[str, Any] = {"num_prompts": len(texts)}
    for name, scores in (("proxy", proxy), ("gold", gold)):
        results |= _means(name, scores, rows)
    results["gold/best_of_16_by_gold"] = gold and best_of_n(gold["base"], gold["base"], N)
    return results


def rows_of(proxy: np.ndarray, gold: np.ndarray | None, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """For each n: `n`, `kl` (nats a response), and the mean `proxy` and `gold` score of the best of n by the proxy.

    Args:
        proxy: `[prompts, N]`.
        gold: `[prompts, N]`, or None.
        sizes: divisors of N.
    """
    return [
        {
            "n": n,
            "kl": math.log(n) - (n - 1) / n,
            "proxy": best_of_n(proxy, proxy, n),
            "gold": None if gold is None else best_of_n(proxy, gold, n),
        }
        for n in sizes
    ]


def load_judge(spec: str, http: HttpOptions | None = None, name: str = "reward") -> TextJudge:
    """The judge that a setting names: one of texts, or several with their weights (see `load_reward`).

    Args:
        spec: the setting.
        http: how services are asked; None: the defaults.
        name: of the setting, for messages.

    Raises:
        InputError: nothing of that name, or a judge that knows tokens only.
    """
    try:
        members = [(load_host_reward(one, http), weight) for one, weight in split_judges(spec) if weight]
    except InputError as error:
        raise InputError(f"config.{name}: {str(error).removeprefix('config.reward: ')}") from error

    def judge(
        prompts: Sequence[str], answers: Sequence[Sequence[str]], columns: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        asked = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
        given = [row for row, own in zip(columns, answers, strict=True) for _ in own]
        texts = [text for own in answers for text in own]
        scores = [weight * call_reward(member, asked, texts, given) for member, weight in members]
        return np.sum(scores, axis=0).reshape(len(prompts), -1)

    return judge


def _means(name: str, scores: dict[str, np.ndarray] | None, best: list[dict[str, Any]]) -> dict[str, Any]:
    if scores is None:
        return dict.fromkeys(f"{name}/{what}" for what in ("base", "best_of_16", "ppo"))
    wins = win_rate(scores["ppo"][:, 0], scores["base"][:, 0])
    return {
        f"{name}/base": float(scores["base"].mean()),
        f"{name}/best_of_16": best[-1][name],
        f"{name}/ppo": float(scores["ppo"].mean()),
        f"{name}/win_rate": wins.rate,
        f"{name}/win_rate_low": wins.low,
        f"{name}/win_rate_high": wins.high,
    }


# The command line


def run(settings: BestOfNExperiment, workdir: Path) -> dict[str, Any]:
    """Samples, judges and chooses; what the workdir has already is not done again.

    Returns:
        What stands in results.json: `num_prompts`, and `best_of_n` (see `rows_of`).

    Raises:
        InputError: any of the inputs cannot be used, the workdir holds another run, or a judge failed.
    """
    config, finished, sampled = vars(settings), workdir / "results.json", workdir / "responses.jsonl"
    if finished.exists():
        open_run(workdir, config)
        return json.loads(finished.read_text())
    check("config.model", settings.model, bool(settings.model), "a Hugging Face folder, or a name on the hub")
    judge = load_judge(settings.reward)
    gold_judge = load_judge(settings.gold, name="gold") if settings.gold else None
    data = read_prompts(settings)
    responder = None if sampled.exists() else Responder(settings.model, **options_of(settings))
    open_run(workdir, config)
    if responder is not None:
        answers = responder.respond(data.prompts, settings.sizes[-1], settings.seed)
        rows = zip(data.prompts, answers, strict=True)
        write_jsonl(sampled, [{"prompt": prompt, "completions": texts} for prompt, texts in rows])
        del responder  # its memory is free for the judges
    answers = read_answers(sampled, data, settings)
    proxy = judge(data.texts, answers, data.columns)
    gold = gold_judge(data.texts, answers, data.columns) if gold_judge else None
    rows = rows_of(proxy, gold, settings.sizes)
    write_jsonl(workdir / "best_of_n.jsonl", rows)
    write_jsonl(workdir / "chosen.jsonl", chosen_rows(data, answers, proxy, gold))
    atomic_write(workdir / "results.md", table(settings, rows, len(data.prompts)).encode())
    results = {"num_prompts": len(data.prompts), "best_of_n": rows}
    write_json(finished, results)  # the last file: with it the work is done
    return results


def read_prompts(settings: BestOfNExperiment) -> Data:
    """The first `num_prompts` prompts that fit.

    Raises:
        InputError: a row that cannot be used, or no prompt that fits.
    """
    tokenizer, data = load_tokenizer(hub.resolve(settings.model)), Data([], [], [], [])
    how = (settings.prompts_split, [tokenizer], settings.prompt_length, settings.long_prompts)
    for asked in fitted(settings.prompts, *how):
        if asked.prompt is None:
            continue
        with told_at(asked.where):
            data.texts.append(asked.prompt if isinstance(asked.prompt, str) else render_chat(tokenizer, asked.prompt))
        data.prompts.append(asked.prompt)
        data.columns.append(asked.columns)
        if len(data.prompts) == settings.num_prompts:
            break
    told = f"at least 1 of at most {settings.prompt_length} tokens; config.prompt_length and config.long_prompts"
    check(f"{settings.prompts}: prompts", len(data.prompts), bool(data.prompts), told)
    return data


def read_answers(path: Path, data: Data, settings: BestOfNExperiment) -> list[list[str]]:
    """The responses that were sampled.

    Raises:
        InputError: they are those of other prompts, or the file was changed.
    """
    rows, num = read_jsonl(path), settings.sizes[-1]
    same = [row.get("prompt") for row in rows] == data.prompts
    if not same or any(len(row.get("completions", ())) != num for row in rows):
        raise RunError(f"{path}: it does not hold {num} responses to each prompt of {settings.prompts}; "
                       "expected the data of the first start")  # fmt: skip
    return [row["completions"] for row in rows]


def chosen_rows(
    data: Data, answers: Sequence[Sequence[str]], proxy: np.ndarray, gold: np.ndarray | None
) -> list[dict[str, Any]]:
    """The best response to each prompt, as `train_sft.py` reads it (a conversation gets a message), with its score."""
    rows = []
    for i, (prompt, best) in enumerate(zip(data.prompts, np.argmax(proxy, axis=1), strict=True)):
        text = answers[i][best]
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        row = {"prompt": prompt, "completion": completion, "score": float(proxy[i, best])}
        rows.append(row if gold is None else row | {"gold": float(gold[i, best])})
    return rows


def table(settings: BestOfNExperiment, rows: Sequence[dict[str, Any]], num_prompts: int) -> str:
    """The page of results as Markdown."""
    lines = ["# Best of n", "", "| n | KL to the model, nats | score | gold |", "|---:|---:|---:|---:|"]
    for row in rows:
        gold = "" if row["gold"] is None else f"{row['gold']:.3f}"
        lines.append(f"| {row['n']} | {row['kl']:.3f} | {row['proxy']:.3f} | {gold} |")
    gold = f", gold: {settings.gold}" if settings.gold else ""
    return "\n".join([*lines, "", f"{num_prompts} prompts. The score chooses: {settings.reward}{gold}.", ""])


def dry_run(settings: BestOfNExperiment) -> None:
    """Refused: nothing here is trained.

    Raises:
        InputError: always.
    """
    raise InputError("--dry_run: best of n has no train step to plan; expected train_ppo.py")


def main(settings: BestOfNExperiment, workdir: Path) -> None:
    """Runs it."""
    run(settings, workdir)
    print((workdir / "results.md").read_text())
    print(f"- the best responses, for train_sft.py: {workdir / 'chosen.jsonl'}")


if __name__ == "__main__":
    cli.launch(BestOfNExperiment, main, dry_run)
