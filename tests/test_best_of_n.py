"""The yardstick of a policy: best of n against loops, a whole evaluation whose responses and scores are known, and the
command line from its flags to the data that it leaves for supervised fine-tuning.
"""

import json
import math
import os

import folders
import numpy as np
import pytest

from experiments import best_of_n
from experiments.best_of_n import POLICY_RESPONSES, N
from experiments.settings import BestOfNExperiment, PPOExperiment
from ppo_jax import hub
from ppo_jax.config import PPOConfig
from ppo_jax.examples import load_examples
from ppo_jax.metrics import read_jsonl
from ppo_jax.rewards import RewardError
from ppo_jax.tokenizers import load_tokenizer, special_tokens

KEYS = ("base", "best_of_16", "ppo")


def by_loop(proxy, value, n: int) -> float:
    """Group after group of n: the value of the one that the proxy likes best, the first of equals."""
    found = []
    for liked, worth in zip(proxy.tolist(), value.tolist(), strict=True):
        for start in range(0, len(liked), n):
            best = start
            for i in range(start, start + n):
                if liked[i] > liked[best]:
                    best = i
            found.append(worth[best])
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_best_of_n_is_that_of_a_loop(rng, n):
    proxy, value = rng.normal(size=(2, 7, 16))
    rough = np.round(proxy)  # with many equal ones
    for chooser in (proxy, rough):
        assert best_of_n.best_of_n(chooser, value, n) == pytest.approx(by_loop(chooser, value, n), abs=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_the_mean_maximum(rng):
    proxy, value = rng.normal(size=(2, 9, 8))
    assert best_of_n.best_of_n(proxy, value, 1) == pytest.approx(value.mean())
    assert best_of_n.best_of_n(value, value, 8) == pytest.approx(value.max(axis=1).mean())
    assert best_of_n.best_of_n(-value, value, 8) == pytest.approx(value.min(axis=1).mean())


def test_more_to_choose_from_is_never_worse_in_the_choosers_eyes(rng):
    proxy = rng.normal(size=(5, 16))
    means = [best_of_n.best_of_n(proxy, proxy, n) for n in (1, 2, 4, 8, 16)]
    assert means == sorted(means)


# A whole evaluation

PROMPTS = ["the cat", "a dog", "the film"]
WORDS = ("good", "bad", "great", "dull", "fine")


class Scripted:
    """In the place of a `Responder`: response j to prompt i of a model is known."""

    asked = ()

    def __init__(self, model: str, *arguments, **options):
        self.model = model
        Scripted.asked += ((model, arguments, options),)

    def respond(self, prompts, num_responses=1, seed=0):
        Scripted.asked += ((self.model, list(prompts), num_responses, seed),)
        return [[text(self.model, i, j) for j in range(num_responses)] for i in range(len(prompts))]


def text(model: str, i: int, j: int) -> str:
    """Some words, of which the number of praising ones differs."""
    rng = np.random.default_rng([len(model), i, j])
    return "".join(" " + word for word in rng.choice(WORDS, 5))


def length(prompts, completions, **columns):
    """The proxy: long words."""
    return [len(completion) + len(prompt) / 8 for prompt, completion in zip(prompts, completions, strict=True)]


JUDGES = """
def length(prompts, completions, **columns):
    return [len(completion) + len(prompt) / 8 for prompt, completion in zip(prompts, completions)]


def praise(prompts, completions, **columns):
    return [sum(word in ("good", "great", "fine") for word in text.split()) for text in completions]


def broken(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


def praise(completion: str) -> int:
    return sum(word in ("good", "great", "fine") for word in completion.split())


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Evaluates "base" and "policy"; gives (results, folder)."""
    monkeypatch.setattr(best_of_n, "Responder", Scripted)
    Scripted.asked = ()
    (tmp_path / "judges.py").write_text(JUDGES)
    prompts = folders.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])

    def run(reward="length", gold="praise", **fields):
        specs = {"reward": f"{tmp_path}/judges.py:{reward}", "gold": gold and f"{tmp_path}/judges.py:{gold}"}
        settings = PPOExperiment(**specs, **fields)
        folder = tmp_path / "deep" / "evaluation"
        return best_of_n.evaluate(folder, "base", "policy", settings, prompts), folder

    return run


def test_means_rows_and_samples_are_those_of_loops(evaluated):
    results, folder = evaluated()
    base = [[text("base", i, j) for j in range(N)] for i in range(3)]
    policy = [[text("policy", i, j) for j in range(POLICY_RESPONSES)] for i in range(3)]
    proxy = np.array([length([prompt] * N, texts) for prompt, texts in zip(PROMPTS, base, strict=True)])
    gold = np.array([[praise(one) for one in texts] for texts in base])
    policy_proxy = np.array([length([prompt] * 4, texts) for prompt, texts in zip(PROMPTS, policy, strict=True)])
    policy_gold = np.array([[praise(one) for one in texts] for texts in policy])

    best = proxy.argmax(axis=1)
    wins = [a > b for a, b in zip(policy_gold[:, 0], gold[:, 0], strict=True)]
    ties = [a == b for a, b in zip(policy_gold[:, 0], gold[:, 0], strict=True)]
    expected = {
        "num_prompts": 3,
        "proxy/base": proxy.mean(),
        "proxy/best_of_16": proxy.max(axis=1).mean(),
        "proxy/ppo": policy_proxy.mean(),
        "gold/base": gold.mean(),
        "gold/best_of_16": np.mean([gold[i, best[i]] for i in range(3)]),
        "gold/ppo": policy_gold.mean(),
        "gold/best_of_16_by_gold": gold.max(axis=1).mean(),
        "gold/win_rate": (sum(wins) + 0.5 * sum(ties)) / 3,
    }
    rates = {f"{judge}/win_rate{end}" for judge in ("proxy", "gold") for end in ("", "_low", "_high")}
    assert results.keys() == expected.keys() | rates
    for name, value in expected.items():
        assert results[name] == pytest.approx(value), name
    for judge in ("proxy", "gold"):
        low, rate, high = (results[f"{judge}/win_rate{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= rate <= high <= 1

    rows = read_jsonl(folder / "best_of_n.jsonl")
    assert [row["n"] for row in rows] == [1, 2, 4, 8, 16]
    for row in rows:
        n = row["n"]
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
        assert row["proxy"] == pytest.approx(by_loop(proxy, proxy, n))
        assert row["gold"] == pytest.approx(by_loop(proxy, gold, n))
    assert rows[0]["kl"] == 0
    assert rows[-1]["proxy"] == results["proxy/best_of_16"]

    samples = read_jsonl(folder / "responses.jsonl")
    assert [row["prompt"] for row in samples] == PROMPTS
    for i, row in enumerate(samples):
        assert (row["base"], row["ppo"], row["best_of_16"]) == (base[i][0], policy[i][0], base[i][best[i]])
        for name in ("base", "ppo", "best_of_16"):
            assert row[f"gold_{name}"] == praise(row[name])
            assert row[f"proxy_{name}"] == pytest.approx(length([PROMPTS[i]], [row[name]])[0])
    assert all(row["proxy_best_of_16"] >= row["proxy_base"] for row in samples)


def test_without_a_gold_there_are_no_numbers_of_it(evaluated):
    results, folder = evaluated(gold="")
    assert not [name for name in results if name.startswith("gold/win_rate")]
    assert {name for name, value in results.items() if value is None} == {
        "gold/best_of_16_by_gold", *(f"gold/{key}" for key in KEYS)
    }  # fmt: skip
    assert all(type(results[f"proxy/{key}"]) is float for key in KEYS)
    assert all(row["gold"] is None for row in read_jsonl(folder / "best_of_n.jsonl"))
    for row in read_jsonl(folder / "responses.jsonl"):
        assert [name for name, value in row.items() if value is None] == ["gold_base", "gold_best_of_16", "gold_ppo"]


def test_both_policies_answer_as_ppo_samples(evaluated):
    ppo = PPOConfig(prompt_length=9, response_length=11, temperature=0.7)
    evaluated(ppo=ppo, seed=5, dtype="bfloat16", pad_token="<unk>", eos_token="▁.")
    made = [asked for asked in Scripted.asked if isinstance(asked[2], dict)]
    assert [model for model, _, _ in made] == ["base", "policy"]
    for _, arguments, options in made:
        assert arguments == (9, 11, 0.7)
        assert options == {"dtype": "bfloat16", "pad_token": "<unk>", "eos_token": "▁."}
    asked = [asked[1:] for asked in Scripted.asked if not isinstance(asked[2], dict)]
    assert asked == [(PROMPTS, 16, 5), (PROMPTS, 4, 5)]


def test_a_judge_that_fails_is_told(evaluated):
    with pytest.raises(RewardError, match="reward broken: got nan for 48 of 48 responses"):
        evaluated(gold="broken")


def test_real_models_and_a_reward_model(tmp_path, rng):
    """Base and policy are the same folder: the same answers, equal scores, no win."""
    tokenizer = folders.word_tokenizer()
    model = folders.make_folder(tmp_path / "model", tokenizer)
    config = folders.llama_config(len(tokenizer), tie_embeddings=True)
    params = {
        "decoder": folders.random_params(config, 3),
        "score_head": {"kernel": rng.normal(size=(config.width, 1)).astype(np.float32)},
    }
    judge = hub.save_reward_model(tmp_path / "judge", params, config, tokenizer, eos_ids=(2,), pad_id=0)
    prompts = folders.write_jsonl(tmp_path / "prompts.jsonl", folders.prompt_rows(5))
    ppo = PPOConfig(prompt_length=8, response_length=4)
    settings = PPOExperiment(reward=f"model:{judge}", seed=1, ppo=ppo)
    results = best_of_n.evaluate(tmp_path / "evaluation", str(model), str(model), settings, prompts)
    assert results["proxy/best_of_16"] > results["proxy/base"]
    rows = read_jsonl(tmp_path / "evaluation" / "best_of_n.jsonl")
    assert [row["proxy"] for row in rows] == sorted(row["proxy"] for row in rows)
    samples = read_jsonl(tmp_path / "evaluation" / "responses.jsonl")
    assert [row["prompt"] for row in samples] == [row["prompt"] for row in folders.prompt_rows(5)]
    assert samples[0]["base"] == samples[0]["ppo"]  # the first of the same random numbers
    assert samples[0]["proxy_base"] == pytest.approx(samples[0]["proxy_ppo"], abs=1e-5)


# The command line

CONFIG = folders.ROOT / "experiments" / "configs" / "best_of_n.py"
RESULTS = set("config.json responses.jsonl best_of_n.jsonl chosen.jsonl results.json results.md .lock".split())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, prompts of which one is too long, and judges."""
    root = tmp_path_factory.mktemp("world")
    folders.make_folder(root / "model")
    rows = [*folders.prompt_rows(5), {"prompt": "the very old dog and the very old cat sat here", "number": 9}]
    folders.write_jsonl(root / "prompts.jsonl", rows)
    (root / "judges.py").write_text(JUDGES)
    return root


def flags(world, workdir, *changes: str) -> list[str]:
    fields = {
        "model": world / "model", "prompts": world / "prompts.jsonl", "prompts_split": "train", "long_prompts": "drop",
        "reward": f"{world}/judges.py:length", "gold": f"{world}/judges.py:praise", "n": "1,4,2", "prompt_length": 8,
        "response_length": 6, "batch_size": 8,
    }  # fmt: skip
    flags = [f"--config={CONFIG}", f"--workdir={workdir}"]
    return [*flags, *(f"--config.{name}={value}" for name, value in fields.items()), *changes]


@pytest.fixture
def start(capsys):
    return lambda arguments: folders.call_script(best_of_n, BestOfNExperiment, arguments, capsys)


def done(outcome):
    assert (outcome.status, outcome.err) == (0, "")
    return outcome


def test_a_run_leaves_table_choice_and_data_for_fine_tuning(world, tmp_path, start):
    run = tmp_path / "deep" / "run"
    outcome = done(start(flags(world, run)))
    assert set(os.listdir(run)) == RESULTS
    sampled, prompts = read_jsonl(run / "responses.jsonl"), [row["prompt"] for row in folders.prompt_rows(5)]
    assert [row["prompt"] for row in sampled] == prompts
    answers = [row["completions"] for row in sampled]
    assert [len(texts) for texts in answers] == [4] * 5
    proxy = np.array([length([prompt] * 4, texts) for prompt, texts in zip(prompts, answers, strict=True)])
    gold = np.array([[praise(text) for text in texts] for texts in answers])
    rows = read_jsonl(run / "best_of_n.jsonl")
    assert [row["n"] for row in rows] == [1, 2, 4]
    for row in rows:
        n = row["n"]
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
        assert row["proxy"] == pytest.approx(by_loop(proxy, proxy, n))
        assert row["gold"] == pytest.approx(by_loop(proxy, gold, n))
        assert f"| {n} | {row['kl']:.3f} | {row['proxy']:.3f} | {row['gold']:.3f} |" in outcome.out
    assert json.loads((run / "results.json").read_text()) == {"num_prompts": 5, "best_of_n": rows}
    best = proxy.argmax(axis=1)
    chosen = read_jsonl(run / "chosen.jsonl")
    for i, row in enumerate(chosen):
        assert (row["prompt"], row["completion"]) == (prompts[i], answers[i][best[i]])
        assert row["score"] == pytest.approx(proxy[i, best[i]])
        assert row["gold"] == gold[i, best[i]]
    tokenizer = load_tokenizer(world / "model")
    texts = load_examples(str(run / "chosen.jsonl"), tokenizer, special_tokens(tokenizer), length=32)
    assert len(texts) == 5
    expected = [*tokenizer(chosen[0]["prompt"] + chosen[0]["completion"])["input_ids"], 2]
    assert texts.tokens[0].tolist() == expected


def test_a_restart_samples_nothing_again(world, tmp_path, start, monkeypatch):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "rows_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert start(flags(world, run)).status == 130
    assert set(os.listdir(run)) == {"config.json", "responses.jsonl", ".lock"}
    sampled = (run / "responses.jsonl").read_bytes()
    monkeypatch.setattr(best_of_n, "Responder", lambda *_, **__: pytest.fail("it samples again"))
    outcome = done(start(flags(world, run)))
    assert set(os.listdir(run)) == RESULTS
    assert (run / "responses.jsonl").read_bytes() == sampled
    before = folders.contents(run)
    monkeypatch.setattr(best_of_n, "load_judge", lambda *_, **__: pytest.fail("it judges again"))
    assert done(start(flags(world, run))).out == outcome.out
    assert "seed was 0 and is 1" in start(flags(world, run, "--config.seed=1")).error()
    assert folders.contents(run) == before


def test_other_responses_than_those_of_the_prompts_are_refused(world, tmp_path, start):
    run = tmp_path / "run"
    done(start(flags(world, run)))
    (run / "results.json").unlink()
    rows = read_jsonl(run / "responses.jsonl")
    for broken in (rows[:-1], [rows[0] | {"completions": [" a"]}, *rows[1:]], [{"prompt": "a"}] * 5):
        folders.write_jsonl(run / "responses.jsonl", broken)
        assert "it does not hold 4 responses to each prompt" in start(flags(world, run)).error()


def test_without_a_gold_its_column_is_empty(world, tmp_path, start):
    outcome = done(start(flags(world, tmp_path / "run", "--config.gold=")))
    assert [row["gold"] for row in read_jsonl(tmp_path / "run" / "best_of_n.jsonl")] == [None] * 3
    assert all("gold" not in row for row in read_jsonl(tmp_path / "run" / "chosen.jsonl"))
    assert " |  |" in outcome.out


def test_several_judges_are_weighted(world, tmp_path, start):
    reward = f"{world}/judges.py:length*0.5,{world}/judges.py:praise*-2"
    done(start(flags(world, tmp_path / "run", f"--config.reward={reward}", "--config.num_prompts=3")))
    rows = read_jsonl(tmp_path / "run" / "responses.jsonl")
    assert len(rows) == 3
    for row, best in zip(rows, read_jsonl(tmp_path / "run" / "chosen.jsonl"), strict=True):
        texts = row["completions"]
        scores = [0.5 * a - 2 * praise(text) for a, text in zip(length([row["prompt"]] * 4, texts), texts, strict=True)]
        assert best["completion"] == texts[int(np.argmax(scores))]
        assert best["score"] == pytest.approx(max(scores))


def test_conversations_are_answered_by_a_message(tmp_path, start):
    tokenizer = folders.word_tokenizer(words=(*folders.WORDS, "user", "bot", ":"))
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    folders.make_folder(tmp_path / "model", tokenizer)
    rows = [{"prompt": [{"role": "user", "content": content}]} for content in ("the cat", "a dog")]
    folders.write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "judges.py").write_text(JUDGES)
    done(start(flags(tmp_path, tmp_path / "run", "--config.prompt_length=12")))
    chosen = read_jsonl(tmp_path / "run" / "chosen.jsonl")
    sampled = read_jsonl(tmp_path / "run" / "responses.jsonl")
    for row, asked, given in zip(chosen, rows, sampled, strict=True):
        assert row["prompt"] == asked["prompt"]
        ((role, content),) = [message.values() for message in row["completion"]]
        assert role == "assistant"
        # The judge reads the conversation as the model does: an eighth of a point for each letter.
        text = f"user : {asked['prompt'][0]['content']} . bot :"
        assert row["score"] == pytest.approx(len(content) + len(text) / 8)
        assert content in given["completions"]


REFUSED = {
    "no model": (["--config.model=./nowhere"], "no such folder"),
    "model not given": (["--config.model="], "config.model: got ''"),
    "no prompts": (["--config.prompts=nothing.jsonl"], "nothing.jsonl: no such file"),
    "nothing short": (["--config.prompt_length=1"], "prompts: got 0, expected at least 1 of at most 1 tokens"),
    "no judge": (["--config.reward=nobody"], "config.reward: got 'nobody'"),
    "no gold judge": (["--config.gold=nobody"], "config.gold: got 'nobody'"),
    "a judge of tokens": (["--config.reward=jax:judges.py:length"], "config.reward: "),
    "no divisor": (["--config.n=1,3,4"], "n: got '1,3,4', expected whole numbers above 0"),
    "only one": (["--config.n=1"], "n: got '1', expected"),
    "no number": (["--config.n=a"], "n: got 'a', expected"),
    "greedy": (["--config.temperature=0.0"], "temperature: got 0.0, expected a number above 0"),
    "positions": (["--config.response_length=64"], "expected at most the 32 positions"),
    "dry run": (["--dry_run"], "no train step to plan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, start, name):
    changes, told = REFUSED[name]
    assert told in start(flags(world, tmp_path / "run", *changes)).error()
    assert not (tmp_path / "run").exists()
