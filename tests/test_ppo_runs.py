"""Whole runs of PPO with what is not the default: adapters, frozen layers, critics of their own, several judges, ...

Each run is as small as it can be; what it leaves is compared with what another path computes.
"""

import dataclasses
import json
from types import SimpleNamespace

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_ppo
from experiments.settings import PPOExperiment
from ppo_jax import hub
from ppo_jax.data import batch_indices
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl
from ppo_jax.models import Decoder, overlay
from ppo_jax.tokenizers import load_tokenizer

JUDGES = """
import json
from pathlib import Path

NOTES = Path(__file__).with_name("notes.jsonl")
ROWS = [json.loads(line) for line in Path(__file__).with_name("prompts.jsonl").read_text().splitlines()]
PROMPTS = {row["number"]: row["prompt"] for row in ROWS}


def kind(prompts, completions, number, **columns):
    assert prompts == [PROMPTS[i] for i in number], "the columns are those of another row"
    return [sum(word in ("good", "fine", "great", "kind") for word in text.split()) / 4 for text in completions]


def noted(prompts, completions, **columns):
    scores = [len(text) / 10 + len(prompt) / 50 for prompt, text in zip(prompts, completions)]
    with NOTES.open("a") as file:
        file.write(json.dumps({"prompts": prompts, "completions": completions, "scores": scores}) + "\\n")
    return scores


def length(tokenizer):
    return lambda rollout: rollout.response_mask.sum(axis=1) / 6.0
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With judges of its own."""
    root = tmp_path_factory.mktemp("world")
    (root / "judges.py").write_text(JUDGES)
    return folders.make_world(root)


@pytest.fixture
def run(world, tmp_path, capsys, monkeypatch):
    """Runs `train_ppo.py`; gives the workdir, rows of metrics and samples, last state, and what each iteration gave."""

    def start(*changes: str, judge: str = "FILE:kind", iterations: int = 2):
        turns, iterate = [], train_ppo.iterate

        def remembered(*arguments):
            state, turn = iterate(*arguments)
            turns.append(turn)
            return state, turn

        monkeypatch.setattr(train_ppo, "iterate", remembered)
        workdir = tmp_path / "run"
        flags = world.flags(
            f"--config.reward={judge.replace('FILE', str(world.root / 'judges.py'))}",
            f"--config.num_iterations={iterations}", "--config.samples_every=1", "--config.num_samples=8",
            f"--workdir={workdir}", *changes,
        )  # fmt: skip
        outcome = folders.call_script(train_ppo, PPOExperiment, flags, capsys)
        assert (outcome.status, outcome.err) == (0, "")
        return SimpleNamespace(
            workdir=workdir, rows=read_jsonl(workdir / "metrics.jsonl"), samples=read_jsonl(workdir / "samples.jsonl"),
            results=json.loads((workdir / "results.json").read_text()), turns=turns,
            state=jax.device_get(folders.saved_state(workdir).replace(key=None)),
        )  # fmt: skip

    return start


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def changed_settings(workdir, **changes) -> PPOExperiment:
    return dataclasses.replace(folders.settings_of(workdir), **changes)


def test_an_adapter_is_exported_alone_and_merged_and_a_critic_with_its_head(world, run):
    """What is exported is the moving average of the adapter; the critic has a trunk of its own, not averaged."""
    done = run(
        "--config.lora.rank=2", "--config.lora.alpha=8", "--config.ppo.ema_decay=0.5", "--config.critic=policy",
    )  # fmt: skip
    config = hub.load_config(world.model)
    base = hub.load_params(world.model, config)
    averaged, last = flat(done.state.ema_params), flat(done.state.params["decoder"])
    assert averaged.keys() == last.keys()
    assert all(name.endswith(("/lora_a", "/lora_b")) for name in averaged)
    assert len(averaged) == 2 * 7  # A and B of the seven projections of a layer
    assert all(np.abs(averaged[name] - last[name]).max() > 0 for name in averaged)

    # The merged weights, W + alpha / rank A B, and nothing else moved.
    assert hub.load_config(done.workdir / "policy") == config
    policy, before = flat(hub.load_params(done.workdir / "policy", config)), flat(base)
    assert policy.keys() == before.keys()
    for name, kernel in before.items():
        place = name.removesuffix("kernel")
        if f"{place}lora_a" in averaged:
            product = np.float64(averaged[f"{place}lora_a"]) @ np.float64(averaged[f"{place}lora_b"])
            np.testing.assert_allclose(policy[name], kernel + 4 * product, atol=1e-5)
            assert np.abs(policy[name] - kernel).max() > 1e-3
        else:
            np.testing.assert_array_equal(policy[name], kernel)

    # The adapter, for PEFT; over the base it says what the merged policy says.
    lora, adapter = hub.load_adapter(done.workdir / "adapter", config)
    assert (lora.rank, lora.scale) == (2, 4.0)
    assert_same(flat(adapter), averaged)
    told = json.loads((done.workdir / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(world.model)
    tokens = jnp.arange(4, 12)[None]
    mask = jnp.ones_like(tokens, bool)
    adapted = Decoder(dataclasses.replace(config, lora_scale=lora.scale))
    with_adapter = adapted.apply({"params": overlay(base, adapter)}, tokens, mask)
    merged = Decoder(config).apply({"params": hub.load_params(done.workdir / "policy", config)}, tokens, mask)
    np.testing.assert_allclose(merged, with_adapter, atol=1e-4)

    # The critic: where it was, a run can begin.
    assert hub.load_value_head(done.workdir / "policy") is None
    settings = changed_settings(done.workdir, critic=str(done.workdir / "critic"))
    begun = jax.device_get(train_ppo.prepare(settings).state.params)
    assert_same(begun["critic"], done.state.params["critic"])
    assert_same(begun["value_head"], done.state.params["value_head"])
    assert np.any(begun["value_head"]["bias"])
    assert all(np.abs(x - before[name]).max() > 0 for name, x in flat(begun["critic"]).items())

    assert abs(done.results["before"]["kl"]) < 1e-4
    assert done.results["after"]["kl"] > 1e-3


def test_frozen_layers_stay_the_head_comes_back_and_texts_are_learned(run, tmp_path):
    """The lower layer has its bits, the value head beside the policy is what critic=model begins with; and the first
    auxiliary loss is the mean of the texts' tokens under the model that was given.
    """
    tokenizer = folders.word_tokenizer()
    config = folders.llama_config(len(tokenizer), num_layers=2)
    model = folders.make_folder(tmp_path / "model", tokenizer, config)
    texts = folders.write_jsonl(tmp_path / "texts.jsonl", [{"text": "the cat sat here ."}, {"text": "a good film"}] * 4)
    done = run(
        f"--config.model={model}", "--config.frozen_layers=1", f"--config.ptx_data={texts}",
        "--config.ppo.ptx_coef=0.5", "--config.ptx_length=8",
        "--config.ptx_batch_size=8", "--config.ppo.num_epochs=1", "--config.ppo.num_minibatches=1",
    )  # fmt: skip
    base = hub.load_params(model, config)
    before, policy = flat(base), flat(hub.load_params(done.workdir / "policy", config))
    trained = {name for name in before if name.startswith(("layer_1/", "final_norm/", "lm_head/"))}
    assert flat(done.state.params["decoder"]).keys() == trained
    assert {name for name in before if np.any(policy[name] != before[name])} == trained
    for name in trained:
        np.testing.assert_array_equal(policy[name], flat(done.state.params["decoder"])[name])
    assert not (done.workdir / "adapter").exists()
    assert not (done.workdir / "critic").exists()

    # All eight texts are in every batch: each token is predicted from those before it, and EOS at the end.
    losses = []
    for row in read_jsonl(texts)[:2]:
        ids = [*tokenizer(row["text"])["input_ids"], 2]
        ids = ids[ids[0] == ids[1] :]  # at most one BOS
        logits = np.float64(Decoder(config).apply({"params": base}, jnp.array([ids]), jnp.ones((1, len(ids)), bool))[0])
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append([-logprobs[t, ids[t + 1]] for t in range(len(ids) - 1)])
    expected = np.mean(np.concatenate(losses))
    assert done.rows[0]["policy/ptx_loss"] == pytest.approx(expected, abs=1e-4)
    assert done.rows[1]["policy/ptx_loss"] < expected  # lr 0.01: learned

    head = done.state.params["value_head"]
    settings = changed_settings(done.workdir, model=str(done.workdir / "policy"), critic="model")
    assert_same(jax.device_get(train_ppo.prepare(settings).state.params["value_head"]), head)
    assert np.any(head["kernel"])
    fresh = train_ppo.prepare(dataclasses.replace(settings, critic="")).state.params["value_head"]
    assert not np.any(fresh["kernel"])
    with pytest.raises(InputError, match=r"config.critic: got 'model', expected a value head beside the model, in "):
        train_ppo.prepare(dataclasses.replace(settings, model=str(model)))


def test_judges_are_weighted_gold_looks_on_and_a_token_ends_a_response(world, run):
    """Two responses to each prompt, two judges of which one is in JAX, a gold, and a token in the place of EOS."""
    done = run(
        f"--config.gold={world.root / 'judges.py'}:kind", "--config.truncate_token=.", "--config.ppo.truncate_after=2",
        "--config.ppo.missing_token_score=-3", "--config.ppo.min_new_tokens=6", "--config.ppo.responses_per_prompt=2",
        "--config.ppo.kl_coef=0", "--config.eval_prompts=4", "--config.ppo.lr=0.001",
        judge="FILE:kind*2, jax:FILE:length*-0.5", iterations=4,
    )  # fmt: skip
    prompts = [row["prompt"] for row in read_jsonl(world.prompts)][:20]
    (stop,) = load_tokenizer(world.model)(".", add_special_tokens=False)["input_ids"]
    cut = 0
    for i, (row, turn) in enumerate(zip(done.rows, done.turns, strict=True)):
        samples = done.samples[8 * i : 8 * i + 8]
        asked = [prompts[j] for j in batch_indices(20, 4, i, seed=0)]
        assert [one["prompt"] for one in samples] == [prompt for prompt in asked for _ in range(2)]
        assert len({one["response"] for one in samples}) > 4  # also those to one prompt differ
        kind = np.array([sum(word in folders.GOOD for word in one["response"].split()) / 4 for one in samples])
        tokens, mask = np.asarray(turn.experience.response_tokens), np.asarray(turn.experience.response_mask)
        score = 2 * kind - 0.5 * mask.sum(axis=1) / 6
        np.testing.assert_allclose([one["score"] for one in samples], score, atol=1e-6)
        assert row["objective/score"] == pytest.approx(score.mean(), abs=1e-6)
        assert row["score/kind"] == pytest.approx(kind.mean(), abs=1e-6)
        assert row["score/length"] == pytest.approx(mask.sum(axis=1).mean() / 6, abs=1e-6)
        assert row["objective/gold"] == pytest.approx(kind.mean(), abs=1e-6)
        # The first of those tokens from the third on ends it; EOS may not come in six tokens.
        ends = [next((t + 1 for t in range(2, 6) if row[t] == stop), None) for row in tokens]
        assert mask.sum(axis=1).tolist() == [end or 6 for end in ends]
        assert not np.any((tokens == 2) & mask)
        rewarded = np.where([end is None for end in ends], -3.0, score)
        assert row["objective/reward"] == pytest.approx(rewarded.mean(), abs=1e-5)
        assert row["objective/eos_frac"] == pytest.approx(np.mean([end is not None for end in ends]))
        cut += sum(end is not None for end in ends)
    assert 0 < cut < 8 * 4
    answers = read_jsonl(done.workdir / "responses.jsonl")
    assert [row["prompt"] for row in answers] == [prompt for prompt in prompts[:4] for _ in range(2)]
    for when in ("before", "after"):
        said = [sum(word in folders.GOOD for word in row[when].split()) / 4 for row in answers]
        assert done.results[when]["gold"] == pytest.approx(np.mean(said), abs=1e-6)
        assert done.results[when]["num_responses"] == 8


def test_scores_in_units_of_the_reference_and_a_policy_that_acts_ahead(world, run):
    """The moments are those of the reference's responses, before the first iteration, and stay; a response without the
    truncation token has the score for that among them; and each iteration learns from what the policy before the last
    update said.
    """
    (world.root / "notes.jsonl").unlink(missing_ok=True)
    done = run(
        "--config.ppo.score_scale=reference", "--config.reference_samples=12", "--config.truncate_token=.",
        "--config.ppo.stale_iterations=1", "--config.ppo.kl_coef=0", judge="FILE:noted", iterations=3,
    )  # fmt: skip
    calls = read_jsonl(world.root / "notes.jsonl")
    assert len(calls) == 2 + 3 + 2  # 12 samples are two batches; three iterations; eight prompts before and after

    def shaped(call):
        return np.where(["." in text for text in call["completions"]], call["scores"], -1.0)

    reference = np.concatenate([shaped(call) for call in calls[:2]])
    assert -1 in reference
    assert max(reference) > -1
    running = done.state.running
    assert running.score_count == 16
    np.testing.assert_allclose(running.score_mean, reference.mean(), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(running.score_m2 / 16), reference.std(), rtol=1e-4)

    prompts, tokenizer = [row["prompt"] for row in read_jsonl(world.prompts)], load_tokenizer(world.model)
    for i, (row, turn, call) in enumerate(zip(done.rows, done.turns, calls[2:5], strict=True)):
        expected = [prompts[j] for j in batch_indices(20, 8, i, seed=0)]
        assert call["prompts"] == expected
        tokens, mask = np.asarray(turn.experience.tokens[:, :8]), np.asarray(turn.experience.mask[:, :8])
        read = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask, strict=True)]
        assert read == expected
        rewards = (shaped(call) - reference.mean()) / reference.std()
        assert row["objective/reward"] == pytest.approx(rewards.mean(), abs=1e-3)
    # Iterations 0 and 1 learn from responses of the untrained policy, of which 1 is no longer the one that learns.
    kl, dev = ([row[name] for row in done.rows] for name in ("objective/kl", "policy/first_ratio_dev"))
    assert abs(kl[0]) < 1e-4
    assert abs(kl[1]) < 1e-4
    assert abs(kl[2]) > 1e-3
    assert dev[0] <= 1e-4
    assert min(dev[1:]) > 1e-3
    assert len(done.state.pending) == 1


def test_no_second_of_a_run_is_outside_its_iterations(monkeypatch):
    """What happens between two iterations counts to the second."""
    now = iter([10.0, 11.0, 14.0, 20.0, 20.5])
    monkeypatch.setattr(train_ppo, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = train_ppo.Stopwatch()
    clock.lap("time/host_s")
    clock.lap("time/program_s")
    assert clock.take() == {"time/host_s": 1.0, "time/program_s": 3.0}
    clock.lap("time/host_s")  # six seconds later: a checkpoint, say
    clock.lap("time/program_s")
    assert clock.take() == {"time/host_s": 6.0, "time/program_s": 0.5}
