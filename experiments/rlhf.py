"""The whole road in one command: pretraining, fine-tuning, feedback, reward model, PPO, evaluation, report.

    python experiments/rlhf.py --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Each stage has its folder in the workdir (corpus/ pretrain/ sft/ prompts/ feedback/ reward_model/ ppo/ evaluation/);
what it ends with is report.html, report.md and summary.json. The same command again passes over the stages whose
settings and inputs are unchanged, and goes on in the one where it stopped.

Who judges is told by --config.feedback: `simulated` is a made-up annotator with a hidden preference and noise, who
writes into the same store as the page; `page` serves the labelling page and waits for people.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from experiments import best_of_n, cli, collect_feedback, train_ppo, train_reward, train_sft
from experiments.corpus import train_tokenizer, write_corpus
from experiments.prompts import fitted
from experiments.report import write_report
from experiments.settings import PPOExperiment, RLHFExperiment, SFTExperiment
from experiments.stages import Stages, identity
from ppo_jax import hub
from ppo_jax.comparisons import JudgedSet
from ppo_jax.errors import InputError, check
from ppo_jax.evaluation import pair_accuracy
from ppo_jax.feedback.agreement import agreement
from ppo_jax.feedback.formats import export
from ppo_jax.feedback.page import check_installed
from ppo_jax.feedback.simulated import annotate
from ppo_jax.feedback.store import Store
from ppo_jax.metrics import read_jsonl, write_jsonl
from ppo_jax.rewards import call_reward, load_host_reward
from ppo_jax.runs import write_json
from ppo_jax.tokenizers import load_tokenizer

SIMULATED = "simulated"  # what the names of such annotators begin with
REPORT = ("summary.json", "report.md", "report.html")


class Road:
    """The stages, in the order in which they are walked. What a stage's settings leave empty (data, model, prompts)
    comes from the stages before.
    """

    def __init__(self, settings: RLHFExperiment, workdir: Path) -> None:
        """Opens the workdir, and refuses what else would fail after minutes."""
        self.settings, self.workdir = settings.seeded(), workdir.resolve()
        self.gold = settings.gold if settings.feedback == "simulated" else ""
        if self.gold:
            load_host_reward(self.gold)
        else:
            check_installed()
        self.longest = settings.ppo.ppo.prompt_length + settings.ppo.ppo.response_length + 1  # and EOS
        room = settings.pretrain.architecture.max_positions
        if settings.model:
            room = hub.load_config(hub.resolve(settings.model)).max_positions
        check("config.ppo.ppo.prompt_length + response_length + 1", self.longest, self.longest <= room,
              f"at most the model's {room} positions")  # fmt: skip
        self.stages = Stages(self.workdir)
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

    def prompts(self) -> None:
        """The prompts that fit, each once and in random order, in two files: to train on, and kept for evaluation."""
        settings, ppo = self.settings, self.settings.ppo
        source = settings.prompts or str(self.workdir / "corpus" / "prompts.jsonl")
        words = settings.model or settings.pretrain.tokenizer or str(self.workdir / "corpus" / "tokenizer")
        how = (ppo.ppo.prompt_length, ppo.long_prompts)

        def work(folder: Path) -> dict[str, Any]:
            tokenizer, kept = load_tokenizer(hub.resolve(words)), {}
            rows = list(fitted(source, ppo.prompts_split, [tokenizer], *how))
            for asked in rows:
                if asked.prompt is not None:
                    kept.setdefault(json.dumps(asked.prompt), asked.columns | {"prompt": asked.prompt})
            texts = [list(kept.values())[i] for i in np.random.default_rng(ppo.seed).permutation(len(kept))]
            cut = len(texts) - settings.num_eval_prompts
            check("config.num_eval_prompts", settings.num_eval_prompts, cut >= 2,
                  f"at least 2 less than the {len(texts)} prompts, of {len(rows)}, that differ and have at most "
                  f"{how[0]} tokens (config.ppo.long_prompts={how[1]})")  # fmt: skip
            folder.mkdir(exist_ok=True)
            for name, part in (("train.jsonl", texts[:cut]), ("evaluation.jsonl", texts[cut:])):
                write_jsonl(folder / name, part)
            print(f"prompts: {cut:,} to train on, {len(texts) - cut} for evaluation, {len(rows) - len(texts)} left out")
            return {}

        inputs = [identity(settings.prompts), identity(words) if settings.model else "", ppo.prompts_split, how]
        inputs += [settings.num_eval_prompts, ppo.seed]
        self.stages.run("prompts", inputs, [] if settings.model else ["corpus"], work)

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

    def feedback(self) -> None:
        """Responses of the language model, judged: the store, and what was said in it as judgements.jsonl."""
        given, ppo = self.settings.collect, self.settings.ppo
        collect = dataclasses.replace(
            given,
            prompt_length=ppo.ppo.prompt_length,
            response_length=ppo.ppo.response_length,
            temperature=ppo.ppo.temperature,
        )
        if not given.responses and not given.judged:
            collect = fill(collect, model=self.model, prompts=self.workdir / "prompts" / "train.jsonl")

        def work(folder: Path) -> dict[str, Any]:
            store = collect_feedback.collect(collect, folder)
            if self.gold:
                for number in range(1, collect.annotators + 1):  # all but the first judge the overlap only
                    name, temperature = f"{SIMULATED} {number}", self.settings.annotator_temperature
                    annotate(store, load_host_reward(self.gold), temperature, collect.seed, name)
            else:
                collect_feedback.serve_until_complete(store, collect.host, collect.port, collect.token)
            # A comparison is a ranking of two.
            rows = export(store, "rankings") or export(store, "scores")
            write_jsonl(folder / "judgements.jsonl", rows)
            return {"judgements": len(rows), "agreement": agreement(store)}

        inputs = [identity(given, collect_feedback.MAY_CHANGE), self.settings.feedback, identity(self.gold)]
        inputs += [collect.prompt_length, collect.response_length, collect.temperature]
        inputs += [self.settings.annotator_temperature] if self.gold else []
        self.stages.run("feedback", inputs, [*self.done, "prompts"], work, protected=judged_by_people)

    def reward_model(self) -> None:
        """A reward model of the judgements, on the language model."""
        settings = dataclasses.replace(
            fill(
                self.settings.reward,
                model=self.model,
                reference=self.model if self.settings.reward.normalize else "",
                data=self.workdir / "feedback" / "judgements.jsonl",
            ),
            length=self.longest,
            response_length=self.settings.ppo.ppo.response_length,
        )

        def work(folder: Path) -> dict[str, Any]:
            setup = train_reward.prepare(settings)
            results = train_reward.train(setup, folder)
            ceiling = self._ceiling(setup.heldout)
            told = "" if ceiling is None else f"; the simulated annotator's own ceiling: {ceiling:.3f}"
            print(train_reward.verdict(results) + told, flush=True)
            return results | {"annotator_ceiling": ceiling}

        inputs = identity(self.settings.reward, train_reward.MAY_CHANGE)
        self.stages.run("reward_model", inputs, [*self.done, "feedback"], work)

    def _ceiling(self, heldout: JudgedSet) -> float | None:
        """The share of held-out pairs in which the simulated annotator chose what it prefers: no model can know its
        noise.
        """
        if not self.gold or heldout.are_ratings:
            return None
        prompts = [one.prompt for one in heldout.judged for _ in one.responses]
        texts = [text for one in heldout.judged for text in one.responses]
        golds = call_reward(load_host_reward(self.gold), prompts, texts, [{} for _ in texts])
        scores = np.zeros(heldout.ranks.shape)
        scores[heldout.ranks > 0] = golds
        differences = heldout.pair_differences(scores)
        return pair_accuracy(differences, np.ones(len(differences), bool)).accuracy

    def ppo(self) -> None:
        """PPO of the language model against the reward model."""
        settings = self._ppo_settings()

        def work(folder: Path) -> dict[str, Any]:
            return train_ppo.train(train_ppo.prepare(settings), folder)

        may_change = [name for name in train_ppo.MAY_CHANGE if name != "eval_prompts"]
        inputs = [identity(self.settings.ppo, may_change), identity(self.gold)]
        self.stages.run("ppo", inputs, [*self.done, "prompts", "reward_model"], work)

    def _ppo_settings(self) -> PPOExperiment:
        return fill(
            self.settings.ppo,
            model=self.model,
            prompts=self.workdir / "prompts" / "train.jsonl",
            heldout_prompts=self.workdir / "prompts" / "evaluation.jsonl",
            reward=f"model:{self.workdir / 'reward_model' / 'model'}",
            gold=self.gold,
        )

    def evaluation(self) -> dict[str, Any]:
        """What came of it, on prompts that neither feedback nor PPO has seen; then the summary and the report."""
        settings, workdir = self._ppo_settings(), self.workdir

        def work(folder: Path) -> dict[str, Any]:
            prompts = workdir / "prompts" / "evaluation.jsonl"
            results = best_of_n.evaluate(folder, self.model, str(workdir / "ppo" / "policy"), settings, prompts)
            for name in REPORT:
                (workdir / name).unlink(missing_ok=True)  # of an earlier result
            return results

        inputs = [best_of_n.N, best_of_n.POLICY_RESPONSES]
        results = self.stages.run("evaluation", inputs, [*self.done, "ppo"], work)
        summary = self._summary(results)
        if not all((workdir / name).exists() for name in REPORT):
            write_report(workdir, summary, self.stages.walked)
            write_json(workdir / "summary.json", summary)
        return summary

    def _summary(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        reward, ppo = self.stages.result("reward_model"), self.stages.result("ppo")
        agreed = self.stages.result("feedback")["agreement"].values()
        names = ("accuracy", "accuracy_low", "accuracy_high", "ece", "annotator_ceiling")
        return {
            **{f"feedback/{name}": kind[name] for kind in agreed for name in ("percent", "alpha") if kind["items"]},
            **{f"reward_model/{name}": reward[name] for name in names},
            **evaluation,
            "objective/kl": ppo["after"]["kl"],
            "objective/kl_limit": self.settings.ppo.kl_limit or None,
        }


def judged_by_people(folder: Path) -> str:
    """Why a folder of feedback is not simply set aside: how many judgements of people it holds; "" if none."""
    path = folder / "feedback.db"
    judgements = Store(path).judgements() if path.exists() else []
    people = [one for one in judgements if not one.annotator.startswith(SIMULATED)]
    return f"{len(people)} judgements by people" if people else ""


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
