"""`experiments/generate.py`: a file of prompts, one prompt, a conversation; and all that is refused."""

import io
import json
import re
import sys

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import generate
from experiments.streaming import Watcher, cut_at, settled
from ppo_jax import hub
from ppo_jax.models import Decoder, LoRAConfig, init_adapter, merge, overlay
from ppo_jax.tokenizers import load_tokenizer

PROMPTS = ["the cat was", "a film", "the very old dog sat here", "the dog is"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers, which write something."""
    tokenizer = folders.word_tokenizer()
    tokenizer.chat_template = folders.CHAT_TEMPLATE
    config = folders.llama_config(len(tokenizer), num_layers=2)
    return folders.make_folder(tmp_path_factory.mktemp("generate") / "model", tokenizer, config)


@pytest.fixture
def flag_names():
    """The script's flags, while a test runs: tests of other scripts in this process must not know them."""
    before = set(flags.FLAGS)
    generate.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def run(capsys, monkeypatch, flag_names):
    """Runs the script within this process, as its command line would."""

    def start(*arguments: str, text: str = "") -> folders.Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        saved, precision, status = flagsaver.save_flag_values(), jax.config.jax_default_matmul_precision, 0
        try:
            generate.main(flags.FLAGS(["generate.py", *map(str, arguments)]))
        except SystemExit as ending:
            status = ending.code
        finally:
            flagsaver.restore_flag_values(saved)
            jax.config.update("jax_default_matmul_precision", precision)
        return folders.Outcome(status, *capsys.readouterr())

    return start


@pytest.fixture
def answers_of(run, tmp_path, model):
    """The rows that a file of prompts gets."""

    def answer(*flags: str, rows=None) -> list[dict]:
        prompts = folders.write_jsonl(tmp_path / "prompts.jsonl", rows or [{"prompt": text} for text in PROMPTS])
        out = tmp_path / "deep" / "out.jsonl"
        done = run(f"--model={model}", f"--prompts={prompts}", f"--out={out}", "--max_new_tokens=8", *flags)
        assert (done.status, done.err) == (0, "")
        assert "tokens/s" in done.out
        assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
        return [json.loads(line) for line in out.read_text().splitlines()]

    return answer


def test_a_file_greedily(model, answers_of):
    """Each token is the likeliest after those before it, with its log-probability; batches of 3 for 4 prompts."""
    rows = answers_of("--temperature=0", "--batch_size=3")
    assert [list(row) for row in rows] == [["prompt", "completion", "token_ids", "logprobs", "finish_reason"]] * 4
    assert [row["prompt"] for row in rows] == PROMPTS
    config, tokenizer = hub.load_config(model), load_tokenizer(model)
    params = {"params": hub.load_params(model, config)}
    eos = tokenizer.eos_token_id
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        ids = [*prompt, *row["token_ids"]]
        logits = np.asarray(Decoder(config).apply(params, jnp.array([ids]), jnp.ones((1, len(ids)), bool)), np.float64)
        logits = logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(axis=1).tolist() == row["token_ids"]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(row["logprobs"], logprobs.max(axis=1), atol=1e-4)
        ended = row["token_ids"][-1] == eos
        assert len(row["token_ids"]) == 8 or ended
        assert eos not in row["token_ids"][:-1]
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert row["completion"].split() == tokenizer.decode(row["token_ids"], skip_special_tokens=True).split()


def test_seeds_and_filters(answers_of):
    one, again, other = (answers_of(f"--seed={seed}") for seed in (1, 1, 2))
    assert one == again != other
    alone = answers_of("--seed=1", "--top_k=1")
    assert [row["token_ids"] for row in alone] == [row["token_ids"] for row in answers_of("--temperature=0")]
    assert all(logprob == 0 for row in alone for logprob in row["logprobs"])
    for flag in ("--min_p=1", "--top_p=0.000001"):
        assert [row["token_ids"] for row in answers_of(flag)] == [row["token_ids"] for row in alone]
    strong = answers_of("--temperature=0", "--repetition_penalty=1000")
    for row in strong:
        assert len(set(row["token_ids"])) == len(row["token_ids"])


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(answers_of):
    free = answers_of("--seed=3")
    long = max(free, key=lambda row: len(row["completion"].split()))
    word = long["completion"].split()[2]
    for row, whole in zip(answers_of("--seed=3", f"--stop={word}", "--stop=zzz"), free, strict=True):
        size = len(row["token_ids"])
        assert whole["token_ids"][:size] == row["token_ids"]
        np.testing.assert_allclose(whole["logprobs"][:size], row["logprobs"], atol=1e-5)
        if word in whole["completion"]:
            assert row["completion"] == whole["completion"][: whole["completion"].index(word)]
            assert row["finish_reason"] == "stop"
        else:
            assert row == whole


def test_messages_and_chat(answers_of):
    said = [{"role": "user", "content": "the cat was"}]
    rows = answers_of("--temperature=0", rows=[{"messages": said}, {"prompt": said}])
    (text,) = answers_of("--temperature=0", "--chat", rows=[{"text": "the cat was"}])
    assert rows[0]["token_ids"] == rows[1]["token_ids"] == text["token_ids"]
    assert rows[0]["prompt"] == rows[1]["prompt"] == text["prompt"] == said


def test_one_prompt_is_answered_as_it_comes(model, run, answers_of):
    (row,) = answers_of("--temperature=0", rows=[{"prompt": PROMPTS[0]}])
    done = run(f"--model={model}", f"--prompt={PROMPTS[0]}", "--max_new_tokens=8", "--temperature=0")
    assert (done.status, done.out.splitlines()[0]) == (0, row["completion"])


def test_a_conversation(model, run):
    """The second answer is to both questions and the first answer; after an empty line, to the third alone."""
    flags = (f"--model={model}", "--max_new_tokens=4", "--temperature=0")
    done = run(*flags, text="the cat was\nthe dog is\n\nthe cat was\n")
    first, _, third = done.out.splitlines()
    assert done.status == 0
    assert first == third
    assert done.err.count("tokens/s") == 3
    plain = run(*flags, "--nochat", text="the cat was\nthe cat was\n").out.splitlines()
    assert plain[0] == plain[1] != first


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_lies_over_the_model(model, run, answers_of, tmp_path, rng, dora):
    """The answers of the merged weights; where the adapter is of another model, a line that says so."""
    config, lora = hub.load_config(model), LoRAConfig(rank=2, targets="query|down", dora=dora)
    base = hub.load_params(model, config)
    adapter = jax.tree.map(
        lambda x: x + rng.normal(size=x.shape).astype(np.float32), init_adapter(base, lora, jax.random.key(0))
    )
    hub.save_adapter(tmp_path / "adapter", adapter, lora, config)
    merged = merge(overlay(base, adapter), lora.scale)
    hub.save(tmp_path / "merged", jax.device_get(merged), config, load_tokenizer(model))
    ours, plain = answers_of("--temperature=0", f"--adapter={tmp_path / 'adapter'}"), answers_of("--temperature=0")
    theirs = answers_of(f"--model={tmp_path / 'merged'}", "--temperature=0")
    assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in theirs]
    assert [row["logprobs"] for row in ours] != [row["logprobs"] for row in plain]
    other = folders.make_folder(tmp_path / "other", config=folders.llama_config(21))
    told = run(f"--model={other}", "--prompt=the", f"--adapter={tmp_path / 'adapter'}").error()
    assert "adapter" in told


def test_a_run_is_a_model(model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    hub.save(tmp_path / "run" / "policy", hub.load_params(model, hub.load_config(model)), hub.load_config(model))
    assert generate.folder_of(str(tmp_path / "run")) == tmp_path / "run" / "policy"
    assert generate.folder_of(str(model)) == model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=", "--prompt=a"], "error: model: got '', expected a folder, a name on the hub, or the workdir of a"),
        (["--model=./nowhere", "--prompt=a"], "error: model './nowhere': no such folder"),
        (["--prompts=@/none.jsonl", "--out=@/out"], "none.jsonl: no such file"),
        (["--prompts=@/none.jsonl"], "error: out: got None, expected a file, together with prompts"),
        (["--out=@/out.jsonl"], "error: out: got '.*', expected a file, together with prompts"),
        (["--prompts=@/bad.jsonl", "--out=@/out.jsonl"], "bad.jsonl: row 1: got columns question, expected one of"),
        (["--prompt=the cat", "--max_new_tokens=0"], "error: max_new_tokens: got 0, expected at least 1"),
        (
            ["--prompt=the cat", "--max_new_tokens=99"],
            "prompt_length . response_length: got 102, expected at most the 32",
        ),
        (["--prompt=the cat", "--max_new_tokens=4", "--top_p=2"], "error: top_p: got 2.0"),
        (["--prompt=the cat", "--stop="], "error: stop: got "),
        (["--prompt=the cat", "--dtype=int8"], "error: dtype: got 'int8', expected float32 or bfloat16"),
        (["--prompt=the cat", "more"], "error: arguments: got .'more'., expected flags only"),
    ],
)
def test_what_is_refused(model, run, tmp_path, flags, message):
    folders.write_jsonl(tmp_path / "bad.jsonl", [{"question": "why"}])
    done = run(f"--model={model}", *(flag.replace("@", str(tmp_path)) for flag in flags))
    assert done.status == 1
    assert len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err
    assert not list(tmp_path.glob("out*"))


def test_chat_without_a_template_says_what_to_do(run, tmp_path):
    model = folders.make_folder(tmp_path / "model")
    done = run(f"--model={model}", "--prompt=the cat", "--chat")
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert "it has no chat template; expected one for prompts that are chat messages, or prompts" in done.err


def test_what_is_shown_is_never_taken_back():
    assert cut_at("one, two. three", [".", ", "]) == ("one", True)
    assert cut_at("one", ["."]) == ("one", False)
    assert settled("to be\ufffd", []) == "to be"
    assert settled("the end<|us", ["<|user|>", "\n\n"]) == "the end"
    assert settled("line\n", ["\n\n"]) == "line"


def test_a_watcher_shows_pieces_that_make_the_text():
    tokenizer = folders.word_tokenizer()
    pieces, ids = [], tokenizer.encode("the cat was good . very", add_special_tokens=False)
    watcher = Watcher(tokenizer, [2], ["good ."], pieces.append)
    watcher.begin(np.array([[0, 1, 12], [1, 12, 13]]), np.array([[False, True, True], [True] * 3]))
    ended = [watcher(np.array([token, 2]), np.array(i)).tolist() for i, token in enumerate(ids)]
    watcher.finish()
    assert ended == [[False, True]] * 4 + [[True, True]] * 2
    assert "".join(pieces).strip() == "the cat was"
    assert len([piece for piece in pieces if piece]) > 1
