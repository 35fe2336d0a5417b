"""From nothing to a fine-tuned language model in one command, offline: write a corpus, pretrain on it, then PPO.

    python experiments/rlhf.py --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Each stage has its folder in the workdir (corpus/ pretrain/ ppo/). The same command again goes on where the run stopped,
and passes over what is done.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from experiments import cli, train_ppo, train_sft
from experiments.results import results_page
from experiments.reviews import sentence_fraction, train_tokenizer, write_corpus
from experiments.settings import RLHFExperiment
from ppo_jax.errors import InputError, check
from ppo_jax.metrics import atomic_write, read_jsonl
from ppo_jax.rewards import load_reward
from ppo_jax.runs import open_run
from ppo_jax.tokenizers import load_tokenizer


def write_data(settings: RLHFExperiment, folder: Path) -> None:
    """The corpus of generated reviews, and a tokenizer trained on it; the folder appears when all is in it."""
    corpus = settings.corpus
    if folder.exists():
        open_run(folder, dataclasses.asdict(corpus))
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    open_run(partial, dataclasses.asdict(corpus))
    write_corpus(partial, corpus.num_train, corpus.num_heldout, corpus.num_prompts, corpus.seed)
    tokenizer = train_tokenizer((row["text"] for row in read_jsonl(partial / "train.jsonl")), corpus.vocab_size)
    tokenizer.save_pretrained(partial / "tokenizer")
    partial.rename(folder)


def dry_run(settings: RLHFExperiment) -> None:
    """Refused: the stages are planned one by one."""
    raise InputError(
        "--dry_run: a stage can be planned once the one before it has run; expected train_sft.py or train_ppo.py"
    )


def main(settings: RLHFExperiment, workdir: Path) -> None:
    """Walks the stages; those that are done already take no time."""
    corpus = workdir / "corpus"
    write_data(settings, corpus)
    check_ppo(settings, corpus)

    print(f"pretraining: {workdir / 'pretrain'}", flush=True)
    pretrain = dataclasses.replace(
        settings.pretrain,
        data=settings.pretrain.data or str(corpus / "train.jsonl"),
        heldout=settings.pretrain.heldout or str(corpus / "heldout.jsonl"),
        tokenizer=settings.pretrain.tokenizer or str(corpus / "tokenizer"),
    )
    pretrained = train_sft.train(train_sft.prepare(pretrain), workdir / "pretrain")
    print(f"held-out perplexity: {pretrained['heldout/perplexity']:.2f} a token", flush=True)

    print(f"PPO: {workdir / 'ppo'}", flush=True)
    ppo = dataclasses.replace(
        settings.ppo,
        model=settings.ppo.model or str(workdir / "pretrain" / "model"),
        prompts=settings.ppo.prompts or str(corpus / "prompts.jsonl"),
    )
    results = train_ppo.train(train_ppo.prepare(ppo), workdir / "ppo")
    page = results_page(results, workdir / "ppo", ppo.kl_limit) + quality(workdir)
    atomic_write(workdir / "results.md", page.encode())
    print(page)


def check_ppo(settings: RLHFExperiment, corpus: Path) -> None:
    """Refuses settings of the last stage before the first one has cost minutes.

    Raises:
        InputError: the reward cannot be loaded, or prompt and response do not fit into the model.
    """
    load_reward(settings.ppo.reward, load_tokenizer(corpus / "tokenizer"))
    length = settings.ppo.ppo.prompt_length + settings.ppo.ppo.response_length
    room = settings.pretrain.architecture.max_positions
    fits = length <= room or bool(settings.ppo.model or settings.pretrain.model)
    check("config.ppo.ppo.prompt_length + response_length", length, fits, f"at most the model's {room} positions")


def quality(workdir: Path) -> str:
    """How far the score went, and how much of the text is still sentences of the corpus's grammar, as Markdown."""
    results = json.loads((workdir / "ppo" / "results.json").read_text())
    before, after = results["before"]["score"], results["after"]["score"]
    rows = read_jsonl(workdir / "ppo" / "responses.jsonl")
    share = {when: sum(sentence_fraction(row[when]) for row in rows) / len(rows) for when in ("before", "after")}
    return (
        f"Of the distance from the score before to the maximum of 1: {(after - before) / (1 - before):.0%}.\n\n"
        "Complete sentences that the grammar of the corpus accepts: "
        f"{share['before']:.1%} before, {share['after']:.1%} after.\n"
    )


if __name__ == "__main__":
    cli.launch(RLHFExperiment, main, dry_run)
