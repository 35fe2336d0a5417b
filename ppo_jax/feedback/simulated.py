"""A made-up annotator: knows how good each response is, is as unsure as people are, and writes into the same store."""

from collections.abc import Sequence

import numpy as np

from ppo_jax.errors import check
from ppo_jax.feedback.items import check_name
from ppo_jax.feedback.store import Item, Store
from ppo_jax.rewards import HostReward, call_reward

BATCH = 256  # judgements a transaction, and responses a call of the gold; what a kill can cost


def simulated_annotator(gold: Sequence[float] | np.ndarray, rng: np.random.Generator, temperature: float) -> list[int]:
    """Ranks responses by their gold and noise: Plackett-Luce, for two responses Bradley-Terry.

        P(a is best of K) = exp(gold_a / temperature) / sum_k exp(gold_k / temperature), and so on among the rest
        P(a over b) = sigmoid((gold_a - gold_b) / temperature)

    Drawn as the order of gold / temperature + Gumbel noise. There are no ties.

    Args:
        gold: how good each of K responses is.
        rng: gives the noise.
        temperature: > 0, in units of the gold; the larger, the less sure.

    Returns:
        K ranks, 1 = best.

    Source: Bradley and Terry 1952; Plackett 1975; Yellott 1977 for the Gumbel noise.
    """
    _check_temperature(temperature)
    noisy = np.asarray(gold, np.float64) / temperature + rng.gumbel(size=len(gold))
    return (1 + np.argsort(np.argsort(-noisy))).tolist()


def simulated_score(gold: float, scale: int, rng: np.random.Generator, temperature: float) -> int:
    """Puts a response on a scale: 1 + floor(scale * sigmoid(gold + temperature * noise)).

    The noise is logistic, the difference of two Gumbel draws: a response is put into the upper half of the scale as
    often as it would be preferred to one of gold 0. A gold around 0 with a spread of about 1 makes use of all scores.

    Args:
        gold: how good the response is.
        scale: the highest score.
        rng: gives the noise.
        temperature: > 0, in units of the gold.

    Returns:
        1..scale.
    """
    _check_temperature(temperature)
    noisy = gold + temperature * rng.logistic()
    share = 0.5 * (1.0 + np.tanh(0.5 * noisy))  # the sigmoid, without overflow
    return min(scale, 1 + int(scale * share))


def annotate(store: Store, gold: HostReward, temperature: float, seed: int, annotator: str = "simulated") -> int:
    """Judges every item that still needs it and that this annotator has not judged.

    What is said about an item follows from what it shows, the seed and the name alone: not from the other items, their
    order, the folder of the model that wrote it, or a kill in between, after which the same call does the rest.

    Args:
        store: the store.
        gold: `gold(prompts, completions) -> list[float]`, how good responses are.
        temperature: see `simulated_annotator` (comparisons, rankings) and `simulated_score`.
        seed: >= 0.
        annotator: the name; another one is another annotator, with noise of its own.

    Returns:
        How many judgements were added.

    Raises:
        RewardError: the gold failed; judgements of earlier items are kept.
    """
    _check_temperature(temperature)
    check("seed", seed, isinstance(seed, int) and seed >= 0, "a whole number >= 0")
    name = check_name(annotator)
    pending, added = store.pending(name), 0
    for start in range(0, len(pending), BATCH):
        part = pending[start : start + BATCH]
        golds = iter(_golds(gold, [item for _, item in part]))
        with store.transaction():
            for item_id, item in part:
                values = [next(golds) for _ in item.responses]
                if not store.has_judged(name, item_id):  # by the same call in another process
                    _judge(store, item_id, item, values, temperature, seed, name)
                    added += 1
    return added


def _golds(gold: HostReward, items: Sequence[Item]) -> list[float]:
    texts = [(item.prompt, response) for item in items for response in item.responses]
    prompts, responses = zip(*texts, strict=True)
    return call_reward(gold, prompts, responses, [{} for _ in texts]).tolist()


def _judge(
    store: Store, item_id: int, item: Item, golds: list[float], temperature: float, seed: int, name: str
) -> None:
    rng = np.random.default_rng([seed, int(item.shown_hash, 16), *name.encode()])
    order = rng.permutation(len(item.responses)).tolist()
    if item.kind == "score":
        score = simulated_score(golds[0], item.scale, rng, temperature)
        store.add_judgement(item_id, name, score=score, order=order)
    else:
        store.add_judgement(item_id, name, ranks=simulated_annotator(golds, rng, temperature), order=order)


def _check_temperature(temperature: float) -> None:
    check("temperature", temperature, 0 < temperature < np.inf, "a number > 0")
