"""`experiments/collect_feedback.py`: what becomes an item, what a restart does again, how it ends."""

import functools
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request

import folders
import pytest

from experiments import collect_feedback
from experiments.settings import FeedbackExperiment
from ppo_jax.data import DataError
from ppo_jax.errors import InputError
from ppo_jax.feedback.page import serve
from ppo_jax.feedback.store import Store
from ppo_jax.metrics import read_jsonl
from ppo_jax.preferences import read_judged

CONFIG = f"--config={folders.ROOT / 'experiments' / 'configs' / 'feedback.py'}"
GIVEN = [
    {"prompt": "one", "completions": ["a"]},
    {"prompt": "two", "completions": ["a", "b"]},
    {"prompt": "three", "completions": ["a", "b", "c"]},
    {"prompt": "equal", "completions": ["a", "a"]},
]


RESPONDER = functools.cache(collect_feedback.Responder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return folders.make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """A model and its program, once for all tests."""
    monkeypatch.setattr(collect_feedback, "Responder", RESPONDER)


@pytest.fixture
def prompts(tmp_path):
    rows = [*folders.prompt_rows(), {"prompt": "the very old dog and the very old cat sat here"}]
    return folders.write_jsonl(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def sampling(model, prompts):
    """Settings of a run that samples: 20 prompts in parts of 8, one more does not fit."""
    fields = dict(num_responses=3, prompt_length=8, response_length=6, batch_size=8, overlap=0.0)
    return FeedbackExperiment(model=str(model), prompts=str(prompts), **fields)


def given(tmp_path, rows=GIVEN, **fields) -> FeedbackExperiment:
    """Settings of a run with given responses."""
    path = folders.write_jsonl(tmp_path / "given.jsonl", rows)
    return FeedbackExperiment(responses=str(path), **(dict(overlap=0.0) | fields))


def items(store: Store) -> list:
    """What is asked, in the order in which one annotator sees it."""
    return [item for _, item in store.pending("somebody")]


# What becomes an item


def test_the_number_of_responses_says_what_is_asked(tmp_path, capsys):
    with collect_feedback.collect(given(tmp_path), tmp_path / "run") as store:
        found = {item.prompt: (item.kind, item.responses, item.scale) for item in items(store)}
    assert found == {
        "one": ("score", ("a",), 5), "two": ("compare", ("a", "b"), 0), "three": ("rank", ("a", "b", "c"), 0)
    }  # fmt: skip
    told = "items: 1 to score, 1 to compare, 1 to rank (1 prompts left out: all their responses are equal)\n"
    assert told in capsys.readouterr().out


def test_a_kind_can_be_asked_for(tmp_path):
    settings = given(tmp_path, GIVEN[1:3], kind="score", scale=7)
    with collect_feedback.collect(settings, tmp_path / "scores") as store:
        found = [(item.kind, item.prompt, *item.responses, item.scale) for item in items(store)]
    texts = [("two", "a"), ("two", "b"), ("three", "a"), ("three", "b"), ("three", "c")]
    assert found == [("score", *text, 7) for text in texts]
    with collect_feedback.collect(given(tmp_path, GIVEN[1:3], kind="rank"), tmp_path / "ranks") as store:
        assert [item.kind for item in items(store)] == ["rank", "rank"]


def test_responses_of_a_model_are_asked_about_blindly(sampling, tmp_path, capsys):
    with collect_feedback.collect(sampling, tmp_path / "run") as store:
        found = items(store)
    rows = read_jsonl(tmp_path / "run" / "responses.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in folders.prompt_rows()]
    assert {len(row["completions"]) for row in rows} == {3}
    distinct = {row["prompt"]: tuple(dict.fromkeys(row["completions"])) for row in rows}
    assert {item.prompt: item.responses for item in found} == {p: t for p, t in distinct.items() if len(t) > 1}
    assert {item.kind for item in found} == {"rank"}
    assert {source for item in found for source in item.sources} == {sampling.model}
    assert len({text for texts in distinct.values() for text in texts}) > 20  # not one key for all
    assert "sampled: 20 of 20 prompts" in capsys.readouterr().out


def test_judgements_that_exist_are_taken_over(tmp_path):
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad", "annotator": "Ann"},
            {"prompt": "q", "chosen": "fine", "rejected": "bad", "annotator": "Ann"}]  # fmt: skip
    judged = folders.write_jsonl(tmp_path / "judged.jsonl", rows)
    settings = given(tmp_path, GIVEN[1:2], judged=str(judged))
    with collect_feedback.collect(settings, tmp_path / "run") as store:
        assert [judgement.annotator for judgement in store.judgements()] == ["Ann", "Ann"]
        assert [item.prompt for item in items(store)] == ["two"]
    with collect_feedback.collect(settings, tmp_path / "run") as store:
        assert len(store.judgements(include_undone=True)) == 2


# What a restart does


def test_a_restart_samples_nothing_again(sampling, tmp_path, monkeypatch):
    with collect_feedback.collect(sampling, tmp_path / "run") as store:
        before = items(store)
        shown = store.next_item("Ann")
        store.judge("Ann", shown.item_id, shown.form_token, ranks=list(range(1, len(shown.responses) + 1)))
    monkeypatch.setattr(collect_feedback, "Responder", None)  # nor is the model needed any more
    os.unlink(sampling.prompts)
    with collect_feedback.collect(sampling, tmp_path / "run") as store:
        assert items(store) == [item for item in before if item.prompt != shown.prompt]
        assert len(store.judgements()) == 1


@pytest.mark.parametrize("lines", [0, 3, 8, 13, 20])
def test_a_kill_while_sampling_changes_nothing(sampling, tmp_path, lines):
    with collect_feedback.collect(sampling, tmp_path / "whole") as store:
        whole = items(store)
    written = (tmp_path / "whole" / "responses.jsonl").read_bytes()
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    (killed / "responses.jsonl").write_bytes(b"".join(written.splitlines(keepends=True)[:lines]) + b'{"prompt": "th')
    with collect_feedback.collect(sampling, killed) as store:
        assert items(store) == whole
    assert (killed / "responses.jsonl").read_bytes() == written


def test_what_a_kill_left_half_full_is_filled(tmp_path):
    """Killed after the items, before filled.json: they are not asked twice, and their judgements count."""
    settings = given(tmp_path)
    with collect_feedback.collect(settings, tmp_path / "run") as store:
        whole = items(store)
        shown = store.next_item("Ann")
        store.judge("Ann", shown.item_id, shown.form_token, score=1)
    (tmp_path / "run" / "filled.json").unlink()
    with collect_feedback.collect(settings, tmp_path / "run") as store:
        assert items(store) == whole[1:]
        assert len(store.judgements()) == 1


def test_a_restart_may_change_how_it_is_served_and_not_what_is_asked(tmp_path):
    settings = given(tmp_path)
    collect_feedback.collect(settings, tmp_path / "run").close()
    token = "a secret of some length"
    fields = dict(port=0, until_complete=True, export="scores", annotators=3, overlap=1.0, token=token, host="0.0.0.0")
    with collect_feedback.collect(given(tmp_path, **fields), tmp_path / "run") as store:
        assert store.progress("Ann").total_needed == 3 * 3
    assert token not in (tmp_path / "run" / "config.json").read_text()
    for change in (dict(kind="score"), dict(scale=7), dict(seed=1)):
        with pytest.raises(InputError, match=f"{next(iter(change))} was"):
            collect_feedback.collect(given(tmp_path, **change), tmp_path / "run")


def test_other_prompts_in_the_file_are_told(sampling, tmp_path):
    collect_feedback.collect(sampling, tmp_path / "run").close()
    (tmp_path / "run" / "filled.json").unlink()
    folders.write_jsonl(tmp_path / "prompts.jsonl", folders.prompt_rows()[::-1])
    with pytest.raises(InputError, match=r"responses.jsonl: its prompts are not those of .*prompts.jsonl"):
        collect_feedback.collect(sampling, tmp_path / "run")


# What is refused


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "expected a text in prompt, a list of texts in completions"),
        ({"completions": ["a", "b"]}, "expected a text in prompt"),
        ({"prompt": ["p"], "completions": ["a", "b"]}, "expected a text in prompt"),
        ({"prompt": "p", "completions": "ab"}, "a list of texts in completions"),
        ({"prompt": "p", "completions": ["a", None]}, "a list of texts in completions"),
        ({"prompt": "p", "completions": []}, "got 0, expected 1 or more, with kind=auto"),
    ],
)
def test_rows_that_cannot_be_used_are_told_before_anything_is_written(tmp_path, row, told):
    with pytest.raises(InputError, match=f"given.jsonl: row 3: .*{told}"):
        collect_feedback.collect(given(tmp_path, [*GIVEN[:2], row]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "row", "expected"), [("compare", 3, "2"), ("rank", 1, "2 or more")])
def test_a_kind_that_does_not_fit_the_number_is_told(tmp_path, kind, row, expected):
    rows = [GIVEN[1], GIVEN[row - 1]]
    with pytest.raises(InputError, match=f"row 2: completions: got {row}, expected {expected}, with kind={kind}"):
        collect_feedback.collect(given(tmp_path, rows, kind=kind), tmp_path / "run")


def test_nothing_to_judge_is_told(tmp_path, prompts):
    for settings, told in {
        FeedbackExperiment(): "nothing to judge",
        FeedbackExperiment(model="x"): "config.prompts: got '', expected prompts, for a model",
        FeedbackExperiment(prompts="x"): "nothing to judge",
        given(tmp_path, prompts="x"): "config.prompts: got 'x', expected prompts, for a model",
        given(tmp_path, GIVEN[3:]): "items: got 0, expected at least one prompt with responses that differ",
    }.items():
        with pytest.raises(InputError, match=re.escape(told)):
            collect_feedback.collect(settings, tmp_path / "run")


def test_judgements_that_cannot_be_read_are_told_before_anything_is_written(tmp_path):
    judged = folders.write_jsonl(tmp_path / "judged.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError, match=r"judged.jsonl"):
        collect_feedback.collect(FeedbackExperiment(judged=str(judged)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_all_too_long_are_told(sampling, tmp_path):
    folders.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "the cat " * 20}])
    with pytest.raises(InputError, match=r"prompts: got 0, expected at least one of at most 8 tokens \(1 are longer\)"):
        collect_feedback.collect(sampling, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"kind": "best"}, "kind: got 'best', expected one of auto, compare, rank, score"),
        ({"kind": "compare", "num_responses": 3}, "num_responses: got 3, expected 2, with kind=compare"),
        ({"kind": "rank", "num_responses": 1}, "num_responses: got 1, expected at least 2, with kind=rank"),
        ({"scale": 1}, "scale: got 1, expected 2 to 100"),
        ({"overlap": 1.5}, "overlap: got 1.5, expected a number in [0, 1]"),
        ({"port": 65536}, "port: got 65536, expected 0 to 65535"),
        ({"export": "pairs, tables"}, "export: got 'tables', expected some of pairs, rankings, choices, scores"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"host": "0.0.0.0"}, "host: got '0.0.0.0', which other machines reach; expected a token with it"),
        ({"token": "secret"}, "token: got '******', expected at least 16 characters"),
        ({"annotators": 0}, "annotators: got 0, expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_told(fields, told):
    with pytest.raises(InputError, match=re.escape(told)):
        FeedbackExperiment(**fields)


def test_a_dry_run_is_refused(capsys):
    outcome = folders.call_script(collect_feedback, FeedbackExperiment, [CONFIG, "--dry_run"], capsys)
    assert "--dry_run: collecting feedback trains nothing" in outcome.error()


# How it ends


class Run:
    """The script as a process, with its page."""

    def __init__(self, tmp_path, *flags):
        arguments = [CONFIG, f"--workdir={tmp_path / 'run'}", "--config.model=", "--config.prompts=", "--config.port=0",
                     "--config.num_prompts=0", f"--config.responses={tmp_path / 'given.jsonl'}", *flags]  # fmt: skip
        self.process = folders.start_script(
            "collect_feedback.py", arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if address := re.search(r"http://\S+", line):
                self.address = address[0]
                return
        raise AssertionError(self.said)

    def open(self, path="") -> int:
        """The status of a page."""
        try:
            return urllib.request.urlopen(self.address + path, timeout=30).status
        except urllib.error.HTTPError as error:
            return error.code

    def end(self) -> int:
        """Waits; the exit status."""
        try:
            self.said += self.process.communicate(timeout=60)[0]
        finally:
            self.process.kill()
        return self.process.returncode


def judge_all(path) -> None:
    """Says in another process's store what people would say on the page."""
    with Store(path) as store:
        while (shown := store.next_item("Ann")) is not None:
            count = len(shown.responses)
            verdict = {"score": 3} if shown.kind == "score" else {"ranks": list(range(1, count + 1))}
            store.judge("Ann", shown.item_id, shown.form_token, **verdict)


def test_it_ends_when_all_is_judged(tmp_path):
    given(tmp_path)
    run = Run(
        tmp_path, "--config.until_complete=true", "--config.overlap=0.0", "--config.export=pairs, rankings,scores"
    )
    assert run.open() == 200
    judge_all(tmp_path / "run" / "feedback.db")
    assert run.end() == 0
    assert "judged: 3 of 3" in run.said
    assert "Traceback" not in run.said
    for kind, rows in {"pairs": 1 + 3, "rankings": 2, "scores": 1}.items():
        path = tmp_path / "run" / f"{kind}.jsonl"
        assert len(read_judged(str(path))) == rows
        assert f"{path}: {rows} rows" in run.said
    assert not (tmp_path / "run" / "choices.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "flags", "status"),
    [
        (signal.SIGINT, [], 0),  # the way to end it
        (signal.SIGINT, ["--config.until_complete=true"], 130),
        (signal.SIGTERM, [], 143),
    ],
)
def test_however_it_ends_what_was_judged_is_written(tmp_path, number, flags, status):
    given(tmp_path)
    run = Run(tmp_path, "--config.overlap=0.0", *flags)
    with Store(tmp_path / "run" / "feedback.db") as store:
        for verdict in ({"score": 3}, {"ranks": [1, 2]}):
            shown = store.next_item("Ann")
            store.judge("Ann", shown.item_id, shown.form_token, **verdict)
    run.process.send_signal(number)
    assert run.end() == status
    assert "Traceback" not in run.said
    assert len(read_jsonl(tmp_path / "run" / "pairs.jsonl")) == 1


def test_a_token_stands_in_the_address_and_nowhere_else(tmp_path):
    given(tmp_path)
    token = "open sesame & more"
    run = Run(tmp_path, f"--config.token={token}", "--config.host=0.0.0.0")
    run.address = re.sub(r"//[^:]+:", "//127.0.0.1:", run.address)
    assert run.open() == 200
    run.address = run.address.partition("?")[0]
    assert [run.open(path) for path in ("", "export/pairs.jsonl", "static/keys.js")] == [401] * 3
    run.process.terminate()
    run.end()
    for path in (tmp_path / "run").iterdir():
        assert token.encode() not in path.read_bytes()
        assert json.dumps(token).encode() not in path.read_bytes()


def test_a_complete_store_is_not_served(tmp_path, monkeypatch):
    monkeypatch.setattr(collect_feedback, "serve", None)
    with collect_feedback.collect(given(tmp_path), tmp_path / "run") as store:
        store.close()
    judge_all(tmp_path / "run" / "feedback.db")
    with Store(tmp_path / "run" / "feedback.db") as store:
        collect_feedback.serve_until_complete(store)


def test_an_undo_at_the_end_keeps_it_open(tmp_path, monkeypatch):
    """Everything is judged, one is undone, and judged again: only then it ends."""
    monkeypatch.setattr(collect_feedback, "FAREWELL_S", 1.5)
    judged = []

    def serve_and_act(store, *_, until, **__):
        def asked():  # once a second
            second = len(judged)
            if second in (0, 3):
                judge_all(store.path)
            elif second == 1:
                store.undo("Ann")
            judged.append(store.progress("Ann").total_judged)
            return until()

        serve(store, port=0, until=asked, announce=lambda _: None)

    monkeypatch.setattr(collect_feedback, "serve", serve_and_act)
    with collect_feedback.collect(given(tmp_path, GIVEN[1:2]), tmp_path / "run") as store:
        collect_feedback.serve_until_complete(store)
    assert judged == [1, 0, 0, 1, 1, 1]
