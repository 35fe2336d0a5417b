"""A reward model as a judge: in the program and on text it says the same, and a run of PPO may have it either way."""

import dataclasses
import functools
import json
import re

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_ppo
from experiments.rollouts import batch_of
from experiments.settings import PPOExperiment
from ppo_jax import hub
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl
from ppo_jax.models import Decoder, ModelConfig, causal_mask, positions_of
from ppo_jax.rewards import call_reward, check_score, load_critic, load_host_reward, load_reward, model
from ppo_jax.rewards.model import load_scorer, make_model_score, make_text_score, with_eos
from ppo_jax.sharding import make_mesh, param_shardings
from ppo_jax.tokenizers import SpecialTokens, decode_responses, encode_prompt, load_tokenizer, special_tokens
from ppo_jax.types import Rollout

PAD, BOS, EOS, UNK = 0, 1, 2, 3
P, R = 6, 5


@pytest.fixture(scope="module")
def tokenizer():
    return folders.word_tokenizer()


def reward_params(config: ModelConfig, seed: int = 0):
    kernel = np.random.default_rng(seed).normal(size=(config.width, 1)).astype(np.float32)
    decoder = folders.random_params(config, seed)
    return {"decoder": {name: x for name, x in decoder.items() if name != "lm_head"}, "score_head": {"kernel": kernel}}


def save_judge(folder, tokenizer=None, config: ModelConfig | None = None, eos_ids=(EOS,), pad_id=PAD, seed: int = 7):
    """The folder of a random reward model."""
    tokenizer = folders.word_tokenizer() if tokenizer is None else tokenizer
    config = folders.llama_config(len(tokenizer), tie_embeddings=True) if config is None else config
    params = reward_params(config, seed)
    return hub.save_reward_model(folder, params, config, tokenizer, eos_ids=eos_ids, pad_id=pad_id)


def rollout_of(rows, prompt_length: int = P, response_length: int = R, pad_id: int = PAD) -> Rollout:
    """Rows of (prompt tokens, response tokens), padded left and right as `generate` does."""
    length = prompt_length + response_length
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for row, (prompt, response) in enumerate(rows):
        where = slice(prompt_length - len(prompt), prompt_length + len(response))
        tokens[row, where], mask[row, where] = [*prompt, *response], True
    nothing = jnp.zeros((len(rows), response_length))
    return Rollout(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), logprobs=nothing, values=nothing)


def random_rows(rng, num: int, ends=(EOS,), first: int = 4, last: int = 26):
    """Prompts that begin with BOS; responses of words that end with an EOS, or are as long as can be."""
    rows = []
    for _ in range(num):
        prompt = [BOS, *rng.integers(first, last, rng.integers(0, P))]
        response = list(rng.integers(first, last, rng.integers(0, R + 1)))
        rows.append((prompt, response if len(response) == R else [*response, rng.choice(ends)]))
    return rows


@functools.cache
def trunk(config: ModelConfig):
    """Hidden states of tokens `[n, S]` without any padding."""

    def apply(params, tokens):
        mask = jnp.ones(tokens.shape, bool)
        return Decoder(config).apply({"params": params}, tokens, positions_of(mask), causal_mask(mask), method="trunk")

    return jax.jit(apply)


def by_hand(config: ModelConfig, params, texts, place: int = -1) -> np.ndarray:
    """The trunk's state at one token of each text (the last one), times the head.

    Texts stand at the left; what stands after them is no padding, and comes too late to matter.
    """
    tokens = np.array([[*ids, *[4] * (config.max_positions - len(ids))] for ids in texts], np.int32)
    hidden = np.asarray(trunk(config)(params["decoder"], jnp.asarray(tokens))[0], np.float64)
    read = np.array([states[len(ids) + place] for states, ids in zip(hidden, texts, strict=True)])
    return read @ np.float64(params["score_head"]["kernel"])[:, 0]


# EOS after each response


@pytest.mark.parametrize("pad_id", [PAD, EOS], ids=["pad", "pad is eos"])
def test_every_text_ends_with_eos_once(rng, pad_id):
    special = SpecialTokens(pad_id, (EOS, 26))
    rows = [*random_rows(rng, 30), ([BOS], [EOS]), ([BOS, 5], [8] * R), ([EOS] * P, [EOS]), ([5], [8] * (R - 1))]
    rollout = rollout_of(rows, pad_id=pad_id)
    tokens, mask = jax.jit(with_eos, static_argnums=1)(rollout, special)
    assert tokens.shape == mask.shape == (len(rows), P + R + 1)
    for row, (prompt, response) in enumerate(rows):
        ended = response[-1] == EOS
        expected = [*prompt, *response] if ended else [*prompt, *response, EOS]
        real = np.asarray(mask[row])
        assert np.asarray(tokens[row])[real].tolist() == expected
        # In one piece, begun where it was; what is not real is padding.
        (slots,) = np.nonzero(real)
        assert slots.tolist() == list(range(P - len(prompt), P + len(response) + (not ended)))
        assert np.all(np.asarray(tokens[row])[~real] == pad_id)


def test_an_end_of_another_kind_becomes_the_one_that_the_reward_model_knows():
    """A chat model has several; a reward model has read one, which encoding puts after every text."""
    rollout = rollout_of([([BOS, 5], [8, 7]), ([BOS, 5], [7]), ([BOS, 5], [8, 9, 10, 11, 7])])
    tokens, mask = with_eos(rollout, SpecialTokens(PAD, (EOS, 7)))
    texts = [np.asarray(row)[np.asarray(real)].tolist() for row, real in zip(tokens, mask, strict=True)]
    assert texts == [[BOS, 5, 8, EOS], [BOS, 5, EOS], [BOS, 5, 8, 9, 10, 11, EOS]]


# Scores of rollouts and of texts


@pytest.mark.parametrize("family", [folders.llama_config, folders.gpt2_config], ids=["llama", "gpt2"])
def test_the_score_of_a_rollout_is_that_of_its_texts_alone(rng, family):
    config = family(26, tie_embeddings=True)
    params, rows = reward_params(config, int(rng.integers(2**31))), random_rows(rng, 6)
    scores = jax.jit(make_model_score(config, SpecialTokens(PAD, (EOS,))))(params, rollout_of(rows))
    assert scores.shape == (6,)
    assert scores.dtype == jnp.float32
    texts = [[*prompt, *response] if response[-1] == EOS else [*prompt, *response, EOS] for prompt, response in rows]
    np.testing.assert_allclose(scores, by_hand(config, params, texts), atol=1e-5)


@pytest.mark.parametrize(("rows", "parts"), [(6, 3), (8, 4), (7, 1), (3, 1), (2, 1)])
def test_many_rollouts_are_read_a_part_at_a_time(rng, monkeypatch, rows, parts):
    """Of two rows at most a device, where their number can be divided so."""
    monkeypatch.setattr(model, "_ROWS", 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = folders.llama_config(26, tie_embeddings=True)
    params, texts = reward_params(config, int(rng.integers(2**31))), random_rows(rng, rows)
    score, rollout = make_model_score(config, SpecialTokens(PAD, (EOS,))), rollout_of(texts)
    whole = [[*prompt, *response] if response[-1] == EOS else [*prompt, *response, EOS] for prompt, response in texts]
    np.testing.assert_allclose(score(params, rollout), by_hand(config, params, whole), atol=1e-5)
    program = str(jax.make_jaxpr(score)(params, rollout))
    assert f"f32[{rows // parts},{rollout.tokens.shape[1] + 1},{config.width}]" in program


def test_where_pad_is_eos_the_score_is_read_before_it(rng):
    """As in transformers, where the token that pads never counts."""
    config = folders.gpt2_config(26, tie_embeddings=True)
    params, rows = reward_params(config, int(rng.integers(2**31))), random_rows(rng, 4)
    scores = make_model_score(config, SpecialTokens(EOS, (EOS,)))(params, rollout_of(rows, pad_id=EOS))
    texts = [[*prompt, *response] if response[-1] == EOS else [*prompt, *response, EOS] for prompt, response in rows]
    np.testing.assert_allclose(scores, by_hand(config, params, texts, place=-2), atol=1e-5)


def text_of(rng, num: int) -> str:
    return " ".join(rng.choice(folders.WORDS, num))


def test_the_score_of_texts_is_that_of_their_tokens(rng, tokenizer):
    config = folders.llama_config(26, tie_embeddings=True, max_positions=80)
    params, special = reward_params(config, int(rng.integers(2**31))), SpecialTokens(PAD, (EOS, 7))
    score = make_text_score(config, params, tokenizer, special)
    # More than one call of 32, of texts in no order; several lengths of programs.
    prompts, responses = ([text_of(rng, rng.integers(1, 7)) for _ in range(40)] for _ in range(2))
    responses[3], responses[35] = text_of(rng, 33), ""
    scores = score(prompts, [" " + text for text in responses], number=list(range(40)))
    assert all(type(x) is float for x in scores)
    vocabulary = tokenizer.get_vocab()
    for i in (0, 3, 31, 32, 35, 39):
        ids = [BOS, *(vocabulary["▁" + word] for word in f"{prompts[i]} {responses[i]}".split())]
        if not responses[i]:
            ids.append(vocabulary.get("▁", UNK))  # the space
        np.testing.assert_allclose(scores[i], by_hand(config, params, [[*ids, EOS]]), atol=1e-5)


def test_nothing_has_no_scores(tokenizer):
    config = folders.llama_config(26, tie_embeddings=True)
    score = make_text_score(config, reward_params(config), tokenizer, SpecialTokens(PAD, (EOS,)))
    assert score([], []) == []
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score(["the cat"], [])


def test_a_text_longer_than_the_model_loses_its_beginning(rng, tokenizer):
    config = folders.gpt2_config(26, tie_embeddings=True, max_positions=12)
    params = reward_params(config)
    score = make_text_score(config, params, tokenizer, SpecialTokens(PAD, (EOS,)))
    end = text_of(rng, 11)
    long, longer = score([text_of(rng, 5), text_of(rng, 50)], [" " + end] * 2)
    assert long == longer
    ids = [tokenizer.get_vocab()["▁" + word] for word in end.split()]
    np.testing.assert_allclose(long, by_hand(config, params, [[*ids, EOS]]), atol=1e-5)


# Found by its folder


@pytest.mark.parametrize("eos_ids", [(EOS,), (EOS, 25)], ids=["one end", "two ends"])
def test_a_model_with_the_policys_tokenizer_judges_in_the_program_what_it_judges_as_text(rng, tmp_path, eos_ids):
    tokenizer = folders.word_tokenizer()
    if len(eos_ids) > 1:
        tokenizer.add_special_tokens({"additional_special_tokens": ["▁,"]})  # token 25, which ends a turn
    spec = f"model:{save_judge(tmp_path / 'judge', tokenizer)}"
    special = SpecialTokens(PAD, eos_ids)
    judges, host = load_reward(spec, tokenizer, special), load_host_reward(spec)
    rows = random_rows(rng, 40, ends=eos_ids, last=25)
    rollout = rollout_of(rows)
    prompts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt, _ in rows]
    texts = decode_responses(tokenizer, np.asarray(rollout.tokens), np.asarray(rollout.mask), R)
    scores = jax.jit(judges.score)(judges.params, rollout).total
    here = [i for i, prompt in enumerate(prompts) if prompt]
    np.testing.assert_allclose(np.asarray(scores)[here], np.asarray(host(prompts, texts))[here], atol=1e-5)
    assert np.std(scores) > 0.1


def test_an_end_that_was_chosen_for_the_policy_is_none_of_the_reward_models(tmp_path):
    """With config.eos_token the policy stops at another token; the texts were judged with the reward model's own."""
    spec = f"model:{save_judge(tmp_path / 'judge')}"
    policys = folders.word_tokenizer()
    special = special_tokens(policys, eos_token="▁.")
    judges, host = load_reward(spec, policys, special), load_host_reward(spec)
    rollout = rollout_of([([BOS, 5, 6], [8, 9, *special.eos_ids]), ([BOS, 5, 6], [8] * R)])
    texts = decode_responses(policys, np.asarray(rollout.tokens), np.asarray(rollout.mask), R)
    expected = host([policys.decode([5, 6])] * 2, texts)
    np.testing.assert_allclose(judges.score(judges.params, rollout).total, expected, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        folders.word_tokenizer(reversed(folders.WORDS)),
        folders.word_tokenizer([*folders.WORDS, "more"]),
        folders.word_tokenizer(bos=False),
    ],
    ids=["other ids", "one more", "no bos"],
)
def test_a_model_with_a_tokenizer_of_its_own_judges_text(tmp_path, tokenizer, other):
    spec = f"model:{save_judge(tmp_path / 'judge', other)}"
    judges = load_reward(spec, tokenizer, SpecialTokens(PAD, (EOS,)))
    assert (judges.score, judges.params) == (None, ((),))
    texts = ["the cat", "a film"], [" was good", " sat"]
    scores = judges.judge(*texts, [{}, {}], rollout_of([([5], [6]), ([7], [8])])).total
    np.testing.assert_array_equal(scores, np.float32(load_host_reward(spec)(*texts)))
    config, params, _, _ = load_scorer(tmp_path / "judge")
    ids = encode_prompt(other, "the cat was good")
    np.testing.assert_allclose(scores[0], by_hand(config, params, [[*ids, EOS]])[0], atol=1e-5)


def test_two_models_of_which_one_reads_text(rng, tmp_path, tokenizer):
    """The one with the policy's tokenizer reads the tokens, on all devices; the other one and VADER read the words."""
    other = folders.word_tokenizer(reversed(folders.WORDS))
    same, apart = (save_judge(tmp_path / name, one) for name, one in (("same", tokenizer), ("apart", other)))
    judges = load_reward(f"model:{same}*0.5,model:{apart}*-2,vader", tokenizer, SpecialTokens(PAD, (EOS,)))
    assert judges.score is None
    assert judges.names == ("same", "apart", "vader")
    mesh = make_mesh(2, 2, 2)
    judges = judges._replace(params=jax.device_put(judges.params, param_shardings(mesh, judges.params)))
    kernel = judges.params[0]["decoder"]["layer_0"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    rows = random_rows(rng, 8)
    rollout = rollout_of([([BOS, 5], response) for _, response in rows])
    prompt = tokenizer.decode([5])
    texts = decode_responses(tokenizer, np.asarray(rollout.tokens), np.asarray(rollout.mask), R)
    scores = judges.judge([prompt] * 8, texts, [{}] * 8, rollout)
    said = {name: np.array(load_host_reward(spec)([prompt] * 8, texts)) for name, spec in (
        ("same", f"model:{same}"), ("apart", f"model:{apart}"), ("vader", "vader")
    )}  # fmt: skip
    for name in said:
        np.testing.assert_allclose(scores.parts[name], said[name], atol=1e-5)
    np.testing.assert_allclose(scores.total, 0.5 * said["same"] - 2 * said["apart"] + said["vader"], atol=1e-5)


def test_without_the_policys_ends_a_model_judges_text(tmp_path, tokenizer):
    """Who asks for a judge of text gets one, whatever its tokenizer."""
    spec = f"model:{save_judge(tmp_path / 'judge')}"
    assert load_reward(spec, tokenizer).members[0].host is not None
    scores = call_reward(load_host_reward(spec), ["the cat"] * 3, [" sat", " was bad", ""], [{"label": 1}] * 3)
    assert scores.shape == (3,)
    assert len(set(scores.tolist())) == 3


def test_the_folder_says_what_pads_and_what_ends(tmp_path):
    borrowed = folders.word_tokenizer(special={"eos_token": "</s>", "unk_token": "<unk>"})
    folder = save_judge(tmp_path / "judge", borrowed, eos_ids=(EOS, 9), pad_id=5)
    config, params, tokenizer, special = load_scorer(folder)
    assert special == SpecialTokens(5, (EOS, 9))
    assert config.tie_embeddings
    assert params.keys() == {"decoder", "score_head"}
    assert tokenizer("the cat")["input_ids"] == borrowed("the cat")["input_ids"]
    # A folder of others may not name its pad token in config.json: then the tokenizer's rule does.
    settings = json.loads((folder / "config.json").read_text())
    del settings["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_scorer(folder)[3] == SpecialTokens(UNK, (EOS, 9))


def bare(root):
    folder = save_judge(root / "bare")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


def two_labels(root):
    folder = save_judge(root / "two")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "num_labels": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


REFUSED = {
    "nothing": (lambda root: "", "model ''"),
    "no folder": (lambda root: "./nowhere", "'./nowhere': no such folder"),
    "a file": (lambda root: __file__, "is a file, expected a folder"),
    "a language model": (lambda root: folders.make_folder(root / "lm"), "score"),
    "no tokenizer": (bare, "tokenizer: cannot load one from"),
    "two labels": (two_labels, "label"),
    "no end": (
        lambda root: save_judge(root / "no_end", folders.word_tokenizer(special={"pad_token": "<pad>"})), "no EOS token"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_reward_model_is_told_in_one_line(tmp_path, tokenizer, name):
    make, told = REFUSED[name]
    spec = f"model:{make(tmp_path)}"
    for load in (lambda: load_reward(spec, tokenizer, SpecialTokens(PAD, (EOS,))), lambda: load_host_reward(spec)):
        with pytest.raises(InputError, match=re.escape(told)) as error:
            load()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["jax:rewards.py:score_good", "jax:"])
def test_a_score_of_tokens_is_no_judge_of_texts(spec):
    with pytest.raises(InputError, match=f"reward: got '{spec}', expected one that judges text"):
        load_host_reward(spec)


def test_a_score_is_tried_on_shapes_before_the_start(tmp_path, tokenizer):
    special = SpecialTokens(PAD, (EOS,))
    config = folders.gpt2_config(26, tie_embeddings=True, max_positions=12)
    spec = f"model:{save_judge(tmp_path / 'judge', config=config)}"
    judges = load_reward(f"vader,{spec}", tokenizer, special)
    assert check_score(spec, judges, 8, 6, 5).parts["judge"].shape == (8,)  # 11 tokens and EOS
    with pytest.raises(InputError, match=rf"config.reward: {spec}: .*got 13 tokens.*at most the model's 12 positions"):
        check_score(spec, judges, 8, 6, 6)


# Whole runs


class Judges:
    """A policy that says words and EOS only, so that its texts say all; two reward models, of which one has a tokenizer
    of its own, and one of the policy's shape; gold.
    """

    def __init__(self, root):
        tokenizer = folders.word_tokenizer()
        config = folders.gpt2_config(len(tokenizer))
        params = folders.random_params(config)
        # The state before the projection gets a common part that the tokens without text are turned away from.
        apart = np.full(config.width, 1.0, np.float32)
        params["final_norm"]["bias"] = 2 * apart
        params["embed"]["embedding"] = np.array(params["embed"]["embedding"])
        params["embed"]["embedding"][[PAD, BOS, UNK]] -= apart
        self.world = folders.make_world(root)
        self.policy = hub.save(root / "policy", params, config, tokenizer)
        shape = folders.gpt2_config(len(tokenizer), tie_embeddings=True)
        self.same = save_judge(root / "same", tokenizer, shape)
        other = folders.word_tokenizer(reversed(folders.WORDS))
        self.other = save_judge(root / "other", other, folders.llama_config(len(other), tie_embeddings=True))
        self.gold = f"{root / 'rewards.py'}:count_good"

    def flags(self, workdir, reward, *changes: str) -> list[str]:
        """All responses stand in samples.jsonl."""
        changes = (f"--config.reward=model:{reward}", "--config.num_samples=8", "--config.samples_every=1", *changes)
        return self.world.flags(f"--config.model={self.policy}", f"--workdir={workdir}", *changes)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    return Judges(tmp_path_factory.mktemp("judges"))


PREPARE = folders.remember_programs(train_ppo.prepare)


@pytest.fixture
def start(capsys):
    """Runs the command line of `train_ppo.py`."""

    def run(flags):
        outcome = folders.call_script(train_ppo, PPOExperiment, flags, capsys)
        assert (outcome.status, outcome.err) == (0, "")
        return outcome

    return run


def check_scores(workdir, host) -> None:
    """Every score of a run is what the judge says of the text."""
    rows = read_jsonl(workdir / "samples.jsonl")
    assert len(rows) == 4 * 8
    expected = host([row["prompt"] for row in rows], [row["response"] for row in rows])
    np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-5)
    assert np.std(expected) > 0.1
    metrics = [row["objective/score"] for row in read_jsonl(workdir / "metrics.jsonl")]
    np.testing.assert_allclose(metrics, np.reshape(expected, (4, 8)).mean(axis=1), atol=1e-5)
    results, answers = json.loads((workdir / "results.json").read_text()), read_jsonl(workdir / "responses.jsonl")
    for when in ("before", "after"):
        said = host([row["prompt"] for row in answers], [row[when] for row in answers])
        assert abs(results[when]["score"] - np.mean(said)) < 1e-5


def test_ppo_against_a_reward_model_in_the_program_and_a_gold_that_only_looks_on(judges, tmp_path, start, monkeypatch):
    monkeypatch.setattr(train_ppo, "prepare", PREPARE)  # one program for both runs
    alone, watched = tmp_path / "alone", tmp_path / "watched"
    start(judges.flags(alone, judges.same))
    start(judges.flags(watched, judges.same, f"--config.gold={judges.gold}"))
    check_scores(alone, load_host_reward(f"model:{judges.same}"))
    rows = read_jsonl(alone / "metrics.jsonl")
    assert all("time/program_s" in row and "objective/gold" not in row for row in rows)
    assert all(row["policy/first_ratio_dev"] <= 1e-4 for row in rows)

    # With the gold: the same bits, and its mean.
    assert folders.bits(folders.saved_state(watched)) == folders.bits(folders.saved_state(alone))
    for name in ("samples.jsonl", "responses.jsonl"):
        assert (watched / name).read_text() == (alone / name).read_text()
    watched_rows = folders.without_time(watched / "metrics.jsonl")
    gold = [row.pop("objective/gold") for row in watched_rows]
    assert watched_rows == folders.without_time(alone / "metrics.jsonl")
    texts = [row["response"] for row in read_jsonl(watched / "samples.jsonl")]
    judged = [sum(word in folders.GOOD for word in text.split()) / 4 for text in texts]
    np.testing.assert_allclose(gold, np.reshape(judged, (4, 8)).mean(axis=1), rtol=1e-6)
    assert np.std(gold) > 0
    results = [json.loads((folder / "results.json").read_text()) for folder in (alone, watched)]
    answers = read_jsonl(watched / "responses.jsonl")
    for when in ("before", "after"):
        assert "gold" not in results[0][when]
        said = [sum(word in folders.GOOD for word in row[when].split()) / 4 for row in answers]
        assert results[1][when]["gold"] == pytest.approx(np.mean(said))
    assert "gold" not in (alone / "results.md").read_text()
    assert "| gold" in (watched / "results.md").read_text()


def test_ppo_against_a_reward_model_with_a_tokenizer_of_its_own(judges, tmp_path, start):
    start(judges.flags(tmp_path / "run", judges.other))
    check_scores(tmp_path / "run", load_host_reward(f"model:{judges.other}"))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all("time/score_s" in row and "time/program_s" not in row for row in rows)


# The critic


def test_a_critic_from_the_reward_model(judges, tmp_path, start, monkeypatch):
    """Its first values are the reward model's scores of every beginning of a response; it learns; it comes back."""
    prepare = folders.remember_programs(train_ppo.prepare)
    monkeypatch.setattr(train_ppo, "prepare", prepare)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = judges.flags(whole, judges.same, "--config.critic=reward")
    start(flags)
    rows = read_jsonl(whole / "metrics.jsonl")
    assert all(0 <= row["policy/first_ratio_dev"] <= 1e-4 for row in rows)
    assert all(abs(row["policy/first_approx_kl"]) <= 1e-8 for row in rows)
    assert abs(rows[0]["objective/kl"]) < 1e-4

    settings = json.loads((whole / "config.json").read_text())
    parts_of = {name: type(getattr(PPOExperiment(), name))(**x) for name, x in settings.items() if isinstance(x, dict)}
    setup = prepare(PPOExperiment(**settings | parts_of))
    check_first_values(setup, judges.same)
    trained = folders.saved_state(whole).params
    before = setup.state.params
    assert trained.keys() == before.keys() == {"decoder", "value_head", "critic"}
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), trained, jax.device_get(before))
    assert all(x > 0 for x in jax.tree.leaves(moved))

    # The policy that is exported is the decoder alone.
    config = hub.load_config(whole / "policy")
    exported = hub.load_params(whole / "policy", config)
    jax.tree.map(np.testing.assert_array_equal, exported, jax.device_get(trained["decoder"]))

    # In parts: the same bits.
    flags = judges.flags(parts, judges.same, "--config.critic=reward")
    for iterations in (1, 3, 4):
        start([*flags, f"--config.num_iterations={iterations}"])
    assert folders.bits(folders.saved_state(parts)) == folders.bits(folders.saved_state(whole))
    assert folders.without_time(parts / "metrics.jsonl") == folders.without_time(whole / "metrics.jsonl")


def check_first_values(setup, folder) -> None:
    """Value t is the score of the prompt and the first t tokens, read without padding and without an EOS."""
    config, params = hub.load_reward_model(folder)
    rollout = setup.step.act(setup.state, setup.ref_params, batch_of(setup, setup.prompts, np.arange(8)))
    tokens, mask, values = (np.asarray(x) for x in (rollout.tokens, rollout.mask, rollout.values))
    here = np.asarray(rollout.response_mask)
    states = [tokens[row, : 8 + t][mask[row, : 8 + t]] for row, t in np.argwhere(here)]
    scores = by_hand(config, params, states)
    np.testing.assert_allclose(values[here], scores, atol=1e-5)
    assert np.std(scores) > 0.1
    assert np.all(values[~here] == 0)


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_critic_from_a_reward_model_by_its_folder_or_by_the_judge(judges):
    policy, tokenizer = hub.load_config(judges.policy), load_tokenizer(judges.policy)
    loaded = hub.load_reward_model(judges.same)[1]
    head = loaded["score_head"] | {"bias": np.zeros(1, np.float32)}
    expected = {"critic": loaded["decoder"], "value_head": head}
    assert np.any(head["kernel"])
    assert_same(load_critic(str(judges.same), "vader", policy, tokenizer, {}), expected)
    reward = f"vader*0.1,model:{judges.same}*-2"
    assert_same(load_critic("reward", reward, policy, tokenizer, {}), expected)
    # What is the policy's own does not count: its projection onto words, its adapter, how it is trained.
    policy = dataclasses.replace(policy, lora_scale=2.0, tie_embeddings=False, remat="none")
    assert_same(load_critic(str(judges.same), "vader", policy, tokenizer, {}), expected)
    # One that would read the policy's tokens as other words.
    other = folders.word_tokenizer(reversed(folders.WORDS))
    with pytest.raises(InputError, match=r"config.critic: got .*, expected a reward model with the policy's tokenizer"):
        load_critic(str(judges.same), "vader", policy, other, {})
    told = r"config.reward: got .*, expected model:FOLDER, with critic=reward, and no second one"
    for none_or_two in ("vader", f"model:{judges.same},model:{judges.other}"):
        with pytest.raises(InputError, match=told):
            load_critic("reward", none_or_two, policy, tokenizer, {})


def test_a_critic_from_the_policy_is_a_copy_of_its_trunk(judges):
    policy, tokenizer = hub.load_config(judges.policy), load_tokenizer(judges.policy)
    decoder = jax.tree.map(jnp.asarray, hub.load_params(judges.policy, policy))
    decoder["lm_head"] = {"kernel": jnp.ones((policy.width, policy.vocab_size))}
    critic = load_critic("policy", "vader", policy, tokenizer, decoder)
    del decoder["lm_head"]
    zeros = {"kernel": np.zeros((policy.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    assert_same(critic, {"critic": decoder, "value_head": zeros})
    kept = jax.device_get(decoder)
    jax.tree.map(lambda x: x.delete(), critic)  # as a train step does with what it is given
    assert_same(decoder, kept)


def test_a_critic_that_was_saved_comes_back_with_its_head(judges, tmp_path, rng):
    policy, tokenizer = hub.load_config(judges.policy), load_tokenizer(judges.policy)
    critic = load_critic(str(judges.same), "vader", policy, tokenizer, {})
    trained = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), critic)
    model = {"decoder": trained["critic"], "score_head": {"kernel": trained["value_head"]["kernel"]}}
    shape = dataclasses.replace(policy, tie_embeddings=True)
    hub.save_reward_model(tmp_path / "critic", model, shape, tokenizer, eos_ids=(EOS,), pad_id=PAD)
    hub.save_value_head(tmp_path / "critic", trained["value_head"])
    assert_same(load_critic(str(tmp_path / "critic"), "vader", policy, tokenizer, {}), trained)
    assert trained["value_head"]["bias"] != 0


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_critic_has_the_policys_precision_and_a_head_of_full(judges, param_dtype):
    policy = hub.load_config(judges.policy, dtype="bfloat16", param_dtype=param_dtype)
    critic = load_critic(str(judges.same), "vader", policy, load_tokenizer(judges.policy), {})
    assert {str(x.dtype) for x in jax.tree.leaves(critic["critic"])} == {param_dtype}
    assert {str(x.dtype) for x in jax.tree.leaves(critic["value_head"])} == {"float32"}


def test_a_critic_that_does_not_fit_is_refused(judges, tmp_path, capsys):
    def error(*changes, reward=judges.same):
        flags = [*judges.flags(tmp_path / "run", reward), *changes]
        told = folders.call_script(train_ppo, PPOExperiment, flags, capsys).error()
        assert not (tmp_path / "run").exists()
        return told

    told = error(f"--config.critic={judges.other}")
    assert "config.critic" in told
    assert "expected a reward model of the policy's shape; it has " in told
    assert "positions=rotary" in told
    assert "vocab_size" not in told
    assert "no such folder" in error("--config.critic=./nowhere")
    assert "score" in error(f"--config.critic={judges.policy}")  # a language model
    told = error("--config.critic=reward", f"--config.reward={judges.gold}")
    assert f"config.reward: got '{judges.gold}', expected model:FOLDER, with critic=reward" in told
    assert "no such folder" in error("--config.reward=model:./nowhere")
    assert "expected one that judges text" in error(f"--config.gold=jax:{judges.world.rewards}:score_good")
    assert "no function 'nobody'" in error(f"--config.gold={judges.world.rewards}:nobody")
