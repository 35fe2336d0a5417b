"""What judges have said is asked once: by the same run, also after a kill."""

import json
from pathlib import Path

import folders
import numpy as np
import pytest

from experiments import train_ppo
from experiments.settings import PPOExperiment
from ppo_jax.errors import InputError
from ppo_jax.metrics import read_jsonl
from ppo_jax.recorded import Recorder
from ppo_jax.rewards import RewardError, call_reward

PROMPTS, TEXTS = ["a", "b"], [" one", " two three"]
ROWS = [{"number": 1}, {"number": 2}]


class Judge:
    """Notes what it is asked, and never says the same twice."""

    def __init__(self, answer=None):
        self.asked, self.answer, self.rng = [], answer, np.random.default_rng()
        self.__name__ = "judge"

    def __call__(self, prompts, completions, **columns):
        self.asked.append((prompts, completions, columns))
        return self.rng.normal(size=len(prompts)).tolist() if self.answer is None else self.answer


def test_the_same_is_asked_once_also_by_another_process(tmp_path):
    path, judge = tmp_path / "scores.jsonl", Judge()
    with Recorder(path) as recorder:
        first = call_reward(recorder.reward(judge, "judge"), PROMPTS, TEXTS, ROWS)
    for _ in range(2):
        with Recorder(path) as recorder:
            again = call_reward(recorder.reward(judge, "judge"), PROMPTS, TEXTS, ROWS)
            assert again.tobytes() == first.tobytes()
    assert judge.asked == [(PROMPTS, TEXTS, {"number": [1, 2]})]


@pytest.mark.parametrize("change", ["prompts", "texts", "columns", "name", "order"])
def test_anything_else_is_another_question(tmp_path, change):
    judge = Judge()
    asked = {"prompts": PROMPTS, "texts": TEXTS, "columns": ROWS, "name": "judge"}
    other = (
        asked
        | {
            "prompts": {"prompts": ["a", "c"]},
            "texts": {"texts": [" one", " two"]},
            "columns": {"columns": [{"number": 1}, {"number": 3}]},
            "name": {"name": "gold"},
            "order": {"prompts": PROMPTS[::-1], "texts": TEXTS[::-1], "columns": ROWS[::-1]},
        }[change]
    )
    for given in (asked, other):
        with Recorder(tmp_path / "scores.jsonl") as recorder:
            call_reward(recorder.reward(judge, given["name"]), given["prompts"], given["texts"], given["columns"])
    assert len(judge.asked) == 2


@pytest.mark.parametrize("answer", [[1.0], [1.0, float("nan")], "no", [1.0, "x"]])
def test_what_fails_is_not_recorded_and_is_told_once(tmp_path, answer):
    with Recorder(tmp_path / "scores.jsonl") as recorder:
        with pytest.raises(RewardError) as error:
            call_reward(recorder.reward(Judge(answer), "judge"), PROMPTS, TEXTS, ROWS)
        assert str(error.value).count("reward judge") == 1
        assert not (tmp_path / "scores.jsonl").exists()
        call_reward(recorder.reward(Judge([1.0, 2.0]), "judge"), PROMPTS, TEXTS, ROWS)
    assert [row["scores"] for row in read_jsonl(tmp_path / "scores.jsonl")] == [[1.0, 2.0]]


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"asked": "x", "scores": [1]}\nnonsense\n')
    with pytest.raises(InputError, match=r"scores\.jsonl:2: expected a JSON object"):
        Recorder(path)


NOTING = """
import json
from pathlib import Path

def noting(prompts, completions, **columns):
    with Path(__file__).with_name("notes.jsonl").open("a") as file:
        file.write(json.dumps([prompts, completions]) + "\\n")
    return [len(text) / 10 for text in completions]
"""


def test_a_run_that_goes_on_never_asks_again(tmp_path, capsys, monkeypatch):
    """Killed after its third iteration, with no checkpoint yet: the judge is not asked for these a second time."""
    world = folders.make_world(tmp_path)
    (tmp_path / "noting.py").write_text(NOTING)
    judge = f"--config.reward={tmp_path / 'noting.py'}:noting"
    flags = world.flags(
        judge, "--config.num_iterations=4", "--config.checkpoint_every=9", f"--workdir={tmp_path / 'run'}"
    )
    watch = train_ppo.watch

    def killed(setup, state, turn, workdir, reporter):
        watch(setup, state, turn, workdir, reporter)
        if int(state.step) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo, "watch", killed)
    assert folders.call_script(train_ppo, PPOExperiment, flags, capsys).status == 130
    assert len(notes(tmp_path)) == 3
    monkeypatch.setattr(train_ppo, "watch", watch)
    assert folders.call_script(train_ppo, PPOExperiment, flags, capsys).status == 0
    asked = notes(tmp_path)
    assert len(asked) == len(set(asked)) > 4  # the fourth iteration, and the evaluation
    assert len(read_jsonl(tmp_path / "run" / "scores.jsonl")) == len(asked)
    assert [row["iteration"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]


def notes(folder: Path) -> list[str]:
    lines = (folder / "notes.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    return lines
