"""The whole road in one command: pretraining, fine-tuning, feedback, reward model, PPO, evaluation, report.

    python experiments/rlhf.py --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Each stage has its folder in the workdir (corpus/ pretrain/ sft/ prompts/ feedback/ reward_model/ ppo/ evaluation/);
what it ends with is report.html, report.md and summary.json. The same command again passes over the stages whose
settings and inputs are unchanged, and goes on in the one where it stopped.

Who judges is told by --config.feedback: `simulated` is a made-up annotator with a hidden preference and noise, who
writes into the same store as the page; `page` serves the labelling page and waits for people.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from experiments import best_of_n, cli, collect_feedback, train_ppo, train_reward, train_sft
from experiments.corpus import train_tokenizer, write_corpus
from experiments.report import write_report
from experiments.settings import RLHFExperiment, SFTExperiment
from experiments.stages import Stages, identity
from ppo_jax import hub
from ppo_jax.data import load_rows, take_prompt
from ppo_jax.errors import InputError, check
from ppo_jax.evaluation import pair_accuracy
from ppo_jax.feedback.agreement import agreement
from ppo_jax.feedback.formats import export
from ppo_jax.feedback.page import check_installed
from ppo_jax.feedback.simulated import annotate
from ppo_jax.metrics import read_jsonl, write_jsonl
from ppo_jax.rewards import call_reward, load_host_reward
from ppo_jax.runs import write_json
from ppo_jax.tokenizers import encode_prompt, load_tokenizer

REPORT = ("summary.json", "report.md", "report.html")


class Road:
    """The stages, in the order in which they are walked. What a stage's settings leave empty (data, model, prompts)
    comes from the stages before.
    """

    def __init__(self, settings: RLHFExperiment, workdir: Path) -> None:
        """Opens the workdir, and refuses what else would fail after minutes."""
        self.settings, self.workdir = settings.seeded(), workdir
        self.gold = settings.gold if settings.feedback == "simulated" else ""
        if self.gold:
            load_host_reward(self.gold)
        else:
            check_installed()
        self.stages = Stages(workdir)
        self.model = settings.model  # the newest language model on the road
        self.done: list[str] = []  # the stages that it comes from

    def walk(self) -> dict[str, Any]:
        """All stages; those that are done take no time.

        Returns:
            What stands in summary.json.
        """
        if not self.settings.model:
            self.corpus()
        self.prompts()
        if not self.settings.model:
            self.pretrain()
        if self.settings.sft.data or not self.settings.model:
            self.sft()
        self.feedback()
        self.reward_model()
        self.ppo()
        return self.evaluation()

    def corpus(self) -> None:
        """Generated reviews, and a tokenizer of their words."""
        settings = self.settings.corpus

        def work(folder: Path) -> dict[str, Any]:
            shutil.rmtree(folder, ignore_errors=True)  # half of an interrupted one
            counts = (settings.num_train, settings.num_heldout, settings.num_demonstrations, settings.num_prompts)
            write_corpus(folder, *counts, seed=settings.seed)
            texts = (row["text"] for row in read_jsonl(folder / "train.jsonl"))
            train_tokenizer(texts, settings.vocab_size).save_pretrained(folder / "tokenizer")
            return {}

        self.stages.run("corpus", identity(settings), [], work)

    def pretrain(self) -> None:
        """A new language model of the corpus."""
        corpus = self.workdir / "corpus"
        settings = fill(
            self.settings.pretrain,
            data=corpus / "train.jsonl",
            heldout=corpus / "heldout.jsonl",
            tokenizer=corpus / "tokenizer",
        )
        self._train_language_model("pretrain", self.settings.pretrain, settings, ["corpus"])

    def sft(self) -> None:
        """The language model, fine-tuned on demonstrations."""
        given = self.settings.sft
        settings = fill(given, model=self.model, data=self.workdir / "corpus" / "demonstrations.jsonl")
        self._train_language_model("sft", given, settings, self.done)

    def _train_language_model(self, name: str, given: SFTExperiment, settings: SFTExperiment, after: list[str]) -> None:
        def work(folder: Path) -> dict[str, Any]:
            results = train_sft.train(train_sft.prepare(settings), folder)
            print(f"held-out perplexity: {results['heldout/perplexity']:.2f} a token", flush=True)
            return results

        inputs = [identity(given, train_sft.MAY_CHANGE), identity(self.settings.model)]
        self.stages.run(name, inputs, after, work)
        self.model, self.done = str(self.workdir / name / "model"), [*after, name]

    def prompts(self) -> None:
        """The prompts that fit, in two files: to train on, and kept for evaluation."""
        settings = self.settings
        source = settings.prompts or str(self.workdir / "corpus" / "prompts.jsonl")
        most = settings.ppo.ppo.prompt_length
        words = settings.model or settings.pretrain.tokenizer or str(self.workdir / "corpus" / "tokenizer")

        def work(folder: Path) -> dict[str, Any]:
            tokenizer = load_tokenizer(hub.resolve(words))
            rows = [take_prompt(row, f"{source}: row {i}") for i, row in enumerate(load_rows(source), start=1)]
            kept = [prompt for prompt, _ in rows if 1 <= len(encode_prompt(tokenizer, prompt)) <= most]
            cut = len(kept) - settings.num_eval_prompts
            check("config.num_eval_prompts", settings.num_eval_prompts, cut >= 2,
                  f"at most {len(kept) - 2}: of {len(rows)} prompts {len(kept)} have 1 to {most} tokens")  # fmt: skip
            folder.mkdir(exist_ok=True)
            for name, part in (("train.jsonl", kept[:cut]), ("evaluation.jsonl", kept[cut:])):
                write_jsonl(folder / name, ({"prompt": prompt} for prompt in part))
            print(f"prompts: {cut:,} to train on, {len(kept) - cut} for evaluation, {len(rows) - len(kept)} left out")
            return {}

        inputs = [identity(settings.prompts), identity(settings.model), settings.num_eval_prompts, most]
        self.stages.run("prompts", inputs, [] if settings.model else ["corpus"], work)

    def feedback(self) -> None:
        """Responses of the language model, judged: the store, and what is in it in two files, one held out."""
        settings = self.settings
        collect = fill(settings.collect, model=self.model, prompts=self.workdir / "prompts" / "train.jsonl")
        kind = "scores" if collect.kind == "score" else "rankings"  # a comparison is a ranking of two

        def work(folder: Path) -> dict[str, Any]:
            store = collect_feedback.collect(collect, folder)
            if self.gold:
                for number in range(1, collect.annotators + 1):  # all but the first judge the overlap only
                    name = f"simulated {number}"
                    annotate(store, load_host_reward(self.gold), settings.annotator_temperature, collect.seed, name)
            else:
                collect_feedback.serve_until_complete(store, collect.host, collect.port, collect.token)
            rows = export(store, kind)
            prompts = list(dict.fromkeys(row["prompt"] for row in rows))
            heldout = set(prompts[round(len(prompts) * (1 - settings.feedback_heldout)) :])
            for name, is_heldout in (("train", False), ("heldout", True)):
                part = [row for row in rows if (row["prompt"] in heldout) == is_heldout]
                check(f"feedback: judgements in {name}.jsonl", len(part), len(part) > 0, "at least one: more prompts")
                write_jsonl(folder / f"{name}.jsonl", part)
            pairs = [row for row in export(store, "pairs") if row["prompt"] in heldout]
            return {"judgements": len(rows), "ceiling": self._ceiling(pairs), "agreement": agreement(store)}

        inputs = [identity(settings.collect, collect_feedback.MAY_CHANGE), settings.feedback, settings.feedback_heldout]
        inputs += [identity(self.gold), settings.annotator_temperature]
        self.stages.run("feedback", inputs, [*self.done, "prompts"], work)

    def _ceiling(self, pairs: list[dict[str, Any]]) -> float | None:
        """The share of pairs in which the simulated annotator chose what it prefers: no model can know its noise."""
        if not self.gold or not pairs:
            return None
        gold, prompts = load_host_reward(self.gold), [row["prompt"] for row in pairs]
        columns: list[dict[str, Any]] = [{} for _ in pairs]
        chosen, rejected = (
            call_reward(gold, prompts, [row[side] for row in pairs], columns) for side in ("chosen", "rejected")
        )
        return pair_accuracy(chosen - rejected, [True] * len(pairs)).accuracy

    def reward_model(self) -> None:
        """A reward model of the judgements, on the language model."""
        feedback = self.workdir / "feedback"
        settings = fill(
            self.settings.reward,
            model=self.model,
            reference=self.model,
            data=feedback / "train.jsonl",
            heldout=feedback / "heldout.jsonl",
        )

        def work(folder: Path) -> dict[str, Any]:
            results = train_reward.train(train_reward.prepare(settings), folder)
            ceiling = self.stages.result("feedback")["ceiling"]
            told = "" if ceiling is None else f"; the simulated annotator's own ceiling: {ceiling:.3f}"
            print(train_reward.verdict(results) + told, flush=True)
            return results

        inputs = identity(self.settings.reward, train_reward.MAY_CHANGE)
        self.stages.run("reward_model", inputs, [*self.done, "feedback"], work)

    def ppo(self) -> None:
        """PPO of the language model against the reward model."""
        settings = self._ppo_settings()

        def work(folder: Path) -> dict[str, Any]:
            return train_ppo.train(train_ppo.prepare(settings), folder)

        inputs = [identity(self.settings.ppo, train_ppo.MAY_CHANGE), identity(self.gold)]
        self.stages.run("ppo", inputs, [*self.done, "prompts", "reward_model"], work)

    def _ppo_settings(self) -> Any:
        return fill(
            self.settings.ppo,
            model=self.model,
            prompts=self.workdir / "prompts" / "train.jsonl",
            reward=f"model:{self.workdir / 'reward_model' / 'model'}",
            gold=self.gold,
        )

    def evaluation(self) -> dict[str, Any]:
        """What came of it, on prompts that nobody was trained on; then the summary and the report."""
        settings, workdir = self._ppo_settings(), self.workdir

        def work(folder: Path) -> dict[str, Any]:
            prompts = workdir / "prompts" / "evaluation.jsonl"
            results = best_of_n.evaluate(folder, self.model, str(workdir / "ppo" / "policy"), settings, prompts)
            for name in REPORT:
                (workdir / name).unlink(missing_ok=True)  # of an earlier result
            return results

        results = self.stages.run("evaluation", best_of_n.N, [*self.done, "ppo"], work)
        summary = self._summary(results)
        if not all((workdir / name).exists() for name in REPORT):
            write_report(workdir, summary)
            write_json(workdir / "summary.json", summary)
        return summary

    def _summary(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        reward, ppo = self.stages.result("reward_model"), self.stages.result("ppo")
        names = ("accuracy", "accuracy_low", "accuracy_high", "ece")
        return {
            **{f"reward_model/{name}": reward[name] for name in names},
            "reward_model/annotator_ceiling": self.stages.result("feedback")["ceiling"],
            **evaluation,
            "objective/kl": ppo["after"]["kl"],
            "objective/kl_limit": self.settings.ppo.kl_limit or None,
        }


def fill(settings: Any, **values: Any) -> Any:
    """Settings with these fields, where they are empty."""
    empty = {name: str(value) for name, value in values.items() if not getattr(settings, name)}
    return dataclasses.replace(settings, **empty)


def dry_run(settings: RLHFExperiment) -> None:
    """Refused: the stages are planned one by one."""
    raise InputError(
        "--dry_run: a stage can be planned once the one before it has run; expected train_sft.py or train_ppo.py"
    )


def main(settings: RLHFExperiment, workdir: Path) -> None:
    """Walks the road, and says where it led."""
    summary = Road(settings, workdir).walk()
    width = max(map(len, summary))
    for name, value in summary.items():
        print(f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    cli.launch(RLHFExperiment, main, dry_run)
