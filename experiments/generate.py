"""Samples from a model: one prompt, a file of them, or a conversation at the terminal.

    python experiments/generate.py --model=FOLDER --prompts=PROMPTS.jsonl --out=COMPLETIONS.jsonl --temperature=0
    python experiments/generate.py --model=runs/quickstart/ppo --prompt="In May my wife and I went to the cafe."
    python experiments/generate.py --model=HuggingFaceTB/SmolLM2-135M-Instruct
    python experiments/generate.py --model=FOLDER --adapter=runs/lora/adapter --prompt="Once upon a time"

The model is a Hugging Face folder, a name on the hub, or the workdir of a run (what it has trained). Prompts are rows
with a column `prompt` (text or chat messages), `messages` or `text`. Each row of the output has `prompt`, `completion`
(without special tokens, up to a stop string), `token_ids`, `logprobs` (nats, in the distribution that was drawn from)
and `finish_reason`: stop (EOS or a stop string) or length. At the terminal a model with a chat template remembers the
conversation; an empty line begins a new one, and the end of the input ends it.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments.ending import told_in_one_line
from experiments.responses import Answer, Prompt, Responder
from ppo_jax import hub
from ppo_jax.data import load_rows, take_prompt, told_at
from ppo_jax.errors import check
from ppo_jax.tokenizers import encode_prompt, load_tokenizer

TRAINED = ("policy", "model")  # where the workdir of a run has what it has trained
SLOTS = 64  # prompts at the terminal get a multiple of so many slots, so that few programs are compiled

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Not on import: flags are the process's, and other scripts have none of these."""
    flags.DEFINE_string("model", None, "a Hugging Face folder, a name on the hub, or the workdir of a run")
    flags.DEFINE_string(
        "adapter", "", "a folder in the format of PEFT, or a name on the hub, that is laid over the model"
    )
    flags.DEFINE_string("prompt", None, "one prompt; the answer is printed")
    flags.DEFINE_string("prompts", None, "a JSONL or Parquet file or a Hugging Face dataset: prompt, messages or text")
    flags.DEFINE_string("out", None, "the JSONL file that answers to --prompts are written to")
    flags.DEFINE_bool(
        "chat", None, "text is what a user says, by the chat template; unset: at a terminal, where there is a template"
    )
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer, in tokens")
    flags.DEFINE_float("temperature", 1.0, "of the sampling; 0: greedy")
    flags.DEFINE_integer("top_k", 0, "only the k likeliest tokens; 0: all")
    flags.DEFINE_float("top_p", 1.0, "only the likeliest tokens that together reach this probability")
    flags.DEFINE_float("min_p", 0.0, "only tokens at least this times as probable as the likeliest")
    flags.DEFINE_float(
        "repetition_penalty", 1.0, "logits of tokens in the text so far are divided by it; 1: they are not"
    )
    flags.DEFINE_multi_string("stop", [], "a text that ends an answer; may be given several times")
    flags.DEFINE_integer("seed", 0, "of the sampling")
    flags.DEFINE_integer("batch_size", 16, "answers that are sampled at a time")
    flags.DEFINE_string("dtype", "float32", "of the model's matrix products: float32 or bfloat16")
    flags.DEFINE_string("pad_token", "", "overrides the tokenizer's")
    flags.DEFINE_string("eos_token", "", "overrides the tokenizer's")


def main(argv: Sequence[str]) -> None:
    """Answers, or says in one line what is wrong."""
    with told_in_one_line():
        check("arguments", argv[1:], len(argv) == 1, "flags only, such as --seed=1")
        check("dtype", FLAGS.dtype, FLAGS.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("model", FLAGS.model, bool(FLAGS.model), "a folder, a name on the hub, or the workdir of a run")
        check("max_new_tokens", FLAGS.max_new_tokens, FLAGS.max_new_tokens >= 1, "at least 1")
        check("batch_size", FLAGS.batch_size, FLAGS.batch_size >= 1, "at least 1")
        check("seed", FLAGS.seed, FLAGS.seed >= 0, "0 or more")
        check("stop", FLAGS.stop, all(FLAGS.stop), "texts that are not empty")
        check("out", FLAGS.out, (FLAGS.out is None) == (FLAGS.prompts is None), "a file, together with prompts")
        both = FLAGS.prompt is not None and FLAGS.prompts is not None
        check("prompts", FLAGS.prompts, not both, "nothing beside prompt")
        jax.config.update("jax_default_matmul_precision", "float32")  # as in training
        folder = str(folder_of(FLAGS.model))
        if FLAGS.prompts is not None:
            answer_file(folder, FLAGS.prompts, Path(FLAGS.out).expanduser())
        elif FLAGS.prompt is not None:
            answer_one(folder, as_prompt(FLAGS.prompt, bool(FLAGS.chat)))
        else:
            converse(folder)


def folder_of(model: str) -> Path:
    """The folder of a model, also where a run's workdir is given.

    Raises:
        HubError: there is none.
    """
    for name in TRAINED:
        trained = Path(model).expanduser() / name
        if (trained / "config.json").is_file():
            return trained
    return hub.resolve(model)


def as_prompt(text: str, chat: bool) -> Prompt:
    """Text as it is, or as what a user says."""
    return [{"role": "user", "content": text}] if chat else text


def responder(folder: str, prompt_length: int, batch_size: int, stream: bool) -> Responder:
    """The model with the flags' sampling."""
    return Responder(
        folder,
        prompt_length,
        FLAGS.max_new_tokens,
        FLAGS.temperature,
        batch_size,
        FLAGS.dtype,
        FLAGS.pad_token,
        FLAGS.eos_token,
        FLAGS.adapter,
        FLAGS.stop,
        (lambda text: print(text, end="", flush=True)) if stream else None,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
        min_p=FLAGS.min_p,
        repetition_penalty=FLAGS.repetition_penalty,
    )


def answer_file(folder: str, source: str, out: Path) -> None:
    """Answers every row; the file is there when all are answered, before that it is called `.part`."""
    prompts: list[Prompt] = []
    tokenizer, longest = load_tokenizer(folder), 1
    for number, row in enumerate(load_rows(source), start=1):
        where = f"{source}: row {number}"
        prompt, _ = take_prompt(row, where)
        prompt = as_prompt(prompt, bool(FLAGS.chat)) if isinstance(prompt, str) else prompt
        with told_at(where):
            length = len(encode_prompt(tokenizer, prompt))
        check(f"{where}: tokens", length, length >= 1, "at least 1")
        longest = max(longest, length)
        prompts.append(prompt)
    model = responder(folder, longest, min(FLAGS.batch_size, len(prompts)), stream=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    begin, answers = time.perf_counter(), []
    with part.open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, model.answers(prompts, seed=FLAGS.seed), strict=True):
            file.write(json.dumps(row_of(prompt, answer), ensure_ascii=False) + "\n")
            file.flush()
            answers.append(answer)
    part.replace(out)
    print(f"{len(answers):,} answers in {out}")
    print(speed(model, answers, time.perf_counter() - begin))


def row_of(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """A row of the output."""
    return {
        "prompt": prompt,
        "completion": answer.text,
        "token_ids": answer.token_ids,
        "logprobs": answer.logprobs,
        "finish_reason": answer.finish_reason,
    }


def answer_one(folder: str, prompt: Prompt) -> None:
    """Prints the answer to one prompt, as it comes."""
    model = responder(folder, max(1, len(encode_prompt(load_tokenizer(folder), prompt))), 1, stream=True)
    begin = time.perf_counter()
    answers = list(model.answers([prompt], seed=FLAGS.seed))
    print(f"\n{speed(model, answers, time.perf_counter() - begin)}")


def converse(folder: str) -> None:
    """Answers what is typed, line by line."""
    tokenizer, room = load_tokenizer(folder), hub.load_config(folder).max_positions - FLAGS.max_new_tokens
    chat = bool(tokenizer.chat_template) if FLAGS.chat is None else FLAGS.chat
    check("max_new_tokens", FLAGS.max_new_tokens, room >= 1, f"fewer than the model's {room + FLAGS.max_new_tokens}")
    model = responder(folder, min(room, SLOTS), 1, stream=True)
    turns: list[dict[str, Any]] = []
    print("chat; an empty line begins a new one" if chat else "text, which the model goes on with", file=sys.stderr)
    for number, line in enumerate(iter_lines()):
        if not line:
            turns = []
            continue
        turns = [*turns, {"role": "user", "content": line}]
        prompt: Prompt = turns if chat else line
        length = len(encode_prompt(tokenizer, prompt))
        check("conversation: tokens", length, length <= room, f"at most {room}, which leave room for an answer")
        model.prompt_length = min(room, -(-length // SLOTS) * SLOTS)
        begin, compiled_s = time.perf_counter(), model.compile_s
        (answer,) = model.answers([prompt], seed=FLAGS.seed + number)
        print()
        print(speed(model, [answer], time.perf_counter() - begin, compiled_s), file=sys.stderr)
        turns = [*turns, {"role": "assistant", "content": answer.text}]


def iter_lines() -> Any:
    """Lines of the terminal, or of what is piped in, to their end."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def speed(model: Responder, answers: Sequence[Answer], seconds: float, compiled_s: float = 0.0) -> str:
    """How fast it was, compiling apart."""
    tokens, compile_s = sum(len(answer.token_ids) for answer in answers), model.compile_s - compiled_s
    seconds = max(seconds - compile_s, 1e-9)
    return f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s (compiled in {compile_s:.1f} s)"


if __name__ == "__main__":
    define_flags()
    app.run(main)
