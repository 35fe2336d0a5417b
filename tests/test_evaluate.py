"""Evaluating a policy: from the command line to the last file, with every kind of judge, and what is refused."""

import functools
import json
import sys
from typing import ClassVar

import folders
import numpy as np
import pytest

from experiments import evaluate
from experiments.prompts import fit
from experiments.responses import Responder
from experiments.settings import EvaluateExperiment
from ppo_jax import hub
from ppo_jax.evaluation import ROUGE_TYPES, bleu, bootstrap_interval, rouge, win_rate
from ppo_jax.feedback.store import Store
from ppo_jax.metrics import read_jsonl

CONFIG = folders.ROOT / "experiments" / "configs" / "evaluate.py"
KEYS = {"policy", "against", "win_rate", "bleu", "rouge1", "rouge2", "rougeL", "num_prompts"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two policies, prompts with and without references, judges."""
    root = tmp_path_factory.mktemp("world")
    (root / "rewards.py").write_text(folders.REWARDS)
    folders.make_folder(root / "new")
    folders.make_folder(root / "old", seed=1)
    rows = folders.prompt_rows()
    folders.write_jsonl(root / "prompts.jsonl", rows)
    folders.write_jsonl(root / "answered.jsonl", [row | {"completion": " a good film was here"} for row in rows])
    return root


@pytest.fixture
def start(world, capsys):
    """Runs the command line with settings by name."""

    def run(workdir, **settings):
        fields = {
            "policy": world / "new", "prompts": world / "prompts.jsonl", "judge": f"{world}/rewards.py:count_good",
            "prompt_length": 8, "response_length": 6, "batch_size": 8,
        } | settings  # fmt: skip
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        return folders.call_script(
            evaluate, EvaluateExperiment, [f"--config={CONFIG}", f"--workdir={workdir}", *flags], capsys
        )

    return run


@pytest.fixture
def compiled(monkeypatch):
    """The models of a script's start, to be asked once more: `compiled(model, prompt_length)`."""
    monkeypatch.setattr(evaluate, "Responder", functools.cache(Responder))

    def responder(model, prompt_length):
        settings = EvaluateExperiment(prompt_length=prompt_length, response_length=6, batch_size=8)
        return evaluate.make_responder(settings, str(model))

    return responder


class Scripted:
    """In the place of a `Responder`: policies whose responses are known, so that nothing is compiled."""

    asked: ClassVar[list[str]] = []

    def __init__(self, model: str, *_, **__):
        self.model = model

    def respond(self, prompts, num_responses=1, seed=0):
        Scripted.asked.append(self.model)
        if self.model.endswith("new"):  # better at every third, equal at every third, worse at every third
            return [[(" good", " the", " bad")[i % 3] + f" cat {i}"] for i in range(len(prompts))]
        return [[f" the cat {i}"] for i in range(len(prompts))]


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(evaluate, "Responder", Scripted)
    Scripted.asked.clear()
    return Scripted.asked


def results_of(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == KEYS
    return results


def good(text: str) -> float:
    """The words of `count_good`, counted once more."""
    return len([word for word in text.split() if word in folders.GOOD]) / 4


# Whole runs


def test_one_policy_against_another(world, tmp_path, start, compiled):
    run = tmp_path / "deep" / "run"
    outcome = start(run, against=world / "old", prompts=world / "answered.jsonl")
    assert (outcome.status, outcome.err) == (0, "")
    assert set(folders.contents(run)) == {"config.json", "responses.jsonl", "results.json", "results.md"}

    rows = read_jsonl(run / "responses.jsonl")
    prompts = [row["prompt"] for row in folders.prompt_rows()]
    assert [row["prompt"] for row in rows] == prompts
    for side, name in (("policy", "new"), ("against", "old")):
        assert [[row[side]] for row in rows] == compiled(world / name, 8).respond(prompts)
        assert [row[f"score_{side}"] for row in rows] == [good(row[side]) for row in rows]

    results, scores = results_of(run), {side: [good(row[side]) for row in rows] for side in ("policy", "against")}
    for side in scores:
        assert results[side]["score"] == pytest.approx(np.mean(scores[side]))
        assert (results[side]["score_low"], results[side]["score_high"]) == bootstrap_interval(scores[side])
        assert results[side]["length"] == pytest.approx(np.mean([len(row[side].split()) for row in rows]))
    assert results["win_rate"] == win_rate(scores["policy"], scores["against"])._asdict()
    assert results["num_prompts"] == 20
    responses, references = [row["policy"] for row in rows], [[" a good film was here"]] * 20
    assert results["bleu"] == bleu(responses, references).score
    assert {name: results[name] for name in ROUGE_TYPES} == rouge(responses, references)
    assert results["rouge1"] > 0
    check_page(run, outcome.out, results)
    check_second_start(world, run, start)


def check_page(run, out: str, results) -> None:
    page = (run / "results.md").read_text()
    assert page.strip() in out
    assert "prompts: 20 of at most 8 tokens (0 dropped, 0 cut)" in out
    assert f"{results['policy']['score']:.3f}" in page
    assert f"Win rate of the policy: {results['win_rate']['rate']:.3f}" in page
    assert f"BLEU {results['bleu']:.2f} (nrefs:1|" in page
    difference = results["policy"]["score"] - results["against"]["score"]
    assert f"| difference | {difference:.3f} | " in page


def check_second_start(world, run, start) -> None:
    before = folders.contents(run)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_responder", "load_judge", "read_data"):
            patch.setattr(evaluate, name, lambda *_: pytest.fail("it works again"))
        outcome = start(run, against=world / "old", prompts=world / "answered.jsonl")
        assert (outcome.status, outcome.err) == (0, "")
        assert (run / "results.md").read_text().strip() in outcome.out
        refused = start(run, against=world / "old", prompts=world / "answered.jsonl", seed=1)
    assert "seed was 0 and is 1" in refused.error()
    assert folders.contents(run) == before


def test_a_policy_alone(tmp_path, start, scripted):
    assert start(tmp_path / "run").status == 0
    results = results_of(tmp_path / "run")
    assert results["policy"]["score"] == pytest.approx(7 / 20 / 4)  # 0, 3, ..., 18 are good
    assert {results[key] for key in KEYS - {"policy", "num_prompts"}} == {None}
    assert [set(row) for row in read_jsonl(tmp_path / "run" / "responses.jsonl")] == [
        {"prompt", "policy", "score_policy"}
    ] * 20
    page = (tmp_path / "run" / "results.md").read_text()
    assert "against" not in page
    assert "difference" not in page


def test_against_references(world, tmp_path, start, scripted):
    """Several references: the first one is compared with, all of them count for ROUGE."""
    references = [[" the cat", f" bad cat {i}"] for i in range(6)]
    path = folders.write_jsonl(
        tmp_path / "p.jsonl",
        [{"prompt": f"the cat {i % 3}", "references": texts} for i, texts in enumerate(references)],
    )
    assert start(tmp_path / "run", against="references", prompts=path).status == 0
    assert scripted == [str(world / "new")]
    results = results_of(tmp_path / "run")
    # "good cat i" wins, "the cat i" and "bad cat i" are ties with "the cat", which has no good word
    assert {key: results["win_rate"][key] for key in ("wins", "losses", "ties", "rate")} == {
        "wins": 2, "losses": 0, "ties": 4, "rate": pytest.approx(4 / 6),
    }  # fmt: skip
    # Words in common. "good cat i": 2 of 3 with "bad cat i"; "the cat i": 2 of 3 and 2, so F = 4/5; "bad cat i": all.
    assert results["rouge1"] == pytest.approx((2 / 3 + 4 / 5 + 1) / 3)
    rows = read_jsonl(tmp_path / "run" / "responses.jsonl")
    assert [row["against"] for row in rows] == [" the cat"] * 6
    assert [row["references"] for row in rows] == references


def test_chat_prompts(tmp_path, start, compiled):
    """The judge reads what the policy's template makes of a conversation, its answer at the end is the reference."""
    tokenizer = folders.word_tokenizer((*folders.WORDS, "user", "bot", ":", "assistant"))
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    model = folders.make_folder(tmp_path / "model", tokenizer)
    said = [f"the {word} cat" for word in ("old", "good", "dull")]
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a good film"}] for text in said]
    path = folders.write_jsonl(tmp_path / "p.jsonl", [{"messages": messages} for messages in turns])
    outcome = start(tmp_path / "run", policy=model, prompts=path, prompt_length=12)
    assert (outcome.status, outcome.err) == (0, "")
    rows = read_jsonl(tmp_path / "run" / "responses.jsonl")
    assert [row["prompt"] for row in rows] == [f"user : {text} . bot :" for text in said]
    assert [row["references"] for row in rows] == [["a good film"]] * 3
    assert [[row["policy"]] for row in rows] == compiled(model, 12).respond([messages[:1] for messages in turns])


def test_a_reward_model_judges(world, tmp_path, start, scripted, rng, seed):
    tokenizer = folders.word_tokenizer()
    config = folders.llama_config(len(tokenizer), tie_embeddings=True)
    head = {"kernel": rng.normal(size=(config.width, 1)).astype(np.float32)}
    params = {"decoder": folders.random_params(config, seed), "score_head": head}
    folder = hub.save_reward_model(tmp_path / "judge", params, config, tokenizer, eos_ids=(2,), pad_id=0)
    assert start(tmp_path / "run", against=world / "old", judge=f"model:{folder}").status == 0
    rows = read_jsonl(tmp_path / "run" / "responses.jsonl")
    scores = np.array([[row["score_policy"], row["score_against"]] for row in rows])
    assert len(set(scores[:, 0])) > 10  # prompts and responses differ
    np.testing.assert_allclose(scores[1::3, 0], scores[1::3, 1], atol=1e-5)  # equal responses
    assert results_of(tmp_path / "run")["win_rate"]["wins"] == sum(scores[:, 0] > scores[:, 1])


# What a restart finds


def test_a_judge_that_failed_can_be_mended_and_nothing_is_sampled_again(world, tmp_path, start, scripted):
    judge = tmp_path / "mine.py"
    judge.write_text("def judge(prompts, completions, **columns):\n    raise RuntimeError('asleep')\n")
    changes = dict(against=world / "old", judge=f"{judge}:judge")
    assert (
        "asleep; prompts: 'the cat was', 'the dog was', 'a film was' and 17 more"
        in start(tmp_path / "run", **changes).error()
    )
    assert not (tmp_path / "run" / "results.json").exists()
    judge.write_text("def judge(prompts, completions, number, **columns):\n    return number\n")
    assert start(tmp_path / "run", **changes).status == 0
    assert len(scripted) == 2
    results = results_of(tmp_path / "run")
    assert results["policy"]["score"] == 9.5  # the mean of 0 to 19, a column of the data
    assert results["win_rate"]["ties"] == 20


@pytest.mark.parametrize("what", ["nan_at_dog", "too_few"])
def test_a_wrong_score_is_told_with_its_prompts(world, tmp_path, start, scripted, what):
    told = start(tmp_path / "run", judge=f"{world}/rewards.py:{what}").error()
    assert f"reward {what}: got " in told
    assert ("the dog was" if what == "nan_at_dog" else "the cat was") in told


def test_other_data_than_at_the_first_start_is_refused(world, tmp_path, start, scripted):
    path = folders.write_jsonl(tmp_path / "p.jsonl", folders.prompt_rows(4))
    assert start(tmp_path / "run", prompts=path).status == 0
    (tmp_path / "run" / "results.json").unlink()
    folders.write_jsonl(path, folders.prompt_rows(5))
    told = start(tmp_path / "run", prompts=path).error()
    assert f"{tmp_path}/run/responses.jsonl: its prompts are not those of {path}" in told


def test_a_folder_of_something_else_is_left_alone(world, tmp_path, start, scripted):
    (tmp_path / "responses.jsonl").write_text("{}\n")
    before = folders.contents(tmp_path)
    assert "holds files but no config.json" in start(tmp_path).error()
    assert folders.contents(tmp_path) == before


# People


class People:
    """In the place of the labelling page: annotators who choose the response with the better word."""

    def __init__(self, patience: int = 100):
        self.patience, self.seen = patience, []

    def serve_until_complete(self, store, host, port, token):
        assert (host, port, token) == ("127.0.0.1", 8123, "a secret of many letters")
        for name in ("ann", "bob"):
            while (shown := store.next_item(name)) is not None:
                if len(self.seen) == self.patience:
                    raise KeyboardInterrupt
                self.seen.append(shown)
                liking = [1 + ("bad" in text) - ("good" in text) for text in shown.responses]
                if name == "bob" and "cat 0" in shown.responses[0]:
                    liking = liking[::-1]  # bob does not agree about the first pair
                store.judge(name, shown.item_id, shown.form_token, ranks=[1 + rank for rank in liking])
        assert store.complete()


@pytest.fixture
def people(monkeypatch):
    def hire(**kwargs):
        made = People(**kwargs)
        monkeypatch.setitem(sys.modules, "experiments.collect_feedback", made)
        return made

    return hire


def test_people_judge_blind_and_a_restart_goes_on(world, tmp_path, start, scripted, people):
    settings = dict(
        against=world / "old", judge="page", annotators=2, port=8123, token="a secret of many letters", num_prompts=9
    )
    tired = people(patience=4)
    outcome = start(tmp_path / "run", **settings)
    assert (outcome.status, outcome.out.count("prompts: 9")) == (130, 1)
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()
    rested = people()
    assert start(tmp_path / "run", **settings).status == 0
    assert len(scripted) == 2

    # 9 pairs: 0 3 6 good against plain, 1 4 7 equal and shown to nobody, 2 5 8 bad against plain; two people each.
    shown = [*tired.seen, *rested.seen]
    assert len(tired.seen) + len(rested.seen) == 12
    assert all(len(set(one.responses)) == 2 for one in shown)
    assert not any("new" in repr(one) or "policy" in repr(one) for one in shown)
    results = results_of(tmp_path / "run")
    # Pair 0: one for each side, a tie. 3 and 6 won, 2, 5 and 8 lost, 0 1 4 7 tied: (2 + 4 / 2) / 9
    assert {key: results["win_rate"][key] for key in ("wins", "losses", "ties")} == {"wins": 2, "losses": 3, "ties": 4}
    assert results["win_rate"]["rate"] == pytest.approx(4 / 9)
    assert results["policy"] == {"score": None, "score_low": None, "score_high": None, "length": pytest.approx(3.0)}
    assert "Judge: people on the labelling page, 2 a pair" in (tmp_path / "run" / "results.md").read_text()
    with Store(tmp_path / "run" / "feedback.db") as store:
        assert {judgement.item.sources for judgement in store.judgements()} == {("policy", "against")}


@pytest.mark.parametrize("against", ["old", "references"])
def test_nobody_is_asked_about_equal_responses(world, tmp_path, start, scripted, people, against):
    """Equal but for the spaces around them, in the case of the references."""
    nobody = people()
    rows = [row | {"completion": f"the cat {i}"} for i, row in enumerate(folders.prompt_rows())]
    path = folders.write_jsonl(tmp_path / "p.jsonl", rows)
    other = against if against == "references" else world / against
    assert start(tmp_path / "run", policy=world / "old", against=other, prompts=path, judge="page").status == 0
    assert nobody.seen == []
    assert results_of(tmp_path / "run")["win_rate"] == {
        "rate": 0.5, "low": 0.5, "high": 0.5, "wins": 0, "losses": 0, "ties": 20,
    }  # fmt: skip


# Prompts that are too long


TEXT = "the old cat was here and the dog sat"


@pytest.mark.parametrize(
    ("how", "expected"), [("drop", None), ("keep_start", "the old cat was"), ("keep_end", "and the dog sat")]
)
def test_a_long_prompt(how, expected):
    """`<s>` is a token too."""
    tokenizer = folders.word_tokenizer()
    assert fit(TEXT, [tokenizer], 5, how) == expected
    assert fit(TEXT, [tokenizer], 10, how) == TEXT
    shorter = (
        None if expected is None else " ".join(expected.split()[:3] if how == "keep_start" else expected.split()[1:])
    )
    assert fit(TEXT, [tokenizer], 4, how) == shorter


def test_a_prompt_fits_every_policy():
    """The second tokenizer does not know "cat", and makes letters of it."""
    coarse, fine = folders.word_tokenizer(), LetterTokenizer()
    assert fit("the old cat", [coarse], 4, "drop") == "the old cat"
    assert fit("the old cat", [coarse, fine], 8, "drop") is None
    assert fit("the old cat", [coarse, fine], 8, "keep_start") == "the old"


class LetterTokenizer:
    """One token a letter."""

    bos_token = eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


def test_a_conversation_is_not_cut():
    tokenizer = folders.word_tokenizer()
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    assert fit([{"role": "user", "content": TEXT}], [tokenizer], 5, "keep_end") is None


def test_long_prompts_are_counted(world, tmp_path, start, scripted):
    rows = [*folders.prompt_rows(5), {"prompt": TEXT}]
    path = folders.write_jsonl(tmp_path / "p.jsonl", rows)
    flags = dict(prompts=path, prompt_length=6)
    outcome = start(tmp_path / "drop", **flags, long_prompts="drop")
    assert "prompts: 5 of at most 6 tokens (1 dropped, 0 cut)" in outcome.out
    outcome = start(tmp_path / "keep", **flags, long_prompts="keep_end")
    assert "prompts: 6 of at most 6 tokens (0 dropped, 1 cut)" in outcome.out
    assert read_jsonl(tmp_path / "keep" / "responses.jsonl")[-1]["prompt"] == "here and the dog sat"
    outcome = start(tmp_path / "few", **flags, num_prompts=3)
    assert "prompts: 3 of at most 6 tokens" in outcome.out


# Refusals: one line, and no workdir


def rows_of(*changes):
    rows = folders.prompt_rows(3)
    return [row | change for row, change in zip(rows, changes, strict=False)] + rows[len(changes) :]


REFUSED = {
    "no policy": (dict(policy=""), None, "config.policy: got '', expected a Hugging Face folder"),
    "policy is not there": (dict(policy="./nothing"), None, "nothing"),
    "other policy is not there": (dict(against="./nothing"), None, "nothing"),
    "no prompts": (dict(prompts="none.jsonl"), None, "none.jsonl: no such file"),
    "one prompt": ({}, folders.prompt_rows(1), "prompts: got 1, expected at least 2"),
    "all too long": (dict(prompt_length=2, long_prompts="drop"), None, "prompts: got 0, expected at least 2 of"),
    "no such column": ({}, [{"question": "?"}] * 2, "row 1: got columns question, expected one of prompt"),
    "room": (dict(prompt_length=30), None, "at most the 32 positions"),
    "no judge": (dict(judge=""), None, "config.judge: got '', expected one of vader"),
    "no such judge": (dict(judge="nothing"), None, "config.judge: got 'nothing', expected one of vader"),
    "judge of tokens": (dict(judge="jax:experiments.rewards:praise"), None, "config.judge: "),
    "no reward model": (dict(judge="model:./nothing"), None, "config.judge: "),
    "no references": (
        dict(against="references"), None,
        "references: got 0, expected 20, one for each prompt, in the column references or completion",
    ),
    "some references": ({}, rows_of({"completion": "a"}), "references: got 1, expected 3"),
    "references of nothing": ({}, rows_of({"references": []}), "row 1: column 'references': got '[]', expected a text"),
    "blank reference": ({}, rows_of({"completion": " \n"}), "row 1: column 'completion': got "),
    "numbers as references": ({}, rows_of({"references": [1]}), "row 1: column 'references': got '[1]'"),
    "half a character": ({}, rows_of({"completion": "\ud800"}), "row 1: column 'completion': got "),
    "a whole conversation": (
        {}, rows_of({"completion": [{"role": "user", "content": "a"}] * 2}), "row 1: column 'completion': got ",
    ),
    "language of nothing": (dict(language="de"), None, "references: got 0, expected 20"),
    "no language": (
        dict(language="german"), [row | {"completion": "a"} for row in folders.prompt_rows(2)],
        "language: got 'german', expected a code",
    ),
    "page without another side": (dict(judge="page"), None, "against: got '', expected another policy or references"),
    "open to all": (dict(host="0.0.0.0"), None, "host: got '0.0.0.0'"),
    "temperature": (dict(temperature=-1.0), None, "temperature: got -1.0, expected 0 (greedy) or more"),
    "batch": (dict(batch_size=0), None, "batch_size: got 0, expected at least 1"),
    "one": (dict(num_prompts=1), None, "num_prompts: got 1, expected 0 (all) or at least 2"),
    "how": (dict(long_prompts="cut"), None, "long_prompts: got 'cut', expected one of drop"),
    "dtype": (dict(dtype="int8"), None, "dtype: got 'int8', expected float32 or bfloat16"),
    "port": (dict(port=70000), None, "port: got 70000, expected 0 to 65535"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, start, name):
    changes, rows, told = REFUSED[name]
    if rows:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = changes | {"prompts": tmp_path / "p.jsonl"}
    assert told in start(tmp_path / "run", **changes).error()
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_told_before_the_sampling(world, tmp_path, start, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    told = start(tmp_path / "run", prompts=world / "answered.jsonl").error()
    assert 'BLEU needs the "eval" extra' in told
    assert not (tmp_path / "run").exists()


def test_there_is_nothing_to_plan(tmp_path, capsys):
    arguments = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    told = folders.call_script(evaluate, EvaluateExperiment, arguments, capsys).error()
    assert "--dry_run: " in told
    assert not (tmp_path / "run").exists()
