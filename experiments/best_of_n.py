"""How good a policy is, against its base and against the best of n of the base's responses.

Best of n is the yardstick: it costs n samples and no training, and its distance from the base is known, KL = log n -
(n - 1) / n (Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2022, arXiv:2210.10760).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from experiments.responses import Responder
from experiments.settings import PPOExperiment
from ppo_jax.evaluation import win_rate
from ppo_jax.metrics import read_jsonl, write_jsonl
from ppo_jax.rewards import call_reward, load_host_reward
from ppo_jax.tokenizers import load_tokenizer, render_chat

N = 16
POLICY_RESPONSES = 4  # of the policy to a prompt


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
    proxy = judge_all(settings.reward, texts, answers)
    gold = judge_all(settings.gold, texts, answers) if settings.gold else None

    rows = []
    for n in (1, 2, 4, 8, N):
        row = {"n": n, "kl": math.log(n) - (n - 1) / n, "proxy": best_of_n(proxy["base"], proxy["base"], n)}
        rows.append(row | {"gold": gold and best_of_n(proxy["base"], gold["base"], n)})
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


def judge_all(spec: str, prompts: list[str], answers: dict[str, list[list[str]]]) -> dict[str, np.ndarray]:
    """Scores of several policies' responses, each `[prompts, responses]`."""
    judge = load_host_reward(spec)
    scores = {}
    for side, texts in answers.items():
        asked = [prompt for prompt, own in zip(prompts, texts, strict=True) for _ in own]
        flat = call_reward(judge, asked, [text for own in texts for text in own], [{} for _ in asked])
        scores[side] = flat.reshape(len(prompts), -1)
    return scores


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
