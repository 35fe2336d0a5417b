"""The whole road in small: every stage, what is passed over, what runs again, and people instead of the simulation."""

import json
import os
import re
import subprocess

import folders
import numpy as np
import pytest

from experiments import rlhf
from experiments.settings import PPOExperiment, RLHFExperiment, SFTExperiment
from ppo_jax.feedback.store import Store
from ppo_jax.metrics import read_jsonl

CONFIG = folders.ROOT / "experiments" / "configs" / "quickstart.py"
SMALL = {
    "num_eval_prompts": 4,
    "corpus.num_train": 3000, "corpus.num_heldout": 8, "corpus.num_demonstrations": 40, "corpus.num_prompts": 20,
    "corpus.vocab_size": 2048,
    "pretrain.num_steps": 2, "pretrain.batch_size": 8, "pretrain.eval_every": 2, "pretrain.log_every": 1,
    "pretrain.architecture.num_layers": 1, "pretrain.architecture.width": 16,
    "pretrain.architecture.mlp_width": 16, "pretrain.mesh.data": 1,
    "sft.num_steps": 2, "sft.batch_size": 8, "sft.eval_every": 2, "sft.log_every": 1, "sft.mesh.data": 1,
    "collect.num_responses": 2, "collect.batch_size": 8, "collect.overlap": 0.25,
    "reward.batch_size": 4, "reward.num_epochs": 1, "reward.log_every": 1,
    "reward.reference_samples": 8, "reward.mesh.data": 1,
    "ppo.num_iterations": 1, "ppo.eval_prompts": 8, "ppo.mesh.data": 1, "ppo.ppo.batch_size": 8,
    "ppo.ppo.response_length": 8, "ppo.ppo.num_epochs": 1, "ppo.ppo.num_minibatches": 1,
}  # fmt: skip
STAGES = ("corpus", "pretrain", "sft", "prompts", "feedback", "reward_model", "ppo", "evaluation")
NAMES = (
    "reward_model/accuracy", "reward_model/annotator_ceiling", "gold/base", "gold/best_of_16", "gold/ppo", "proxy/base",
    "proxy/ppo", "objective/kl",
)  # fmt: skip


def flags(workdir, **changes):
    """The command line of the small road."""
    fields = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in fields.items())]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A finished workdir; tests leave it as it is."""
    workdir = tmp_path_factory.mktemp("road") / "run"
    outcome = folders.run_script("rlhf.py", flags(workdir))
    assert (outcome.status, outcome.err) == (0, "")
    return workdir


def copy_of(road, tmp_path):
    """The finished road under the same name (settings hold paths), with a way back."""
    subprocess.run(["cp", "-a", str(road), str(tmp_path / "kept")], check=True)
    return tmp_path / "kept"


def test_every_stage_leaves_its_result(road):
    assert set(STAGES) <= set(os.listdir(road))
    summary = json.loads((road / "summary.json").read_text())
    assert all(np.isfinite(summary[name]) for name in NAMES)
    assert 0 <= summary["reward_model/accuracy"] <= 1
    assert 0 <= summary["reward_model/annotator_ceiling"] <= 1
    page = (road / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (road / "report.md").stat().st_size > 1000
    rows = [json.loads(line) for line in (road / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert all({"objective/score", "objective/gold", "objective/kl"} <= row.keys() for row in rows)


def test_the_simulated_annotator_writes_into_the_store_of_the_page(road):
    judgements = Store(road / "feedback" / "feedback.db").judgements()
    assert {one.annotator for one in judgements} <= {"simulated 1", "simulated 2"}
    assert len(read_jsonl(road / "feedback" / "judgements.jsonl")) == len(judgements) == 20  # 16 items, 4 of them twice
    summary = json.loads((road / "summary.json").read_text())
    assert 0 <= summary["feedback/percent"] <= 1


def test_no_prompt_is_on_both_sides(road):
    train, kept = (read_jsonl(road / "prompts" / f"{name}.jsonl") for name in ("train", "evaluation"))
    assert (len(train), len(kept)) == (16, 4)
    assert len({row["prompt"] for row in train + kept}) == 20
    seen = (road / "corpus" / "train.jsonl").read_text() + (road / "corpus" / "demonstrations.jsonl").read_text()
    assert not any(row["prompt"] in seen for row in train + kept)
    assert {row["prompt"] for row in read_jsonl(road / "evaluation" / "responses.jsonl")} == {r["prompt"] for r in kept}
    # PPO's own comparison, which gives the KL, is on these as well.
    assert {row["prompt"] for row in read_jsonl(road / "ppo" / "responses.jsonl")} <= {row["prompt"] for row in kept}


def test_a_second_start_does_nothing(road, capsys):
    before = folders.contents(road)
    outcome = folders.call_script(rlhf, RLHFExperiment, flags(road), capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert "gold/ppo" in outcome.out
    assert not any(f"{stage}: " in outcome.out for stage in STAGES)
    assert folders.contents(road) == before


def test_a_changed_setting_of_ppo_runs_ppo_and_evaluation_again(road, tmp_path, capsys):
    workdir = copy_of(road, tmp_path)
    before = folders.contents(workdir)
    outcome = folders.call_script(rlhf, RLHFExperiment, flags(workdir, ppo__ppo__lr=2e-4), capsys)
    assert (outcome.status, outcome.err) == (0, "")
    assert re.findall(r"^(\w+): /", outcome.out, re.MULTILINE) == ["ppo", "evaluation", "report"]
    after = folders.contents(workdir)

    def of(contents, *names):
        return {path: data for path, data in contents.items() if str(path).split("/")[0] in names}

    kept = [stage for stage in STAGES if stage not in ("ppo", "evaluation")]
    assert of(after, *kept) == of(before, *kept)
    assert set(os.listdir(workdir / "ppo.old")) == set(os.listdir(workdir / "ppo"))
    assert json.loads((workdir / "ppo" / "config.json").read_text())["ppo"]["lr"] == 2e-4


def test_a_lost_report_comes_back(road, tmp_path, capsys):
    workdir = copy_of(road, tmp_path)
    before = folders.contents(workdir)
    (workdir / "report.html").unlink()
    assert folders.call_script(rlhf, RLHFExperiment, flags(workdir), capsys).status == 0
    after = folders.contents(workdir)
    assert after.keys() == before.keys()
    assert len(after["report.html"]) == pytest.approx(len(before["report.html"]), rel=0.01)


def test_people_are_waited_for(road, tmp_path):
    """The page is served until everything is judged, here by another process on the same store; then it goes on."""
    workdir = copy_of(road, tmp_path)
    changes = {"feedback": "page", "collect__port": 0, "collect__overlap": 0.0}
    process = folders.start_script("rlhf.py", flags(workdir, **changes), stdout=subprocess.PIPE)
    try:
        wait_for(process, "open http://127.0.0.1:")
        store, prefers_long = Store(workdir / "feedback" / "feedback.db"), {}
        while (shown := store.next_item("Ada")) is not None:
            first, second = map(len, shown.responses)
            store.judge("Ada", shown.item_id, shown.form_token, ranks=[1, 2] if first > second else [2, 1])
            prefers_long[shown.prompt] = max(shown.responses, key=len)
        wait_for(process, "reward_model: ")
    finally:
        process.kill()
        process.communicate()
    rows = read_jsonl(workdir / "feedback" / "judgements.jsonl")
    assert {row["prompt"]: row["completions"][row["ranks"].index(1)] for row in rows} == prefers_long
    assert (workdir / "feedback.old" / "feedback.db").exists()  # the simulated annotator's
    # What people said is not set aside for another setting.
    again = folders.run_script("rlhf.py", flags(workdir, **changes, num_eval_prompts=5))
    assert "16 judgements by people" in again.error()
    assert len(Store(workdir / "feedback" / "feedback.db").judgements()) == 16


def wait_for(process, beginning):
    """Reads lines until one begins so; fails when there is none."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    pytest.fail("".join(lines))


REFUSED = {
    "a vocabulary too small": ({"corpus__vocab_size": 20, "corpus__num_train": 20}, "vocab_size"),
    "an unknown judge": ({"gold": "nowhere:gold"}, "nowhere"),
    "nobody to judge": ({"feedback": "nobody"}, "feedback: got 'nobody'"),
    "too many prompts to keep": ({"num_eval_prompts": 30}, "num_eval_prompts"),
    "a length that follows": ({"collect__response_length": 9}, "collect.response_length: got 9"),
    "too long for the model": ({"ppo__ppo__response_length": 90}, "at most the model's 96 positions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused(tmp_path, capsys, name):
    changes, told = REFUSED[name]
    assert told in folders.call_script(rlhf, RLHFExperiment, flags(tmp_path / "run", **changes), capsys).error()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "letters.txt").write_text("Dear Ada,")
    error = folders.call_script(rlhf, RLHFExperiment, flags(tmp_path), capsys).error()
    assert "stages.json" in error
    assert (tmp_path / "letters.txt").read_text() == "Dear Ada,"


def test_one_seed_for_all_stages_that_are_walked():
    """Next to a model the settings of the others stay the defaults, which they have to be."""
    ppo = PPOExperiment(seed=10)
    whole = RLHFExperiment(seed=3, ppo=ppo).seeded()
    assert [getattr(whole, name).seed for name in ("pretrain", "sft", "collect", "reward", "ppo")] == [3, 3, 3, 3, 13]
    tuned = RLHFExperiment(model="m", prompts="p", seed=3, ppo=ppo).seeded()
    assert [getattr(tuned, name).seed for name in ("pretrain", "sft", "collect", "reward", "ppo")] == [0, 0, 3, 3, 13]
    assert RLHFExperiment(model="m", prompts="p", seed=3, sft=SFTExperiment(data="d")).seeded().sft.seed == 3
